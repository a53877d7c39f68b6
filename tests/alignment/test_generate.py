"""What is written is what transformers writes, whatever is written beside it."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_checkpoint
from reference import SIZES, reference_model
from runs import slow_but

from minimore.alignment.generate import Cache, Sampling, draw, generate, probabilities_of, uniform
from minimore.alignment.policy import LanguageModel
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint

PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 60)), [3, 250]]
GREEDY = Sampling(temperature=0, max_new_tokens=20)


def opened(checkpoint):
    trunk, _ = checkpoint.load()
    return LanguageModel(trunk, checkpoint.unembedding(trunk))


@pytest.fixture
def model(transformers, tmp_path):
    return opened(write_checkpoint(reference_model("llama", head="ForCausalLM"), tmp_path))


@pytest.mark.parametrize("family", slow_but(["gpt_neox", "gemma3_text"], SIZES))
def test_greedy_continuations_are_those_of_transformers(transformers, tmp_path, family):
    theirs = reference_model(family, head="ForCausalLM")
    ours = opened(write_checkpoint(theirs, tmp_path))
    samples = generate(ours, PROMPTS, [[0]] * len(PROMPTS), GREEDY)
    for prompt, sample in zip(PROMPTS, samples):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert sample.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "family, changes, windows",
    [
        ("mistral", {}, (4096, 4096)),
        ("mistral", {"sliding_window": 6}, (6, 6)),
        ("gemma3_text", {"sliding_window": 6}, (6, None)),  # each rotates by its own base
        ("olmo2", {}, ()),
        ("phi3", {"sliding_window": 6}, (6, 6)),
    ],
)
@torch.no_grad()
def test_the_cache_changes_nothing(transformers, tmp_path, family, changes, windows):
    """States of prompts and of what follows, token by token, are those of the whole texts."""
    theirs = reference_model(family, head="ForCausalLM", **changes)
    ours = opened(write_checkpoint(theirs, tmp_path))
    assert ours.trunk.c.windows == windows
    more = [[1, 2, 3, 4, 5, 6, 7, 8], [9] * 8, [10, 11] * 4, [12] * 8]
    cache, states = Cache.of_prompts(ours, PROMPTS, [0, 1, 2, 3])
    for t in range(9):
        texts = [prompt + new[:t] for prompt, new in zip(PROMPTS, more)]
        expected = ours.trunk(pack([([], [text]) for text in texts]))
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=2e-5)
        if t < 8:
            states = cache.step([new[t] for new in more])


def test_prompts_read_in_parts_change_nothing(model):
    sampling = Sampling(max_new_tokens=10)
    expected = generate(model, PROMPTS, [[1, 2]] * 4, sampling)
    for micro_tokens in (1, 6, 50):
        assert generate(model, PROMPTS, [[1, 2]] * 4, sampling, None, micro_tokens) == expected


def test_a_sample_is_the_same_alone_and_in_company(model):
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=100, max_new_tokens=25)
    seeds = [list(range(16 * i, 16 * (i + 1))) for i in range(4)]
    together = generate(model, PROMPTS, seeds, sampling)
    assert [(s.prompt, s.seed) for s in together] == [
        (i, seed) for i, own in enumerate(seeds) for seed in own
    ]
    assert len({tuple(s.tokens) for s in together}) == 64
    for sample in together[::7]:
        (alone,) = generate(model, [PROMPTS[sample.prompt]], [[sample.seed]], sampling)
        assert alone.tokens == sample.tokens


def test_finished_samples_leave_and_the_others_go_on(model):
    sampling = Sampling(max_new_tokens=40, eos=frozenset(range(0, 300, 10)))
    samples = generate(model, PROMPTS, [[1, 2, 3]] * 4, sampling)
    lengths = {len(sample.tokens) for sample in samples}
    assert len(lengths) > 3
    for sample in samples:
        ends = [token % 10 == 0 for token in sample.tokens]
        assert not any(ends[:-1]) and ends[-1] == sample.is_finished
        assert sample.is_finished or len(sample.tokens) == 40
    stopped = generate(
        model, PROMPTS, [[1]] * 4, Sampling(max_new_tokens=9), lambda s: len(s.tokens) == 4
    )
    assert all(len(s.tokens) == 4 and s.is_finished for s in stopped)


def test_no_sample_and_no_token():
    assert generate(None, [], [], Sampling()) == []
    (sample,) = generate(None, [[1]], [[0]], Sampling(max_new_tokens=0))
    assert sample.tokens == []


# ---- drawing a token -----------------------------------------------------------------------------


class Place:
    """A sample that has only a seed, at its first token."""

    def __init__(self, seed):
        self.seed, self.tokens = seed, []


def frequencies(logits, sampling, draws=10_000):
    drawn = draw(logits.expand(draws, -1), [Place(seed) for seed in range(draws)], sampling)
    return np.bincount(drawn, minlength=logits.shape[1])


LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.4, -3.0, 1.0]])


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_k=3),
    Sampling(top_p=0.7),
    Sampling(temperature=1.5, top_k=4, top_p=0.8),
]


@pytest.mark.parametrize("sampling", slow_but(SAMPLINGS[-1:], SAMPLINGS), ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling):
    probabilities = torch.softmax(LOGITS[0].double() / sampling.temperature, 0).numpy()
    order = np.argsort(-probabilities)
    rank = np.argsort(order)
    if sampling.top_k:
        probabilities = np.where(rank < sampling.top_k, probabilities, 0)
        probabilities /= probabilities.sum()
    before = np.zeros(6)
    before[order] = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities = np.where(before < sampling.top_p, probabilities, 0)
    expected = 10_000 * probabilities / probabilities.sum()
    counted = frequencies(LOGITS, sampling)
    assert not counted[expected == 0].any()
    some = expected > 0
    chi_square = (((counted - expected) ** 2)[some] / expected[some]).sum()
    assert chi_square < 25.7  # the 99.99% quantile for 5 degrees of freedom


def test_temperature_zero_takes_the_likeliest():
    assert frequencies(LOGITS, Sampling(temperature=0), 10).tolist() == [10, 0, 0, 0, 0, 0]


def test_top_p_keeps_at_least_the_likeliest_token():
    probabilities = probabilities_of(LOGITS, Sampling(top_p=1e-9))
    assert (probabilities[0] > 0).tolist() == [True] + [False] * 5


@pytest.mark.slow
def test_top_p_and_top_k_cut_a_large_vocabulary_as_sorting_does():
    """No two of the 5000 logits are equal; with 1 to 5000 tokens that stay."""
    logits = torch.randn(4, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits *= torch.tensor([[0.01], [1], [4], [40]])
    for top_k in (0, 1, 70, 5000, 10**6):
        for top_p in (1e-9, 0.3, 0.95, 1 - 1e-9, 1.0):
            probabilities = probabilities_of(logits, Sampling(top_k=top_k, top_p=top_p))
            for row, found in zip(logits.softmax(1).tolist(), probabilities.numpy()):
                order = sorted(range(5000), key=lambda token: -row[token])[: top_k or None]
                share, total = 0.0, sum(row[token] for token in order)
                expected = [0.0] * 5000
                for token in order:
                    if top_p == 1 or share < top_p * total:
                        expected[token] = row[token]
                    share += row[token]
                np.testing.assert_array_equal(found > 0, np.array(expected) > 0)
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_tokens_that_are_equally_likely_stay_together():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for cut in (dict(top_k=2), dict(top_p=0.7)):
        probabilities = probabilities_of(logits, Sampling(**cut))
        assert (probabilities[0] > 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_an_error(value):
    logits = LOGITS.clone()
    logits[0, 3] = value
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="not finite"):
            frequencies(logits, Sampling(temperature=temperature), 2)


def test_chances_are_uniform_and_a_function_of_seed_and_place():
    drawn = np.array([[uniform(seed, t) for t in range(100)] for seed in range(100)])
    assert len(np.unique(drawn)) == 10_000 and uniform(3, 5) == drawn[3, 5]
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.var() - 1 / 12) < 0.003


# ---- a real model --------------------------------------------------------------------------------

STORIES = Path(
    os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"), "models/stories260k"
)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")
def test_the_published_story_comes_out_to_the_letter():
    checkpoint = Checkpoint(str(STORIES))
    model = opened(checkpoint)
    sampling = replace(GREEDY, max_new_tokens=256)
    (sample,) = generate(model, [[1]], [[0]], sampling)
    text = checkpoint.tokenizer.file.decode(sample.tokens)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
        " park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
        "\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to"
    )
    assert text.strip().endswith("Don't worry, Lily. We can help you.")
