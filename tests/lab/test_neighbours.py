"""The neighbours' table: its pairs are the world's, its figures the methods'; kills cost none."""

import json

import numpy as np
import pytest
import torch

import minimore.lab.neighbours as neighbours
from minimore.calibration import accuracy, negative_log_likelihood, probability
from minimore.cli import main
from minimore.data.forms import Pair
from minimore.data.world import WORDS, World
from minimore.lab.grid import REGIMES
from minimore.lab.methods.by_name import METHODS
from minimore.lab.word_counts import counted_pairs

FEW = {name: METHODS[name] for name in ("shared", "own")}
TINY = ("--seeds", "2", "--pairs", "60", "--test-pairs", "50")


def text_of(state, words):
    """The words that a state counts."""
    counts = (state * np.sqrt(words / len(WORDS))).round().astype(int)
    return " ".join(" ".join([word] * count) for word, count in zip(WORDS, counts) if count)


@pytest.mark.parametrize("regime", ["conflict", "noise", "reversed", "revealed"])
def test_counted_pairs_are_valued_as_the_world_values_them(regime):
    world = World(**REGIMES[regime], seed=3)
    counted = counted_pairs(world, [12] * 5, 0)
    chosen, rejected = counted.states.chosen.numpy(), counted.states.rejected.numpy()
    pairs = [Pair("", text_of(a, 14), text_of(b, 14)) for a, b in zip(chosen, rejected)]
    assert all(len(pair.chosen.split()) == len(pair.rejected.split()) == 14 for pair in pairs)
    betas = np.broadcast_to(world.decisiveness, 5)
    assert np.allclose(counted.log_odds, betas * world.true_margins(pairs), atol=1e-9)
    prompts = counted.states.prompt.numpy()
    assert all(len(text_of(prompt[:40], 6).split()) == 6 for prompt in prompts)
    names = np.eye(5)[counted.states.source.numpy()] * world.reveal
    assert np.array_equal(prompts[:, 40:], names)
    again, other = (counted_pairs(world, [12] * 5, part).states.chosen for part in (0, 1))
    assert torch.equal(again, counted.states.chosen) and not torch.equal(other, again)


def test_labels_are_drawn_from_the_annotators_probability_and_ties_are_left_out():
    world = World(**REGIMES["ties"], seed=1)
    counted = counted_pairs(world, [4000] * 5, 0)
    source = counted.states.source.numpy()
    share = len(source) / 20000
    assert share == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 20000))
    own = counted.log_odds[np.arange(len(source)), source]
    likelier = probability(np.abs(own))  # that the likelier side is chosen
    spread = np.sqrt(np.sum(likelier * (1 - likelier)))
    assert np.sum(own > 0) == pytest.approx(likelier.sum(), abs=4 * spread)


# ---- the experiment ------------------------------------------------------------------------------


@pytest.fixture
def run_few(monkeypatch, tmp_path):
    """Run the experiment with few methods, regimes and pairs; its directory."""
    monkeypatch.setattr(neighbours, "METHODS", FEW)
    monkeypatch.setattr(neighbours, "WEIGHTINGS", {"uniform": None})
    monkeypatch.setattr(neighbours, "REGIMES", {name: REGIMES[name] for name in ("mild", "sizes")})

    def run(name, *flags):
        output = tmp_path / name
        return main(["reproduce", "methods", "--output", str(output), *TINY, *flags]), output

    return run


def without_seconds(path):
    """The figures of a report, but for how long they took."""
    report = json.loads(path.read_text())
    for worlds in report.values():
        for of_method in (figures for world in worlds for figures in world.values()):
            of_method.pop("seconds", None)
    return report


def test_the_table_holds_what_the_methods_answer(run_few, capsys):
    code, output = run_few("whole")
    assert code == 0
    world = World(**{**REGIMES["sizes"], "train_pairs": (60, 18, 6, 2, 2)}, test_pairs=50, seed=1)
    train, test = counted_pairs(world, [60, 18, 6, 2, 2], 0), counted_pairs(world, [50] * 5, 1)
    stored = json.loads((output / "report.json").read_text())["sizes"][1]
    assert list(stored) == ["truth", "uniform", *FEW]
    parameters = FEW["own"].fit(train.states, 1)
    for reading, knows_source in (("unknown", False), ("known", True)):
        margins = FEW["own"].margins(parameters, test.states, knows_source).numpy()
        by_source = margins.reshape(5, 50)
        figures = stored["own"][reading]
        assert figures["accuracy"] == [accuracy(m) for m in by_source]
        assert figures["nll"] == [negative_log_likelihood(m) for m in by_source]
    assert stored["own"]["parameters"] == 200 and "known" not in stored["uniform"]
    own = test.log_odds[np.arange(250), test.states.source.numpy()].reshape(5, 50)
    assert stored["truth"]["known"]["accuracy"] == [accuracy(m) for m in own]
    text = (output / "report.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    for line in ("accuracy by regime", "NLL by regime", "regime mild", "regime sizes"):
        assert line in text.splitlines()
    assert text.count("own, source known") == 4


def test_a_killed_table_goes_on_and_a_damaged_world_is_made_again(run_few, monkeypatch):
    _, whole = run_few("whole")
    made, figures_of_world = [], neighbours.figures_of_world

    def interrupted(world, seed):
        if len(made) == 3:  # of four worlds
            raise KeyboardInterrupt
        made.append(seed)
        return figures_of_world(world, seed)

    monkeypatch.setattr(neighbours, "figures_of_world", interrupted)
    code, cut = run_few("cut")
    assert code == 130 and sorted(path.name for path in (cut / "worlds").iterdir()) == [
        "mild-0.json",
        "mild-1.json",
        "sizes-0.json",
    ]
    (cut / "worlds" / "mild-1.json").write_text("{")
    before = (cut / "worlds" / "sizes-0.json").read_bytes()
    monkeypatch.setattr(neighbours, "figures_of_world", figures_of_world)
    assert run_few("cut")[0] == 0
    assert (cut / "worlds" / "sizes-0.json").read_bytes() == before
    assert without_seconds(cut / "report.json") == without_seconds(whole / "report.json")


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--scheme", "more"), "expected no --scheme"),
        (("--regime", "noise"), "expected no --scheme, --width, --regime"),
        (("--model", "x", "--source", "a=b,c"), "exists in the world only"),
        (("--seeds", "0"), "--seeds 0"),
    ],
)
def test_what_the_experiment_sets_itself_is_refused(run_few, capsys, flags, words):
    code, output = run_few("refused", *flags)
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and not output.exists()


def test_a_dry_run_writes_nothing_and_another_table_is_refused(run_few, capsys):
    code, output = run_few("dry", "--dry-run")
    assert code == 0 and not output.exists()
    assert "2 seeds" in capsys.readouterr().out
    assert run_few("dry", "--seeds", "1")[0] == 0
    code, _ = run_few("dry", "--pairs", "70")
    assert code == 2 and "holds a grid with pairs 60, not 70" in capsys.readouterr().err
