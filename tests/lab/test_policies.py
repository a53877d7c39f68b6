"""Policies of the world write its responses, and learn what is chosen for them, whatever scale."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minimore.alignment.policy import open_policy
from minimore.calibration import pair_ece
from minimore.data.pairs import load_source
from minimore.data.world import WORDS, World
from minimore.lab.best_of import choices
from minimore.lab.drift import true_pairs
from minimore.lab.policies import (
    Design,
    Fitting,
    both_sides,
    chosen_sides,
    divergence,
    fitted,
    orders,
    perplexity,
    texts_of,
    written,
)
from minimore.lab.testbed import chosen_for, controls_of, first, open_testbed
from minimore.model.checkpoint import Checkpoint, ids_of_eos
from minimore.report import source_margins
from minimore.reward import ModelOptions, open_reward_model

WORLD = World(train_pairs=(200,), test_pairs=30, seed=3)
SMALL = Design(
    base=Fitting(150, 20, 5e-3),
    tuning=Fitting(20, 20, 2e-3),
    prompts=120,
    curve_prompts=10,
    curve_samples=8,
    test_prompts=40,
    test_samples=4,
    preferred=4,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world") / "home"
    WORLD.write(directory)
    return directory


@pytest.fixture(scope="module")
def testbed(home):
    return open_testbed(home, WORLD, SMALL)


# ---- fitting and writing -------------------------------------------------------------------------


def test_every_epoch_sees_every_item_once():
    order = orders(7, Fitting(steps=5, items=4, learning_rate=1.0), seed=0)
    assert order.shape == (5, 4)
    assert sorted(order.ravel()[:7]) == sorted(order.ravel()[7:14]) == list(range(7))
    assert (order == orders(7, Fitting(5, 4, 1.0), seed=0)).all()
    assert (order != orders(7, Fitting(5, 4, 1.0), seed=1)).any()


def test_responses_are_the_pairs_with_their_end(home):
    checkpoint = Checkpoint(str(home / "model"))
    pairs = true_pairs(WORLD.paths(home)["ana"][0])[:5]
    (eos,) = ids_of_eos(checkpoint)
    decode = checkpoint.tokenizer.file.decode
    for pair, both, chosen in zip(
        pairs, both_sides(pairs, checkpoint), chosen_sides(pairs, checkpoint)
    ):
        assert [response[-1] for response in both.responses] == [eos, eos]
        texts = [decode(both.prompt + response[:-1]) for response in both.responses]
        assert texts == [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
        assert chosen.responses == both.responses[:1]


def test_fitting_leaves_the_policy_as_it_was_and_repeats(home):
    checkpoint = Checkpoint(str(home / "model"))
    items = both_sides(true_pairs(WORLD.paths(home)["ana"][0])[:20], checkpoint)
    policy = open_policy(checkpoint, ModelOptions(model=str(home / "model")))
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    once, twice = (fitted(policy, items, Fitting(3, 8, 1e-3), seed=0) for _ in range(2))
    for name, p in policy.state_dict().items():
        assert torch.equal(p, before[name])
        assert torch.equal(once.state_dict()[name], twice.state_dict()[name])
    assert perplexity(once, items) < perplexity(policy, items)
    assert divergence(policy, policy, items) == 0


@pytest.mark.slow
def test_the_base_writes_responses_of_the_world(testbed):
    """Words that the world knows, 14 of them, no two responses alike, as likely as random words."""
    words = [text.split() for texts in testbed.texts for text in texts]
    assert np.mean([word in WORDS for response in words for word in response]) > 0.99
    lengths = np.array([len(response) for response in words])
    assert np.mean(lengths == WORLD.response_words) > 0.8 and abs(lengths.mean() - 14) < 1
    assert len({" ".join(response) for response in words}) > 0.99 * len(words)
    # 40 words, each as likely, and an end that is certain: 40^(14 / 15) = 31.3.
    assert 31 < perplexity(testbed.base, testbed.preferred[0]) < 38
    sigma = np.concatenate([truth.shared for truth in testbed.truth]).std()
    assert sigma == pytest.approx(np.sqrt(1 - WORLD.conflict), rel=0.1)


@pytest.mark.slow
def test_the_same_seed_writes_the_same(testbed):
    prompts = testbed.test_prompts[:3]
    once, twice = (written(testbed.base, testbed.checkpoint, prompts, 2, 5) for _ in range(2))
    assert once == twice != written(testbed.base, testbed.checkpoint, prompts, 2, 6)
    assert len({str(texts) for texts in texts_of(once, testbed.checkpoint)}) == 3


# ---- the testbed ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_and_test_prompts_are_disjoint(testbed):
    decode = testbed.checkpoint.tokenizer.file.decode
    tests = {decode(prompt) for prompt in testbed.test_prompts}
    assert len(tests) == SMALL.test_prompts and not tests & set(testbed.prompts)
    assert [decode(item.prompt) for item in testbed.samples] == testbed.prompts
    counts = [len(item.responses) for item in testbed.samples]
    assert counts == [8] * 10 + [4] * 110
    assert testbed.few.shape == (120, 4) and testbed.many.shape == (10, 8)
    np.testing.assert_array_equal(testbed.few[:10], testbed.many[:, :4])


@pytest.mark.slow
def test_what_is_stored_is_read_again(home, testbed):
    controls = controls_of(testbed)
    open_testbed.cache_clear()
    again = open_testbed(home, WORLD, SMALL)
    assert again is not testbed and again.samples == testbed.samples
    for name, p in testbed.base.state_dict().items():
        assert torch.equal(again.base.state_dict()[name], p)
    stored = controls_of(again)
    for name, control in controls.items():
        assert (stored[name].rewards == control.rewards).all()
        assert stored[name].kl == control.kl
        assert (stored[name].perplexities == control.perplexities).all()
    assert controls["base"].kl == 0
    assert controls["best"].rewards.mean() > controls["random"].rewards.mean() + 0.3


@pytest.mark.slow
def test_a_temperature_changes_the_ece_and_no_choice_and_no_weight(testbed, home):
    """Dividing by a power of two is exact: the same order, the same ties, the same policy."""
    model, checkpoint = open_reward_model(ModelOptions(model=str(home / "model")))
    path = str(WORLD.paths(home)["ana"][1])
    source = load_source("ana", path, checkpoint.tokenizer, 512)
    with torch.no_grad():
        model.head *= 30
    trained, eces, policies = model.head.clone(), [], []
    for temperature in (1.0, 16.0):
        with torch.no_grad():
            model.head.copy_(trained / temperature)
        eces.append(pair_ece(source_margins(model, source, 8192)))
        few = first(SMALL.samples, testbed.rewards(model, checkpoint))
        policies.append(testbed.tuned(choices(few)).state_dict())
    assert max(eces) > min(eces) + 0.1
    assert all(torch.equal(policies[0][name], p) for name, p in policies[1].items())
    # A cell stores the policy of exactly this choice.
    stored = chosen_for(testbed, model, checkpoint)
    assert (stored["few"].numpy() == few).all()
    policy = testbed.tuned(choices(few))
    assert (stored["policy.rewards"].numpy() == testbed.judged(policy).rewards).all()
    other = testbed.tuned(choices(-few)).state_dict()
    assert any(not torch.equal(policies[0][name], p) for name, p in other.items())
