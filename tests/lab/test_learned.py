"""`reproduce policies`: how policies learn in the world, what they are worth, and the report."""

import json

import numpy as np
import pytest
import torch

from minimore.cli import main
from minimore.data.world import World
from minimore.lab import learners
from minimore.lab.cells import fingerprint
from minimore.lab.grid import ReproduceOptions, cells_of
from minimore.lab.learned import figures_of
from minimore.lab.learners import LEARNINGS, Worth, learner_worth, training_pairs
from minimore.lab.policies import Design, Fitting
from minimore.lab.recipes import CHOOSER, LEARNERS
from minimore.lab.testbed import open_testbed

WORLD = World(annotators=("ana", "ben", "cleo"), train_pairs=(12,), test_pairs=6, conflict=0.6)
TINY = Design(
    base=Fitting(12, 10, 5e-3),
    tuning=Fitting(2, 10, 2e-3),
    prompts=12,
    samples=2,
    curve_prompts=2,
    curve_samples=2,
    test_prompts=6,
    test_samples=2,
    preferred=2,
)


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    home = tmp_path_factory.mktemp("world") / "home"
    WORLD.write(home)
    return open_testbed(home, WORLD, TINY)


# ---- cells ---------------------------------------------------------------------------------------


def test_a_seed_has_a_cell_for_every_learner():
    grid = cells_of(ReproduceOptions(experiment="policies", output="x", seeds=2))
    assert [cell.learner for cell in grid] == [*LEARNERS] * 2
    assert len({cell.name for cell in grid}) == len({fingerprint(cell) for cell in grid}) == 20
    assert set(LEARNINGS) < set(LEARNERS)
    for cell in grid:
        assert bool(cell.sources) == bool(cell.tests) == (cell.learner == CHOOSER)
        assert cell.testbed.world.train_pairs == (800,) and cell.world == cell.testbed.world


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner, responses", [("dpo", 2), ("mrpo", 2), ("bapo", 3), ("spo", 4)])
def test_every_annotator_has_its_pairs_in_turn(testbed, learner, responses):
    items, source = training_pairs(testbed, learner)
    assert source == [0, 1, 2] * 12
    plain, _ = training_pairs(testbed, "dpo")
    for item, other in zip(items, plain, strict=True):
        assert len(item.responses) == responses
        assert item.prompt == other.prompt and item.responses[:2] == other.responses


@pytest.mark.slow
def test_what_learners_are_worth(testbed, monkeypatch):
    """The base has gained and forgotten nothing, and every other has moved, each elsewhere."""
    monkeypatch.setattr(learners, "PAIRS_A_STEP", 9)
    worths = {name: learner_worth(testbed, name) for name in LEARNERS if name != CHOOSER}
    base = worths["base"]
    assert base.shared.shape == (6, 2) and base.annotators.shape == (6, 2, 3)
    assert base.kl == 0 and base.forgotten == 0
    moved = {name: worth.forgotten for name, worth in worths.items() if name != "base"}
    assert all(abs(value) > 1e-6 for value in moved.values()), moved
    assert len(set(moved.values())) == len(moved)
    np.testing.assert_allclose(base.annotators.mean(2), base.shared, atol=1e-6)  # drifts cancel


def test_steps_of_no_length_change_nothing(testbed, monkeypatch):
    monkeypatch.setattr(learners, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(learners, "PAIRS_A_STEP", 18)
    base = learner_worth(testbed, "base")
    for name, worth in ((name, learner_worth(testbed, name)) for name in ("dpo", "bapo")):
        assert worth.kl == 0 and worth.forgotten == 0, name
        assert np.array_equal(worth.shared, base.shared)


# ---- the report ----------------------------------------------------------------------------------


def test_figures_are_gains_over_the_base():
    rewards = np.array([[[1.0, 5.0], [3.0, 1.0]], [[2.0, 2.0], [2.0, 0.0]]])  # (P, n, K)
    base = Worth(rewards.mean(2), rewards, 0.0, 0.0, 9.0)
    better = rewards + np.array([2.0, -1.0])
    worth = Worth(better.mean(2), better, 0.5, 0.25, 10.0)
    figures = figures_of(worth, base, sigma=0.5)
    assert figures["r*"] == pytest.approx(0.5 / 0.5)
    assert figures["worst annotator"] == pytest.approx(-1 / 0.5)
    assert (figures["KL from base"], figures["forgotten"], figures["tokens"]) == (0.5, 0.25, 10.0)
    stored = Worth.of_tensors(worth.tensors())
    assert np.array_equal(stored.annotators, better) and stored[2:] == worth[2:]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--scheme", "more"], "policies: has schemes of its own"),
        (["--width", "16"], "policies: has widths of its own"),
        (["--model", "x", "--source", "a=b,c"], "policies: exists in the world only"),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, said):
    assert main(["reproduce", "policies", "--output", str(tmp_path / "x"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_whole_experiment_in_small(tmp_path, capsys):
    """Twice: the second time nothing is left to do, and the report is the same."""
    output = tmp_path / "grid"
    words = ["reproduce", "policies", "--output", str(output), "--quick", "--seeds", "1"]
    words += ["--pairs", "40", "--test-pairs", "24"]
    assert main(words) == 0
    report = (output / "report.txt").read_text()
    for learner in LEARNERS:
        assert f"\n{learner} " in report
    entries = json.loads((output / "report.json").read_text())
    assert [entry["learner"] for entry in entries] == list(LEARNERS)
    assert entries[0]["r*"] == entries[0]["forgotten"] == 0
    assert torch.tensor([entry["forgotten"] for entry in entries[1:]]).abs().min() > 0
    capsys.readouterr()
    assert main(words) == 0
    assert "10 runs, 10 of them finished" in capsys.readouterr().out
    assert (output / "report.txt").read_text() == report
