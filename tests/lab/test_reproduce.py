"""Grids run, survive kills, and report what their margins say."""

import json
import re
import signal
import time

import numpy as np
import pytest
from processes import Command

from minimore.calibration import accuracy, pair_ece
from minimore.cli import main
from minimore.data.world import World
from minimore.figures import plots
from minimore.lab import cells
from minimore.lab.cells import margins_of
from minimore.lab.grid import REGIMES, SCHEMES, ReproduceOptions, cells_of
from minimore.lab.statistics import test_margins as margins_of_test_pairs

TINY = ("--width", "16", "--pairs", "10", "--test-pairs", "24", "--batch-size", "10")
SHARED = ("uniform", "more", "group dro", "smoothing", "multitask", "more per group")


@pytest.fixture
def without_figures(monkeypatch):
    """Nothing is drawn: the whole grid has figures."""
    monkeypatch.setattr(plots, "available", lambda: False)


def report(output):
    return (output / "report.txt").read_text()


def scheme_flags(*schemes):
    return [flag for scheme in schemes for flag in ("--scheme", scheme)]


def command_of(experiment, output, *flags):
    return ["reproduce", experiment, "--output", str(output), *flags]


def lines_of(text, scheme):
    """The lines of all tables that begin with a scheme and hold numbers."""
    return [line for line in text.splitlines() if re.match(rf"{re.escape(scheme)} +[.\d]", line)]


# ---- a whole grid --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished grid: every scheme, two seeds. (its directory, its command)"""
    output = tmp_path_factory.mktemp("grid") / "whole"
    command = command_of("table2", output, "--seeds", "2", *TINY, *scheme_flags(*SCHEMES))
    assert main(command) == 0
    return output, command


@pytest.fixture(scope="module")
def stored(whole):
    """The cells of the whole grid, and their margins by scheme and seed."""
    options = ReproduceOptions(
        experiment="table2",
        output=str(whole[0]),
        seeds=2,
        width=(16,),
        pairs=10,
        test_pairs=24,
        batch_size=10,
        scheme=tuple(SCHEMES),
    )
    grid = cells_of(options)
    margins = {
        (cell.at["scheme"], cell.at["seed"]): margins_of(whole[0], cell, options.protocol)
        for cell in grid
    }
    return grid, margins


def mean_over_grid(stored, scheme, rate):
    """A rate averaged over both seeds and all sources."""
    _, margins = stored
    return np.mean(
        [rate(m) for seed in (0, 1) for m in margins_of_test_pairs(margins[scheme, seed]).values()]
    )


@pytest.mark.slow
def test_a_quarter_of_the_prompts_is_held_out(stored):
    _, margins = stored
    assert len(margins) == 2 * (5 + len(SCHEMES) - 1)
    sources = [source for model in margins.values() for source in model.values()]
    held_out = [source.prompts[~source.is_test] for source in sources]
    assert all(len(prompts) and (prompts % 4 == 0).all() for prompts in held_out)
    pairs = sum(len(source.margins) for source in sources)
    assert sum(map(len, held_out)) == pytest.approx(0.25 * pairs, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SHARED)
def test_tables_say_what_the_margins_say(whole, stored, scheme):
    accuracy_line, calibration_line, *_ = lines_of(report(whole[0]), scheme)
    by_seed = [margins_of_test_pairs(stored[1][scheme, seed]) for seed in (0, 1)]
    means = [np.mean([accuracy(margins[name]) for margins in by_seed]) for name in by_seed[0]]
    mean = mean_over_grid(stored, scheme, accuracy)
    printed = accuracy_line.removeprefix(scheme).split()
    assert printed[:6] == [f"{value:.3f}" for value in (*means, mean)]
    ece, _, _, *differences = calibration_line.removeprefix(scheme).split()
    assert ece == f"{mean_over_grid(stored, scheme, pair_ece):.3f}"
    if scheme != "uniform":
        difference = mean - mean_over_grid(stored, "uniform", accuracy)
        assert float(differences[0]) == pytest.approx(difference, abs=6e-4)


@pytest.mark.slow
def test_top_is_each_source_by_its_own_model(whole, stored):
    _, margins = stored
    own = [
        accuracy(margins_of_test_pairs(margins[f"single {name}", seed])[name])
        for seed in (0, 1)
        for name in margins["uniform", 0]
    ]
    assert f"{np.mean(own):.3f}" in lines_of(report(whole[0]), "top")[0]


@pytest.mark.slow
def test_the_report_holds_every_figure(whole, stored):
    output, _ = whole
    grid, margins = stored
    entries = {
        (entry["scheme"], entry["seed"]): entry
        for entry in json.loads((output / "report.json").read_text())
    }
    more = margins_of_test_pairs(margins["more", 1])
    assert entries["more", 1]["ece"] == {name: pair_ece(m) for name, m in more.items()}
    assert entries["top", 0]["size"] == 16
    for scheme in SHARED:
        assert all(0 < floor < 1 for floor in entries[scheme, 0]["floor"].values())
    text = report(output)
    assert "trained on / tested on" in text and "62.38* 62.64" in text
    assert (output / "figures" / "size-16.png").stat().st_size > 5000
    for cell in grid:
        if cell.sources:
            assert (output / "runs" / cell.name / "config.json").is_file()


@pytest.mark.slow
def test_a_raw_model_differs_from_seed_to_seed(whole, stored):
    first, second = (margins_of_test_pairs(stored[1]["raw", seed]) for seed in (0, 1))
    assert all(not np.array_equal(first[name], second[name]) for name in first)
    assert lines_of(report(whole[0]), "raw")


@pytest.mark.slow
def test_a_finished_grid_runs_nothing(whole, monkeypatch, without_figures):
    output, command = whole
    before = report(output)

    def refuse(*_):
        raise AssertionError("a finished cell is trained")

    monkeypatch.setattr(cells, "train", refuse)
    assert main(command) == 0
    assert report(output) == before


@pytest.mark.slow
def test_another_grid_at_the_same_place_is_refused(whole, capsys):
    assert main([*whole[1], "--test-pairs", "25"]) == 2
    error = capsys.readouterr().err
    assert "holds a grid with test_pairs 24, not 25" in error and error.count("\n") == 1


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_interrupted_anywhere_ends_with_the_same_table(
    tmp_path, monkeypatch, without_figures
):
    flags = ("--seeds", "1", *TINY[:-2], "--batch-size", "60", "--scheme", "more")
    assert main(command_of("sources", tmp_path / "whole", *flags)) == 0
    cut = command_of("sources", tmp_path / "cut", *flags)
    chance = np.random.default_rng(0)

    def interrupted_at(call, function):
        """The function, whose call of this number is interrupted."""
        calls = []

        def interrupt(*arguments, **named):
            calls.append(arguments)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return interrupt

    for name in ("write_tensors", "train", "source_margins", "random_checkpoint"):
        with monkeypatch.context() as patch:
            interrupt = interrupted_at(int(chance.integers(1, 5)), getattr(cells, name))
            patch.setattr(cells, name, interrupt)
            assert main(cut) in (0, 130)
    assert main(cut) == 0
    assert report(tmp_path / "cut") == report(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.partial*"))


@pytest.mark.slow
def test_a_killed_grid_ends_with_the_same_table(tmp_path, without_figures):
    flags = ("--seeds", "1", *TINY, *scheme_flags("uniform", "more"))
    cut, whole = (command_of("drift", tmp_path / name, *flags) for name in ("cut", "whole"))
    process = Command(cut)
    while process.is_running and "\n[1/2]" not in process.said:
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(cut) == main(whole) == 0
    text = report(tmp_path / "whole")
    assert report(tmp_path / "cut") == text
    assert "slope own drift" in text and len(lines_of(text, "more")) >= 4


# ---- the other experiments -----------------------------------------------------------------------


@pytest.fixture
def run_small(tmp_path, without_figures):
    """Run an experiment of one seed and few pairs; its report."""

    def run(experiment, *flags):
        output = tmp_path / "grid"
        small = ("--width", "16", "--pairs", "16", "--test-pairs", "24", "--seeds", "1")
        assert main(command_of(experiment, output, *small, *flags)) == 0
        return report(output)

    return run


@pytest.mark.slow
def test_regimes_have_a_table_each(run_small):
    text = run_small("regimes", *scheme_flags("uniform"))
    assert all(f"regime {regime}" in text for regime in REGIMES)


@pytest.mark.slow
def test_the_authors_fit_no_temperature(run_small):
    text = run_small("table2", "--protocol", "authors", "--quick", *scheme_flags("uniform", "more"))
    assert lines_of(text, "more") and "+ T" not in text


# ---- real files and checkpoints ------------------------------------------------------------------


def real_flags(directory, *annotators):
    """The flags --model and --source of a checkpoint and files that others wrote."""
    paths = World(annotators=annotators, train_pairs=(20,), test_pairs=40).write(directory)
    flags = ["--model", str(directory / "model")]
    for name, (train, test) in paths.items():
        flags += ["--source", f"{name}={train},{test}"]
    return flags


@pytest.mark.slow
def test_intervals_on_real_files_come_from_the_test_pairs_too(tmp_path, without_figures):
    flags = real_flags(tmp_path / "world", "ana", "ben", "cleo")
    flags += ["--seeds", "1", "--pairs", "12", *scheme_flags("uniform", "more")]
    assert main(command_of("table2", tmp_path / "grid", *flags)) == 0
    text = report(tmp_path / "grid")
    accuracy_line, calibration_line, *_ = lines_of(text, "more")
    assert accuracy_line.count("±") == 3 + 1  # every source and the mean, but not the worst
    assert calibration_line.count("±") >= 2  # ECE, and differences that pairs can change
    assert "bootstrap by prompt" in text


@pytest.mark.slow
def test_scaling_shows_the_cost_of_sharing(tmp_path, without_figures):
    flags = real_flags(tmp_path / "world", "ana", "ben")
    flags += ["--seeds", "1", "--pairs", "16"]
    assert main(command_of("scaling", tmp_path / "grid", *flags)) == 0
    text = report(tmp_path / "grid")
    rows = [line.split() for line in text.splitlines() if line.startswith("files ")]
    assert [row[1] for row in rows] == ["2", "8", "16"]
    for row in rows:
        uniform, _, top, _, cost = map(float, row[3:])
        assert cost == pytest.approx(top - uniform, abs=2e-3)
