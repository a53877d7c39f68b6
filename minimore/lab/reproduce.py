"""The paper's experiments, with intervals over seeds, beside its own numbers: `minimore reproduce`.

cells      every scheme, size and seed of the experiment
run        each cell that is not finished: train, score, store margins
report     margins -> tables (report.txt), every figure (report.json), drawings
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..checksums import read_checked_json, write_checked_json
from ..data.overlap import print_overlap_of_files
from ..data.texts import Reading
from ..figures import plots
from ..files import make_directory, sweep
from ..model.checkpoint import Checkpoint
from ..options import InputError, parse_sources, require
from ..units import in_time
from .agreement import check_agreement, report_agreement, run_agreement
from .cells import is_finished, margins_of, run_timed
from .estimate import SHARE_OF_SPEED, STEP_SECONDS, estimated_seconds
from .experiments import REPORTS, every_entry
from .finished import Grid
from .grid import PROTOCOLS, Cell, ReproduceOptions, checked_cells
from .learning_curves import check_curves, report_curves, run_curves
from .neighbours import check_neighbours, report_methods, run_worlds
from .stored import write_report

# Options that leave a grid what it is. It may be continued with other values of these.
FREE = (
    "output",
    "dry_run",
    "allow_overlap",
    "device",
    "micro_tokens",
    "recompute",
    "memory",
    "seeds",
    "first_seed",
)


class OfWorlds(NamedTuple):
    """An experiment whose cells are worlds: no run directory is written.

    plan: what a seed is, in words. run: figures of all worlds, from what is stored where it is.
    """

    plan: str
    check: Callable[[ReproduceOptions], None]
    run: Callable[[ReproduceOptions, Path], Any]
    report: Callable[[ReproduceOptions, Path, Any], None]


WORLDS_ALONE = {
    "methods": OfWorlds("each in every regime", check_neighbours, run_worlds, report_methods),
    "agreement": OfWorlds(
        "each a world with four models", check_agreement, run_agreement, report_agreement
    ),
    "curves": OfWorlds("each a world", check_curves, run_curves, report_curves),
}


def reproduce(options: ReproduceOptions) -> int:
    """Plan, run and report an experiment; returns the exit code."""
    if options.experiment in WORLDS_ALONE:
        return reproduce_worlds(options)
    cells, output = checked_cells(options), Path(options.output)
    check_same_grid(options, output)
    if options.model and not options.allow_overlap:
        reading = Reading(Checkpoint(options.model[0]).tokenizer)
        print_overlap_of_files(parse_sources(options.source), reading)
    unfinished = [cell for cell in cells if not is_finished(output, cell)]
    print_plan(options, cells, unfinished)
    if options.dry_run:
        return 0
    open_output(output, "grid", identity_of(options))
    exit_code = run_cells(output, cells, unfinished)
    if exit_code == 0:
        report(options, cells, output)
    return exit_code


def reproduce_worlds(options: ReproduceOptions) -> int:
    """An experiment without training runs: every world is computed, and its figures are stored."""
    output, experiment = Path(options.output), WORLDS_ALONE[options.experiment]
    experiment.check(options)
    check_same_grid(options, output)
    print(f"{options.experiment}: {options.seed_count()} seeds, {experiment.plan}", flush=True)
    if options.dry_run:
        return 0
    open_output(output, "grid", identity_of(options))
    experiment.report(options, output, experiment.run(options, output))
    return 0


def open_output(output: Path, kind: str, identity: dict[str, Any]) -> None:
    """Make the directory, or clean up what a kill left in it; kind: see `check_stored_identity`."""
    make_directory(output)
    sweep(output)
    identity_file = output / f"{kind}.json"
    if not identity_file.exists():
        write_checked_json(identity_file, identity)


def identity_of(options: ReproduceOptions) -> dict[str, Any]:
    """The options that make a grid what it is, as grid.json holds them."""
    return options_but(FREE, options)


def options_but(free: Collection[str], options: Any) -> dict[str, Any]:
    """All options but the free ones, as a JSON file gives them back: a tuple is a list there."""
    identity = {name: value for name, value in asdict(options).items() if name not in free}
    return json.loads(json.dumps(identity))


def check_same_grid(options: ReproduceOptions, output: Path) -> None:
    """Refuse a directory that holds another grid, or something else (InputError)."""
    check_stored_identity(output, "grid", identity_of(options))


def check_stored_identity(output: Path, kind: str, wanted: dict[str, Any]) -> None:
    """Refuse a directory that holds another one of its kind, or something else (InputError).

    kind: such as "grid", of which grid.json holds the identity. wanted: that of the command.
    """
    if not output.exists():
        return
    if output.is_dir() and all(path.suffix == ".partial" for path in output.iterdir()):
        return  # no more than what a kill left of the beginning
    path = output / f"{kind}.json"
    require(
        path.is_file(),
        f"--output {output}: exists already and holds no {kind}; choose another name",
    )
    stored = read_checked_json(path)
    for name in (*wanted, *stored):
        if stored.get(name) != wanted.get(name):
            raise InputError(
                f"--output {output}: holds a {kind} with {name} {stored.get(name)!r}, not"
                f" {wanted.get(name)!r}; choose another name, or give the same options"
            )


def print_plan(
    options: ReproduceOptions, cells: Sequence[Cell], unfinished: Sequence[Cell]
) -> None:
    """Print how many cells there are and how long they will take; in a dry run also their names."""
    finished = len(cells) - len(unfinished)
    duration = in_time(estimated_seconds(options, unfinished))
    print(
        f"{options.experiment}: {len(cells)} runs, {finished} of them finished;"
        f" protocol {options.protocol}: {PROTOCOLS[options.protocol]}"
    )
    print(
        f"about {duration} on this machine, if models train at {SHARE_OF_SPEED:.0%} of the speed"
        f" of its matrix products, plus {1000 * STEP_SECONDS:.0f} ms a step"
    )
    if options.dry_run:
        for cell in cells:
            state = "to do   " if cell in unfinished else "finished"
            print(f"  {state}  {cell.name}")


def run_cells(output: Path, cells: Sequence[Cell], unfinished: Sequence[Cell]) -> int:
    """Run the cells that are not finished; returns the first exit code that is not 0, or 0."""
    for i, cell in enumerate(cells, 1):
        if cell not in unfinished:
            continue
        exit_code = run_timed(output, cell, f"[{i}/{len(cells)}] {cell.name}")
        if exit_code:
            return exit_code
    return 0


def report(options: ReproduceOptions, cells: Sequence[Cell], output: Path) -> None:
    """Print the experiment's tables, and write them, every figure and the drawings."""
    results = {cell.name: margins_of(output, cell, options.protocol) for cell in cells}
    grid = Grid(options, cells, results, output)
    text = REPORTS[options.experiment](grid)
    drawings = f", drawings to {output}/figures" if plots.available() else ""
    write_report(output, every_entry(grid), text, drawings)
