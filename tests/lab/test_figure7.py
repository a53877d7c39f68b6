"""Figure 7: its reward models, its report, and what a kill leaves of it."""

import json
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from processes import Command
from runs import use_small_design
from safetensors.numpy import load_file

from minimore.calibration import accuracy, pair_ece
from minimore.cli import main
from minimore.figures import plots
from minimore.lab import cells, testbed
from minimore.lab.alignment_figures import win_rate
from minimore.lab.association import partial, spearman
from minimore.lab.cells import margins_of
from minimore.lab.figure7 import verdict
from minimore.lab.grid import ReproduceOptions, cells_of
from minimore.lab.recipes import RECIPES
from minimore.lab.statistics import test_margins as margins_of_test_pairs

TINY = {"seeds": 2, "pairs": 32, "test_pairs": 24, "quick": True}


def command_of(output, **changes):
    words = ["reproduce", "figure7", "--output", str(output), "--quick"]
    values = {key: value for key, value in (TINY | changes).items() if key != "quick"}
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


@pytest.fixture(scope="module", autouse=True)
def small_policies():
    with pytest.MonkeyPatch.context() as patch:
        use_small_design(patch)
        yield


def report(output):
    return (output / "report.txt").read_text()


def test_there_are_a_hundred_reward_models_of_every_kind():
    grid = cells_of(ReproduceOptions(experiment="figure7", output="x"))
    assert len(grid) >= 100 and len({cell.name for cell in grid}) == len(grid)
    assert {cell.at["K"] for cell in grid} >= {2, 3, 4, 5}
    assert {cell.at["size"] for cell in grid} == {16, 32, 64}
    assert len({cell.at["regime"] for cell in grid}) >= 5
    assert any(cell.options["label_smoothing"] for cell in grid)
    for cell in grid:
        assert len(cell.sources) == cell.at["K"] and len(cell.tests) == 5
        assert cell.world.seed == cell.testbed.world.seed == cell.at["seed"]
        # All worlds of a seed share what is truly worth something, up to a factor.
        values, judged = (world.values()[0] for world in (cell.world, cell.testbed.world))
        assert abs(np.corrcoef(values, judged)[0, 1]) == pytest.approx(1)
    first_world = {cell.testbed for cell in grid if cell.at["seed"] == 0}
    assert len(first_world) == 1


def test_the_quick_cut_is_a_part_of_it():
    grid = cells_of(ReproduceOptions(experiment="figure7", output="x", quick=True))
    assert len(grid) == 3 * sum(recipe.quick for recipe in RECIPES) < 20


@pytest.mark.parametrize(
    "command, message",
    [
        (["figure7", "--scheme", "more"], "figure7: has schemes of its own"),
        (["table1", "--scheme", "more"], "table1: has schemes of its own"),
        (["figure7", "--width", "16"], "figure7: has widths of its own"),
        (["figure7", "--regime", "reversed"], "got --regime reversed"),
        (["table1", "--regime", "noise"], "got --regime noise"),
        (["figure7", "--model", "x", "--source", "a=b,c"], "figure7: exists in the world only"),
    ],
)
def test_what_they_set_themselves_is_refused(tmp_path, capsys, command, message):
    assert main(["reproduce", *command, "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_verdict_says_what_comes_out():
    assert "a lower ECE goes with a larger gain" in verdict([-0.5, -0.6, -0.55])
    assert "a lower ECE goes with a smaller gain" in verdict([0.5, 0.6, 0.55])
    assert "a larger use of the threshold" in verdict([-0.5, -0.6, -0.5], "use of the threshold")
    assert "no connection" in verdict([-0.5, 0.6, 0.1])
    assert "fewer than three worlds" in verdict([-0.9, -0.9])
    assert "too few models" in verdict([0.1, np.nan, 0.3])


def test_win_rate_counts_every_pair_of_responses():
    ours, theirs = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])
    assert win_rate(ours, theirs) == (0.5 + 1 + 1 + 1) / 4
    assert win_rate(ours, ours) == 0.5


# ---- a whole grid --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("figure7") / "whole"
    assert main(command_of(output)) == 0
    return output


@pytest.mark.slow
def test_the_report_is_what_stored_rewards_say(whole):
    options = ReproduceOptions(experiment="figure7", output=str(whole), **TINY)
    grid = cells_of(options)
    entries = json.loads((whole / "report.json").read_text())
    assert len(entries) == len(grid)
    for cell, entry in zip(grid, entries):
        assert (entry["recipe"], entry["seed"]) == (cell.at["recipe"], cell.at["seed"])
        margins = margins_of_test_pairs(margins_of(whole, cell, options.protocol)).values()
        assert entry["accuracy"] == pytest.approx(np.mean([accuracy(m) for m in margins]))
        assert entry["ece"] == pytest.approx(np.mean([pair_ece(m) for m in margins]))
        stored = load_file(cells.margins_file(whole, cell))
        bed = testbed.open_testbed(*cell.testbed, cell.design)
        sigma = bed.many.std()
        own = bed.few[np.arange(len(bed.few)), stored["few"].argmax(1)]
        assert entry["best of 4"] == pytest.approx((own.mean() - bed.few.mean()) / sigma)
        best = (bed.few.max(1).mean() - bed.few.mean()) / sigma
        assert entry["best of 4"] + entry["regret of 4"] == pytest.approx(best)
        random = testbed.controls_of(bed)["random"].rewards.mean()
        gain = (stored["policy.rewards"].mean() - random) / sigma
        assert entry["gain"] == pytest.approx(gain)
        assert entry["best of n"]["worth"][0] == 0
    assert (whole / "figures" / "figure7.png").stat().st_size > 5000


@pytest.mark.slow
def test_correlations_are_those_of_the_entries(whole):
    entries = json.loads((whole / "report.json").read_text())
    worlds = [[entry for entry in entries if entry["seed"] == seed] for seed in range(2)]

    def column(world, name):
        return [entry[name] for entry in world]

    text = report(whole)
    of_worlds = [spearman(column(w, "tau"), column(w, "gain")) for w in worlds]
    (line,) = [line for line in text.splitlines() if line.startswith("tau  ")]
    assert f"{np.mean(of_worlds):+.3f}" == line.split()[1]
    given_ece = [
        partial(*(column(w, n) for n in ("accuracy", "gain")), [column(w, "ece")]) for w in worlds
    ]
    if np.isfinite(given_ece).all():
        assert f"accuracy with gain | ece: {np.mean(given_ece):+.3f}" in text
    changes = [line for line in text.splitlines() if " of 320 " in line]
    assert len(changes) == 7
    for temperature in ("0.25", "0.5", "1", "2", "4"):
        (row,) = [line for line in changes if line.split()[0] == temperature]
        assert " 0 of 320 " in row


@pytest.mark.slow
def test_a_finished_grid_runs_nothing(whole, monkeypatch):
    before = report(whole)

    def refuse(*_):
        raise AssertionError("a finished cell is run again")

    monkeypatch.setattr(cells, "train", refuse)
    monkeypatch.setattr(cells, "chosen_for", refuse)
    assert main(command_of(whole)) == 0
    assert report(whole) == before


@pytest.mark.slow
def test_another_design_is_another_cell():
    cell, *_ = cells_of(ReproduceOptions(experiment="figure7", output="x", **TINY))
    other = replace(cell, design=replace(cell.design, samples=3))
    assert cells.fingerprint(cell) != cells.fingerprint(other)


# ---- table 1 -------------------------------------------------------------------------------------


def test_table_1_has_two_sources_and_three_widths():
    grid = cells_of(ReproduceOptions(experiment="table1", output="x", seeds=1))
    assert [cell.at["size"] for cell in grid] == [16] * 3 + [32] * 3 + [64] * 3
    for cell in grid:
        assert list(cell.sources) == list(cell.tests) == ["ana", "ben"]
        assert cell.options["batch_size"] == 32
        # With two annotators r* is the mean of both, and their drifts are opposite.
        shared, drifts = cell.testbed.world.values()
        np.testing.assert_allclose(drifts[0], -drifts[1], atol=1e-12)


@pytest.mark.slow
def test_table_1_stands_beside_the_paper(tmp_path):
    output = tmp_path / "grid"
    flags = ["--quick", "--seeds", "1", "--pairs", "32", "--test-pairs", "24"]
    assert main(["reproduce", "table1", "--output", str(output), *flags]) == 0
    entries = {entry["scheme"]: entry for entry in json.loads((output / "report.json").read_text())}
    assert entries.keys() == {"multitask", "more", "more unscaled"}
    baseline = entries["multitask"]
    n = 4  # responses to each of 20 prompts: a response meets itself once
    assert baseline["tie against multitask"] >= 1 / n
    assert baseline["win against multitask"] == baseline["lose against multitask"]
    for entry in entries.values():
        shares = [entry[f"{verdict} against multitask"] for verdict in ("win", "tie", "lose")]
        assert sum(shares) == pytest.approx(1)
        assert entry["perplexity"] == pytest.approx((entry["ppl ana"] + entry["ppl ben"]) / 2)
    text = report(output)
    (line,) = [line for line in text.splitlines() if line.startswith("16 more  ")]
    assert f"{entries['more']['win against multitask']:.3f}" in line
    assert "Pythia-2.8B MORE          65.87  0.0078        13.14         10.29" in text
    assert text.count("45/2") == 2


# ---- interruptions -------------------------------------------------------------------------------


def files_of_first_world(output):
    """All that is stored of the first world: of its models, and of its policies."""
    margins = sorted((output / "margins").glob("*-0.safetensors"))
    policies = sorted((output / "worlds" / "conflict-32-0" / "policies").iterdir())
    assert len(margins) == 4 and len(policies) == 3
    return {path.relative_to(output): path.read_bytes() for path in (*margins, *policies)}


@pytest.mark.slow
def test_a_grid_interrupted_anywhere_ends_the_same(whole, tmp_path, monkeypatch):
    """A world without its base, its samples, its controls, and a model without its policy."""
    monkeypatch.setattr(plots, "available", lambda: False)
    cut = command_of(tmp_path / "cut", seeds=1)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for module, name in (
        (testbed, "fitted"),
        (testbed, "written"),
        (cells, "chosen_for"),
        (cells, "write_tensors"),
        (testbed, "control"),
    ):
        testbed.open_testbed.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            assert main(cut) == 130
    testbed.open_testbed.cache_clear()
    assert main(cut) == 0
    assert files_of_first_world(tmp_path / "cut") == files_of_first_world(whole)
    assert "4 reward models in 1 worlds" in report(tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob("*.partial*"))


@pytest.mark.slow
def test_a_killed_grid_ends_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    cut = command_of(tmp_path / "cut", seeds=1)
    process = Command(cut, before=use_small_design)
    while process.is_running and "\n[2/" not in process.said:
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(cut) == 0
    assert files_of_first_world(tmp_path / "cut") == files_of_first_world(whole)
