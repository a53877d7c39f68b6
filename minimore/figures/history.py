"""History: what the log of a run says, as series over its steps.

    metrics.jsonl, a line a step                     ->  {what: a series}
    evaluation.json, validation.json when finished   ->  their values at the last step

What a series is of has three parts: the kind of pairs it was measured on, the source, and the
figure. Standard library and numpy.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import one_line, read_json
from ..options import MOST, InputError, require

KINDS = ("training", "validation", "test")
ALL = ""  # stands for all sources together
LARGEST = 1e30  # of any number in a log

OF_STEPS = ("loss", "accuracy", "margin", "weight", "head_weight")  # figures of a source in a step
# Figures of a source in a report, by what they are called in a step.
OF_REPORTS = {"loss": "nll", "accuracy": "accuracy", "margin": "mean_margin", "ECE": "ece"}
REPORTS = {"validation": "validation", "evaluation": "test"}  # keys of a record, and their kinds
UNREADABLE = (InputError, AttributeError, KeyError, TypeError)  # what a damaged record raises


class What(NamedTuple):
    """What a series is of: one of KINDS, the name of a source or ALL, and a figure."""

    kind: str
    source: str
    figure: str


class Series(NamedTuple):
    """Values over steps, both (n,); NaN where a step has no value."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self, window: int) -> np.ndarray:
        """Mean of the `window` values around each, (n,), of fewer at both ends; NaN is left out.

        >>> Series(np.arange(4), np.array([1.0, 2.0, np.nan, 6.0])).smoothed(3).tolist()
        [1.5, 1.5, 4.0, 6.0]
        """
        is_there = ~np.isnan(self.values)
        sums = np.cumsum([0.0, *np.where(is_there, self.values, 0.0)])
        counts = np.cumsum([0, *is_there])
        first = np.maximum(np.arange(len(self.values)) - window // 2, 0)
        behind = np.minimum(np.arange(len(self.values)) + window // 2 + 1, len(self.values))
        with np.errstate(invalid="ignore"):  # no value in a window: 0 / 0
            return (sums[behind] - sums[first]) / (counts[behind] - counts[first])


class History(NamedTuple):
    """The log of a run. sources: their names, none for a policy. best: the best step, if sought."""

    run: str
    steps: int
    sources: list[str]
    series: dict[What, Series]
    best: int | None

    def has(self, figure: str) -> bool:
        """Whether any series is of this figure."""
        return any(what.figure == figure for what in self.series)


def read_history(run: str) -> History:
    """Read the log of a run. Raises InputError, which names the line, if it is none."""
    path = Path(run) / "metrics.jsonl"
    require(run, "RUN: the path is empty")
    require(
        path.is_file(),
        f"{run}: is no run: it has no metrics.jsonl; expected a directory that `minimore train` or"
        " `minimore align finetune` has made",
    )
    points: dict[What, list[tuple[int, float]]] = defaultdict(list)
    last, best = 0, None
    for where, record in records_of(path):
        try:
            step = step_of(record, last)
            for what, value in figures_of(record):
                points[what].append((step, number_of(value)))
            best = record.get("best", best)
            require(best is None or type(best) is int, f'"best" is {best!r}')
        except UNREADABLE as error:
            raise InputError(
                f"{where}: is not the record of a step ({type(error).__name__}: {one_line(error)});"
                " restore the log"
            ) from None
        last = step
    require(last, f"{path}: has no step yet; expected a run that has begun to train")
    for what, value in final_figures(Path(run)):
        if not points[what] or points[what][-1][0] < last:
            points[what].append((last, value))
    series = {
        what: Series(*(np.array(column, float) for column in zip(*pairs)))
        for what, pairs in points.items()
    }
    sources = dict.fromkeys(what.source for what in series if what.source != ALL)
    return History(run, last, list(sources), series, best)


def records_of(path: Path) -> list[tuple[str, Any]]:
    """Every line of a log as JSON, with its place; a last line that is not whole is left out.

    A run that is training may be writing it.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        print(f"{path}:{len(lines)}: this last line is not whole, so it is left out")
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError):
            raise InputError(f"{path}:{number}: is not JSON; restore the log") from None
    return records


def step_of(record: Mapping[str, Any], last: int) -> int:
    """The number of a step, which comes after that of the last one."""
    step = record["step"]
    require(type(step) is int and last < step <= MOST, f'"step" is {step!r} after {last}')
    return step


def number_of(value: Any) -> float:
    """A number of a log; NaN for a missing one."""
    if value is None:
        return math.nan
    is_number = type(value) in (int, float) and abs(value) < LARGEST
    require(is_number, f"{value!r} is not a number of a log")
    return float(value)


def figures_of(record: Mapping[str, Any]) -> list[tuple[What, Any]]:
    """Every figure of a step, with what it is of."""
    figures = [
        (What("training", ALL, "loss"), record["loss"]),
        (What("training", ALL, "learning rate"), record["learning_rate"]),
    ]
    sources = record.get("sources", {})
    for source, row in sources.items():
        require(source and source.isprintable(), f"{source!r} is no name of a source")
        present = [figure for figure in OF_STEPS if figure in row]
        figures += [(What("training", source, figure), row[figure]) for figure in present]
        if len(sources) > 1:
            cosines = cosines_with(source, list(sources), record["cosines"])
            figures.append((What("training", source, "cosine"), mean_of(cosines)))
    if sources:
        accuracies = [row["accuracy"] for row in sources.values()]
        figures.append((What("training", ALL, "accuracy"), mean_of(accuracies)))
    for key, kind in REPORTS.items():
        if record.get(key):
            figures += figures_of_report(record[key], kind)
    return figures


def figures_of_report(report: Mapping[str, Any], kind: str) -> list[tuple[What, Any]]:
    """Every figure of a report on pairs of this kind, with what it is of."""
    rows = {**report["sources"], ALL: report["mean"]}
    return [
        (What(kind, source, figure), row[name])
        for source, row in rows.items()
        for figure, name in OF_REPORTS.items()
    ]


def final_figures(run: Path) -> list[tuple[What, float]]:
    """The figures of a finished run's reports, which are of its last step; none before the end."""
    figures = []
    for key, kind in REPORTS.items():
        path = run / f"{key}.json"
        if not path.is_file():
            continue
        report = read_json(path)
        try:
            figures += [(w, number_of(value)) for w, value in figures_of_report(report, kind)]
        except UNREADABLE as error:
            raise InputError(
                f"{path}: is not a report ({type(error).__name__}: {one_line(error)}); restore it"
            ) from None
    return figures


def cosines_with(source: str, names: list[str], cosines: Mapping[str, Any]) -> list[Any]:
    """The cosines of a source's head gradient with those of the others."""
    place = names.index(source)
    before = [f"{name} ~ {source}" for name in names[:place]]
    behind = [f"{source} ~ {name}" for name in names[place + 1 :]]
    return [cosines[key] for key in before + behind]


def mean_of(values: list[Any]) -> float | None:
    """The mean of those that are there; None if none is."""
    numbers = [number_of(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
