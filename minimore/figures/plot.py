"""The verb that draws a page on one run, or on several over each other, from their logs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import refuse_existing
from ..options import InputError, option, require
from .curves import MOST_RUNS, draw_page
from .history import History, read_history

PAGE = "training"  # the name of a run's own page


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """What `plot` takes."""

    run: tuple[str, ...] = option(
        (),
        repeat=True,
        positional=True,
        value="RUN",
        help="directories of runs, finished or still training; several are drawn over each other",
    )
    output: str | None = option(
        None,
        value="NAME",
        help="write NAME.png and NAME.svg (default, for one run: training.png and training.svg in "
        "the run, drawn anew every time)",
    )


def plot(options: PlotOptions) -> None:
    """Draw losses, accuracies, margins, weights, cosines, calibration errors, learning rates."""
    check_options(options)
    histories = [read_history(run) for run in options.run]
    check_same_kind(histories)
    print_missing_sources(histories)
    stem = Path(options.output) if options.output else Path(options.run[0]) / PAGE
    png, svg = draw_page(histories, stem)
    print(f"figure: {png} and {svg}")


def check_options(options: PlotOptions) -> None:
    """Refuse what cannot be drawn or written (InputError)."""
    require(
        len(options.run) <= MOST_RUNS,
        f"{len(options.run)} runs: expected at most {MOST_RUNS}, which colours can tell apart",
    )
    directories = [os.path.realpath(run) for run in options.run]
    for run, directory in zip(options.run, directories):
        require(directories.count(directory) == 1, f"{run}: is given twice; expected other runs")
    require(
        options.output is not None or len(options.run) == 1,
        "--output is missing: a page of several runs belongs to none of them; expected a NAME, of"
        " which NAME.png and NAME.svg are made",
    )
    if options.output is not None:
        require(options.output, "--output: the path is empty")
        for suffix in ("png", "svg"):
            refuse_existing(f"{options.output}.{suffix}")


def check_same_kind(histories: Sequence[History]) -> None:
    """Refuse a page of reward models and policies, whose losses cannot be compared."""
    rewards = [history.run for history in histories if history.sources]
    policies = [history.run for history in histories if not history.sources]
    if rewards and policies:
        raise InputError(
            f"{rewards[0]} trains a reward model and {policies[0]} a policy, whose losses are not"
            " comparable; draw them apart"
        )


def print_missing_sources(histories: Sequence[History]) -> None:
    """Name the sources that some runs have and others have not; the panels show those that do."""
    names = list(dict.fromkeys(name for history in histories for name in history.sources))
    for history in histories:
        missing = [name for name in names if name not in history.sources]
        if missing:
            print(f"{history.run}: has no source {', '.join(missing)}, which other runs have")
