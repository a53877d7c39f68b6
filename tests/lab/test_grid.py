"""An experiment has the right cells; what cannot be run is refused before anything is written."""

import re

import pytest

from minimore.cli import main
from minimore.data.world import World
from minimore.lab import cells
from minimore.lab.grid import REGIMES, ReproduceOptions, cells_of, checked_cells
from minimore.lab.reproduce import FREE


def options_of(experiment, **changes):
    return ReproduceOptions(experiment=experiment, output="x", **changes)


def source_flags(paths):
    """The flags --source of a world's files."""
    return [
        flag
        for name, files in paths.items()
        for flag in ("--source", f"{name}={files[0]},{files[1]}")
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Files and a checkpoint as others have them: (directory of the model, paths by source)."""
    directory = tmp_path_factory.mktemp("real") / "world"
    world = World(annotators=("ana", "ben"), train_pairs=(20,), test_pairs=40)
    return directory / "model", world.write(directory)


# ---- cells ---------------------------------------------------------------------------------------


def test_table_2_has_the_cells_of_the_paper():
    grid = cells_of(options_of("table2"))
    assert len(grid) == 3 * 3 * (1 + 5 + 3)
    assert len({cell.name for cell in grid}) == len(grid)
    for cell in grid:
        assert len(cell.tests) == 5
        assert cell.world.seed == cell.at["seed"] == cell.options["seed"]
        if cell.at["scheme"] == "raw":
            assert not cell.sources
            continue
        pairs = cell.options["pairs_per_source"] * len(cell.sources)
        steps = pairs / cell.options["batch_size"]
        # A single model sees its own fifth of pairs and steps.
        is_single = cell.at["scheme"].startswith("single ")
        assert (len(cell.sources), steps) == ((1, 80) if is_single else (5, 400))


@pytest.mark.parametrize(
    "experiment, count",
    [
        ("regimes", 3 * len(REGIMES) * 4),
        ("sources", 3 * 4 * 2),
        ("scaling", 3 * 2 * 3 * 3 * (5 + 1)),
        ("drift", 3 * 3),
    ],
)
def test_every_experiment_has_its_cells(experiment, count):
    assert len(cells_of(options_of(experiment))) == count


def test_sources_are_added_one_by_one():
    grid = cells_of(options_of("sources", seeds=1, scheme=("more",)))
    assert [len(cell.sources) for cell in grid] == [2, 3, 4, 5]


def test_the_protocol_of_the_authors_changes_more():
    def options_of_more(protocol):
        grid = cells_of(options_of("drift", protocol=protocol))
        return next(cell.options for cell in grid if cell.at["scheme"] == "more")

    assert "lambda_scope" not in options_of_more("clean")
    authors = options_of_more("authors")
    assert (authors["lambda_scope"], authors["gradient_average"]) == ("group", 0.99)


def test_a_dry_run_prints_the_cells_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "grid"
    command = ["reproduce", "table2", "--output", str(output), "--dry-run", "--seeds", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "27 runs, 0 of them finished" in printed
    assert printed.count("to do") == 27
    assert re.search(r"(?m)^about [\d.]+ (h|min|s) on this machine", printed)
    assert not output.exists()


# ---- fingerprints --------------------------------------------------------------------------------


def test_other_files_at_the_same_place_are_noticed(tmp_path):
    world = World(annotators=("ana", "ben", "cleo"), train_pairs=(20,), test_pairs=40)
    paths, model = world.write(tmp_path / "world"), tmp_path / "world" / "model"
    options = ReproduceOptions(
        experiment="table2",
        output=str(tmp_path / "grid"),
        model=(str(model),),
        source=tuple(source_flags(paths)[1::2]),
        scheme=("uniform",),
    )

    def fingerprints():
        return [cells.fingerprint(cell) for cell in checked_cells(options)]

    before = fingerprints()
    assert before == fingerprints() and len(set(before)) == 3
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with_new_weights = fingerprints()
    assert not set(before) & set(with_new_weights)
    paths["ben"][1].write_text(paths["ana"][1].read_text())
    cells.content_digest.cache_clear()
    assert not set(with_new_weights) & set(fingerprints())


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, capsys):
    """Run `reproduce` into a new directory; the one line that refuses it."""
    output = tmp_path / "grid"

    def run(experiment, *flags):
        command = ["reproduce", experiment, "--output", str(output), *map(str, flags)]
        assert main(command) == 2, flags
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and not output.exists()
        return line

    return run


def test_models_and_sources_that_do_not_fit_are_refused(refused, real, tmp_path):
    model, paths = real
    (train, test), model_flags = paths["ana"], ("--model", model)
    assert "go together" in refused("table2", *model_flags)
    assert "no test file" in refused("table2", *model_flags, "--source", "a=b")
    assert "world only" in refused("drift", *model_flags, "--source", "a=b,c")
    assert "both training and test" in refused(
        "table2", *model_flags, "--source", f"a={train},{train}"
    )
    assert "at least two sources" in refused(
        "sources", *model_flags, "--source", f"a={train},{test}"
    )
    assert "given twice" in refused("table2", *model_flags, *model_flags, *source_flags(paths))


def test_options_out_of_range_are_refused(refused):
    assert "multiple of 8" in refused("table2", "--width", 20)
    assert "16 to 4096" in refused("table2", "--width", 8)
    assert "--width 5000: expected 16 to 4096" in refused("table2", "--width", 5000)
    assert "--seeds 0: expected 1 to 1000" in refused("table2", "--seeds", 0)
    assert "given twice" in refused("table2", "--width", 16, "--width", 16)
    for flag, value in (
        ("--pairs", 0),
        ("--test-pairs", 0),
        ("--batch-size", 0),
        ("--batch-size", 7),
        ("--learning-rate", 0),
        ("--max-length", 0),
        ("--micro-tokens", 0),
    ):
        assert flag in refused("table2", flag, value)
    refused("sources", "--batch-size", 10)
    assert "at least 8" in refused("scaling", "--pairs", 4)


def test_what_an_experiment_cannot_do_is_refused(refused):
    assert "table3: expected one of table2, regimes" in refused("table3")
    assert "expected other schemes" in refused("drift", "--scheme", "raw")
    assert "expected other schemes" in refused("drift", "--regime", "reversed")


def test_a_missing_experiment_and_a_directory_without_a_grid_are_refused(tmp_path, capsys):
    assert main(["reproduce", "--output", str(tmp_path / "grid")]) == 2
    assert "EXPERIMENT is missing" in capsys.readouterr().err
    (tmp_path / "notes.txt").touch()  # an empty directory may be what a power cut has left
    assert main(["reproduce", "table2", "--output", str(tmp_path)]) == 2
    assert "holds no grid" in capsys.readouterr().err


def test_an_experiment_may_begin_at_another_seed():
    """The same cells, of other worlds; a grid may be continued with them."""
    first = cells_of(options_of("regimes", seeds=2))
    later = cells_of(options_of("regimes", seeds=2, first_seed=2))
    assert {cell.at["seed"] for cell in first} == {0, 1}
    assert {cell.at["seed"] for cell in later} == {2, 3}
    assert len(first) == len(later) and "first_seed" in FREE
