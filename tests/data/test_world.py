"""The synthetic world is what it says it is, and the demo reaches what is possible in it."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from minimore.cli import main
from minimore.data.forms import Pair
from minimore.data.records import read_records
from minimore.data.world import ANNOTATORS, World, _counts
from minimore.lab import demo
from minimore.lab.drift import true_pairs
from minimore.options import InputError


def test_drifts_are_orthogonal():
    shared, drifts = World(conflict=0.3).values()
    assert (
        np.allclose(drifts.sum(0), 0)
        and np.allclose(drifts @ shared, 0)
        and np.allclose([shared.sum(), *drifts.sum(1)], 0)
    )
    assert np.allclose((drifts**2).mean(1), 0.3) and (shared**2).mean() == pytest.approx(0.7)


@pytest.mark.slow
def test_the_same_in_the_worlds_own_pairs(tmp_path):
    world = World(conflict=0.4, train_pairs=(2000, 1, 1, 1, 1), test_pairs=0)
    paths = world.write(tmp_path)
    pairs = true_pairs(paths["ana"][0])
    either_way = np.random.default_rng(0).choice(
        [-1, 1], (len(pairs), 1)
    )  # labels follow the reward; pairs do not
    m = world.true_margins(pairs) * either_way  # (N, K)
    shared, drift = m.mean(1), m - m.mean(1, keepdims=True)
    assert np.corrcoef(shared, drift[:, 0])[0, 1] == pytest.approx(0, abs=0.07)
    assert np.var(drift[:, 0]) / np.var(m[:, 0]) == pytest.approx(0.4, abs=0.05)


@pytest.mark.slow
def test_labels_are_drawn_with_the_probability_on_file(tmp_path):
    world = World(train_pairs=(1500, 1500, 1, 1, 1), test_pairs=0, decisiveness=(1.0,))
    paths = world.write(tmp_path)
    for k, name in ((0, "ana"), (1, "ben")):
        p = np.array(
            [json.loads(line)["probability"] for line in paths[name][0].read_text().splitlines()]
        )
        assert np.allclose(
            p, 1 / (1 + np.exp(-world.true_margins(true_pairs(paths[name][0]))[:, k])), atol=1e-6
        )
        said, came_true = np.maximum(p, 1 - p).mean(), (p > 0.5).mean()
        assert said == pytest.approx(came_true, abs=4 * (said * (1 - said) / len(p)) ** 0.5)


def test_true_rewards_are_sums_of_word_values():
    """Their differences are the true margins; unknown and late words are worth nothing."""
    world = World(conflict=0.4, response_words=3)
    shared, drifts = world.values()
    amber, anchor = (shared[i] / 3**0.5 for i in (0, 1))
    responses = [" amber anchor", " anchor amber olives", "amber amber amber amber", ""]
    rewards = world.true_rewards(responses)
    assert np.allclose(rewards.shared, [amber + anchor, amber + anchor, 3 * amber, 0])
    pair = Pair("", responses[0], "amber amber amber")
    assert np.allclose(rewards.annotators[0] - rewards.annotators[2], world.true_margins([pair])[0])
    assert world.true_rewards([]).annotators.shape == (0, 5)


def test_a_world_is_read_back(tmp_path):
    world = World(
        conflict=0.3, decisiveness=(1.0, 2.0, 3.0, 4.0, 5.0), train_pairs=(4,), test_pairs=4, seed=3
    )
    world.write(tmp_path)
    assert World.read(tmp_path) == world
    with pytest.raises(InputError, match="no such file; expected the directory of a world"):
        World.read(tmp_path / "model")
    path = tmp_path / "world.json"
    path.write_text(path.read_text().replace("0.3", "0.4"))
    with pytest.raises(InputError, match="not as it was written"):
        World.read(tmp_path)


def test_a_model_is_taken_apart():
    world = World(conflict=0.4)
    pairs, rng = _pairs(6000), np.random.default_rng(1)
    counts = np.array([_counts(p.chosen) - _counts(p.rejected) for p in pairs]) / np.sqrt(14)
    shared, drifts = world.values()
    true, drift = counts @ shared, counts @ drifts.T
    found = world.decompose(2 * true + 3 * drift[:, 0] + rng.normal(0, 1, len(pairs)), pairs)
    assert found.shared == pytest.approx(2, abs=0.1)
    assert np.allclose(
        found.drift, [3, -0.75, -0.75, -0.75, -0.75], atol=0.15
    )  # a simplex: every drift is a quarter of minus the others
    parts = np.array([4 * (true**2).mean(), 9 * (drift[:, 0] ** 2).mean(), 1])
    assert np.allclose(
        [found.shared_share, found.drift_share, found.other_share], parts / parts.sum(), atol=0.02
    )
    flipped = [
        p._replace(chosen=p.rejected, rejected=p.chosen) for p in pairs
    ]  # labels do not enter
    assert world.decompose(-true, flipped).shared == pytest.approx(1)
    assert np.isnan(world.decompose(np.zeros(len(pairs)), pairs).shared_share)
    with pytest.raises(ValueError, match="eve is reversed"):
        World(reversed="eve").decompose(true, pairs)
    alone = World(conflict=0.0).decompose(true, pairs)
    assert np.isnan(alone.drift).all() and alone.drift_share == 0


def test_ceilings():
    agree, fight = World(conflict=0.0, test_pairs=0), World(conflict=1.0)
    pairs = [p for p in _pairs(400)]
    best, single = agree.ceilings(pairs)
    assert np.allclose(best, single) and best.min() > 0.7
    best, single = fight.ceilings(pairs)
    assert (best > single).all() and single.mean() < 0.65


@pytest.mark.slow
def test_no_linear_reward_beats_the_single_rule():
    world, rng = (
        World(conflict=0.5, decisiveness=(4.0, 2.0, 1.0, 0.5, 2.0)),
        np.random.default_rng(0),
    )
    pairs = _pairs(500)
    betas = np.array(world.decisiveness)
    p = 1 / (1 + np.exp(-betas * world.true_margins(pairs)))
    _, single = world.ceilings(pairs)
    margins = world.true_margins(pairs)
    for _ in range(300):
        first = margins @ rng.dirichlet(np.ones(5)) > 0
        assert np.where(first[:, None], p, 1 - p).mean() <= single.mean() + 1e-12


def _pairs(n):
    from minimore.data.forms import Pair
    from minimore.data.world import WORDS

    rng = np.random.default_rng(5)
    return [Pair("", *(" ".join(rng.choice(WORDS, 14)) for _ in range(2))) for _ in range(n)]


def test_reversed_and_revealed(tmp_path):
    world = World(reversed="eve", reveal=True, train_pairs=(5,), test_pairs=2)
    shared, drifts = world.values()
    assert np.allclose(shared + drifts[4], -shared)
    paths = world.write(tmp_path)
    assert all("ana asks" in p.prompt for p in true_pairs(paths["ana"][0]))


def test_worlds_repeat_and_prompts_are_held_out(tmp_path):
    for name in "ab":
        World(train_pairs=(50,), test_pairs=20, ties=0.2).write(tmp_path / name)
    for path in (tmp_path / "a").rglob("*.*"):
        assert (
            path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        ), path
    prompts = [p.prompt for path in (tmp_path / "a" / "data").iterdir() for p in true_pairs(path)]
    assert len(prompts) == len(set(prompts))


def test_votes_stand_in_every_line_and_are_drawn_from_the_true_probability(tmp_path):
    paths = World(train_pairs=(40,), test_pairs=1, ties=0.1, votes=1000).write(tmp_path)
    checked = 0
    for train_path, _ in paths.values():
        for _, line in read_records(str(train_path)):
            if "text" in line:
                assert line["score"] == [1, 1]  # a tie
                continue
            for_chosen, for_rejected = line["votes"]
            assert for_chosen >= for_rejected and for_chosen + for_rejected == 1000
            if "probability" in line:
                p = line["probability"]
                assert abs(for_chosen / 1000 - p) < 5 * np.sqrt(p * (1 - p) / 1000) + 1e-6
                checked += 1
    assert checked > 80


@pytest.mark.parametrize(
    "wrong",
    [
        {"conflict": 2},
        {"ties": 1.0},
        {"decisiveness": (1.0, 2.0)},
        {"annotators": ()},
        {"votes": 0},
        {"votes": 1001},
    ],
)
def test_impossible_worlds_are_refused(wrong):
    with pytest.raises(InputError):
        World(**wrong)


@pytest.mark.slow
def test_demo_reaches_what_one_shared_reward_can_reach(tmp_path, capsys, monkeypatch):
    """Both methods close at least 70% of the gap between 50% and the best single rule.

    That is a mean over annotators: the standard error of 5 x 285 test pairs is 5% of the gap.
    """
    of_demo = demo.training

    def training(*arguments):
        """With small steps, of which few pairs make as many."""
        return replace(of_demo(*arguments), batch_size=20)

    monkeypatch.setattr(demo, "World", partial(World, test_pairs=300))
    monkeypatch.setattr(demo, "training", training)
    assert main(["demo", "--output", str(tmp_path / "demo"), "--pairs", "500"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if " | " in line}
    world = World(train_pairs=(500,), test_pairs=300, ties=0.05)
    reached = {"uniform": [], "more": []}  # as shares of the gap, of every annotator
    for k, name in enumerate(ANNOTATORS):
        path = next((tmp_path / "demo" / "world" / "data").glob(f"{name}.test.*"))
        own, shared = (ceiling[k] for ceiling in world.ceilings(true_pairs(path)))
        expected = [f"{own:.3f}", f"{shared:.3f}"]
        for method in ("uniform", "more"):
            accuracy = report[method]["sources"][name]["accuracy"]
            reached[method].append((accuracy - 0.5) / (shared - 0.5))
            expected.append(f"{accuracy:.3f}")
        assert [rows[name][place] for place in (1, 3, 5, 8)] == expected
    assert all(np.mean(shares) > 0.7 for shares in reached.values()), reached
    assert (tmp_path / "demo" / "figures" / "weights.png").is_file() and "MORE's weights" in printed
