"""A finished grid as points, of which none is best in everything.

    table2      a point is a scheme at a size
    methods     a point is a method, in one regime of the world, the source of a pair not known

Its criteria are means over seeds. They are signed and standardised, so that more is better and a
step of 1 is one standard deviation of the points: a taste weighs them on one scale. Seconds count
by their logarithm, since twice as long is twice as long anywhere.

P points, C criteria.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...checksums import read_checked_json
from ...files import read_json
from ...options import InputError, require
from ..grid import Cell
from ..statistics import is_single

CRITERIA = ("accuracy", "worst source", "ECE", "seconds")
SIGNS = np.array([1, 1, -1, -1])  # whether more is better

# What may go wrong in a report whose keys, types or numbers are not those of its experiment.
NOT_A_REPORT = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError),
    RuntimeWarning,
)


class Point(NamedTuple):
    """One point of a grid: what it is called, and its CRITERIA (C,) as they are printed."""

    name: str
    criteria: np.ndarray


def points_of(grid: Path, regime: str) -> list[Point]:
    """The points of a finished grid. regime: the one that is meant in a grid of methods.

    Raises InputError for a grid that is not finished, or that holds no trade-off.
    """
    report = grid / "report.json"
    require(
        report.is_file() and (grid / "grid.json").is_file(),
        f"{grid}: holds no finished grid (a report.json beside a grid.json); expected what"
        " `minimore reproduce table2 --output DIR` or `minimore reproduce methods` has made",
    )
    experiment = str(read_checked_json(grid / "grid.json").get("experiment"))
    readers = {
        "table2": lambda: table2_points(grid),
        "methods": lambda: method_points(grid, regime),
    }
    require(
        experiment in readers,
        f"{grid}: is a grid of {experiment}; expected one of {', '.join(readers)}, of which every"
        " point answers the same pairs",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of NumPy: a mean of nothing, say
            points = readers[experiment]()
        is_whole = all(np.isfinite(point.criteria).all() for point in points)
    except InputError:
        raise
    except NOT_A_REPORT:
        points, is_whole = [], False
    require(
        points and is_whole,
        f"{report}: is not a report of {experiment}; run `minimore reproduce` again, which makes"
        " it from what is stored",
    )
    return points


def table2_points(grid: Path) -> list[Point]:
    """A point for every scheme at every size, models of single sources left out."""
    rows: dict[tuple[Any, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in read_json(grid / "report.json", list):
        if not is_single(entry["scheme"]):
            rows[entry["size"], entry["scheme"]].append(entry)
    return [
        Point(
            f"{scheme}, {size}",
            np.array([*rates_of(own), seconds_of_scheme(grid, size, scheme, own[0]["accuracy"])]),
        )
        for (size, scheme), own in rows.items()
    ]


def rates_of(entries: Iterable[dict[str, Any]]) -> list[float]:
    """The first three CRITERIA: means over seeds, in which each source counts the same."""
    accuracies = np.array([list(entry["accuracy"].values()) for entry in entries])  # (S, K)
    eces = np.array([list(entry["ece"].values()) for entry in entries])
    return [accuracies.mean(), accuracies.min(1).mean(), eces.mean()]


def seconds_of_scheme(grid: Path, size: Any, scheme: str, sources: Iterable[str]) -> float:
    """Seconds of the trainings that a scheme needs, in the mean over seeds; raw needs none."""
    trained = scheme.removesuffix(" + T")  # a temperature takes no training
    if trained in ("top", "averaging", "averaging scaled"):
        return sum(seconds_of_runs(grid, size, f"single {name}") for name in sources)
    return 0.0 if trained == "raw" else seconds_of_runs(grid, size, trained)


def seconds_of_runs(grid: Path, size: Any, scheme: str) -> float:
    """Seconds of one training, in the mean over its seeds."""
    name = Cell({"size": size, "scheme": scheme}, "", {}, {}).name
    logs = (grid / "runs").glob("*/metrics.jsonl")
    own = [log for log in logs if log.parent.name.rpartition("-")[0] == name]
    require(
        own,
        f"{grid}/runs: holds no {name}-SEED/metrics.jsonl, which says how long {scheme} took;"
        " `minimore reproduce` again makes what is missing",
    )
    return float(np.mean([seconds_in(log) for log in own]))


def seconds_in(log: Path) -> float:
    """Seconds of all steps of a run.

    Every line has the time since the run began or was continued. So where the next line has no
    more, or there is none, a stretch of the run ended, and its line has the length of the stretch.
    """
    seconds = [json.loads(line)["seconds"] for line in log.read_text("utf-8").splitlines()]
    following = [*seconds[1:], 0.0]
    stretches = [now for now, later in zip(seconds, following) if later <= now]
    return float(sum(stretches))


def method_points(grid: Path, regime: str) -> list[Point]:
    """A point for every method in one regime, as it answers where the source is not known."""
    worlds = read_json(grid / "report.json")[regime]
    points = []
    for name in worlds[0]:
        if "seconds" not in worlds[0][name]:
            continue  # the truth, which nobody learned
        rates = [world[name]["unknown"] for world in worlds]
        accuracies = np.array([rate["accuracy"] for rate in rates])  # (S, K)
        ece = np.mean([rate["ece"] for rate in rates])
        seconds = np.mean([world[name]["seconds"] for world in worlds])
        criteria = [accuracies.mean(), accuracies.min(1).mean(), ece, seconds]
        points.append(Point(name, np.array(criteria)))
    return points


# ---- what there is to choose from ----------------------------------------------------------------


def pareto(points: list[Point]) -> list[Point]:
    """The points that no other one beats, by being better in one criterion and worse in none."""
    signed = [SIGNS * point.criteria for point in points]  # more is better

    def is_beaten(own: np.ndarray) -> bool:
        return any((other >= own).all() and (other > own).any() for other in signed)

    return [point for point, own in zip(points, signed) if not is_beaten(own)]


def standardised(points: list[Point]) -> np.ndarray:
    """The criteria as a taste weighs them: (P, C). A criterion that all points share is 0."""
    criteria = np.array([point.criteria for point in points], dtype=np.float64)
    seconds = CRITERIA.index("seconds")
    criteria[:, seconds] = np.log(np.maximum(criteria[:, seconds], 1e-3))  # a millisecond is free
    spread = criteria.std(0)
    return SIGNS * (criteria - criteria.mean(0)) / np.where(spread > 0, spread, 1.0)
