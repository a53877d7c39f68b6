"""What each experiment reports: a text of tables, and drawings if matplotlib is installed.

A finished grid goes in; `REPORTS` names the function of each experiment.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..checksums import read_checked_json
from ..figures import plots
from ..tables import Table
from ..uncertainty import detectable, over_seeds
from . import figure7, learned, published, table1
from .cells import drift_file
from .finished import Curves, Grid, notes
from .grid import REGIMES
from .scheme_tables import (
    by_source,
    cell_text,
    cross_table,
    difference_text,
    gaps,
    outlier_table,
    scheme_table,
    shared,
)
from .statistics import Schemes, every_figure, is_single

# ---- Table 2 -------------------------------------------------------------------------------------


def report_table2(grid: Grid) -> str:
    """Table 2, the cross-source matrix, the outliers of margins, and the paper's numbers."""
    parts = [notes(grid.options)]
    for (size,) in grid.values("size"):
        schemes = grid.schemes_at(size=size)
        table = scheme_table(schemes, grid.names, real=bool(grid.options.model))
        if grid.options.seed_count() > 2 and {"more", "uniform"} <= set(schemes):
            table += "\n" + detectable_text(schemes, grid.options.seed_count())
        parts += [f"size {size}", table]
        if any(map(is_single, schemes)):
            title = "cross-source accuracy of the single models (Fig. 1)"
            parts.append(f"{title}\n{cross_table(schemes, grid.names)}")
        title = "box-plot outliers of the margins (Tables 4-6)"
        parts.append(f"{title}\n{outlier_table(schemes)}")
        if plots.available():
            label = str(size).replace("/", "_")  # the size of a real model is its path or hub name
            draw_schemes(grid, f"size-{label}", shared(schemes))
    parts.append(published.table_2())
    return "\n\n".join(parts)


def detectable_text(schemes: Schemes, seeds: int) -> str:
    """The smallest differences between more and uniform that so many seeds would show."""
    accuracy, ece = (
        detectable(gaps(schemes["more"], schemes["uniform"], rate))
        for rate in ("accuracy", "ece less noise")
    )
    return (
        f"smallest difference between more and uniform that {seeds} seeds would show:"
        f" accuracy {accuracy:.3f}, ECE {ece:.3f}"
    )


def draw_schemes(grid: Grid, label: str, schemes: Schemes) -> None:
    """Accuracy and ECE of every scheme, and box plots of its margins over all seeds."""
    rates: dict[str, dict] = {}  # scheme -> rate -> (mean, half its interval) of each source
    margins: dict[str, dict] = {name: {} for name in grid.names}  # source -> scheme -> all margins
    for scheme, rows in schemes.items():  # one row a seed
        rates[scheme] = {}
        for rate in ("accuracy", "ece"):
            seeds_of_sources = by_source(rows, rate).T  # (K, S)
            rates[scheme][rate] = [over_seeds(seeds) for seeds in seeds_of_sources]
        for name in grid.names:
            margins[name][scheme] = np.concatenate([row.margins[name] for row in rows])
    directory = grid.output / "figures"
    plots.draw_schemes(rates, grid.names, directory / f"{label}.png")
    plots.draw_boxes(margins, directory / f"{label}-margins.png")


# ---- regimes, sources, scaling -------------------------------------------------------------------


def report_regimes(grid: Grid) -> str:
    """Where the weights matter: one block a regime."""
    parts = [notes(grid.options)]
    for regime, fields in REGIMES.items():
        described = ", ".join(f"{field} {value}" for field, value in fields.items())
        parts.append(f"regime {regime}: {described or 'the defaults'}")
        parts.append(scheme_table(grid.schemes_at(regime=regime), grid.names))
    return "\n\n".join(parts)


def report_sources(grid: Grid) -> str:
    """Fig. 6: ECE and accuracy on the first two sources by the number of sources."""
    table = Table(
        "K",
        "scheme",
        "ECE of the first two",
        "accuracy of the first two",
        "mean accuracy",
        left=("scheme",),
    )
    curves: Curves = {}
    for (K,) in grid.values("K"):
        for scheme, rows in shared(grid.schemes_at(K=K)).items():
            ece = by_source(rows, "ece")[:, :2].mean(1)
            accuracy = by_source(rows, "accuracy")
            table.add(
                K,
                scheme,
                cell_text(ece),
                cell_text(accuracy[:, :2].mean(1)),
                cell_text(accuracy.mean(1)),
            )
            curves.setdefault(scheme, []).append((K, *over_seeds(ece)))
    grid.draw_curves("sources", curves, "sources K", "ECE of the first two sources")
    return f"{notes(grid.options, with_pairs=False)}\n\n{table}"


def report_scaling(grid: Grid) -> str:
    """What sharing one model costs, by regime, pairs and size.

    The cost is the accuracy of each source's own model minus that of the shared one, after as many
    steps and with the same pairs of that source. Below 0 the other sources' pairs help more than
    their tastes hurt.
    """
    table = Table(
        *("regime", "pairs", "size"),
        *("uniform: accuracy", "ECE", "top: accuracy", "ECE", "cost of sharing"),
    )
    curves: Curves = {}
    for regime, pairs, size in grid.values("regime", "pairs", "size"):
        schemes = grid.schemes_at(regime=regime, pairs=pairs, size=size)
        cells = [
            cell_text(by_source(schemes[scheme], rate).mean(1)) if scheme in schemes else "-"
            for scheme in ("uniform", "top")
            for rate in ("accuracy", "ece")
        ]
        cost_text = "-"
        if {"uniform", "top"} <= set(schemes):
            cost = gaps(schemes["top"], schemes["uniform"], "accuracy")
            cost_text = difference_text(cost)
            curves.setdefault(f"{regime}, {size}", []).append((pairs, *over_seeds(cost)))
        table.add(regime, pairs, size, *cells, cost_text)
    grid.draw_curves("scaling", curves, "training pairs a source", "cost of sharing (accuracy)")
    return (
        f"{notes(grid.options, with_pairs=False)}\n\n"
        "cost of sharing: each source's own model (all its pairs, as many steps) minus the shared"
        f" model; below 0 where other sources' pairs help\n{table}"
    )


# ---- drift ---------------------------------------------------------------------------------------


def report_drift(grid: Grid) -> str:
    """What the models' rewards consist of, over training: see `DriftWatch`."""
    table = Table(
        *("scheme", "steps", "slope r*", "slope own drift"),
        *("share r*", "share drift", "share other"),
    )
    curves: Curves = {}
    for size, scheme in grid.values("size", "scheme"):
        for step, figures in drift_over_training(grid, size, scheme):
            table.add(scheme, step, *map(cell_text, figures.T))
            curves.setdefault(scheme, []).append((step, *over_seeds(figures[:, 3])))
    grid.draw_curves("drift", curves, "step", "share of drift in the margins")
    return (
        f"{notes(grid.options, with_pairs=False)}\n\n"
        "slopes of the margins on r* and on each annotator's own drift, and shares of their mean"
        " square, on 300 test pairs of each, which by chance give drift about 1% of what is"
        f" neither\n{table}"
    )


def drift_over_training(grid: Grid, size: Any, scheme: str) -> list[tuple[int, np.ndarray]]:
    """The steps at which the runs of a scheme were watched, and their five figures: (S, 5)."""
    runs = [
        read_checked_json(drift_file(grid.output, cell))["points"]
        for cell in grid.cells
        if (cell.at["size"], cell.at["scheme"]) == (size, scheme)
    ]
    figures_by_step = []
    for points in zip(*runs):
        figures = np.array([point["mean"] for point in points], dtype=float)  # None becomes NaN
        figures_by_step.append((points[0]["step"], figures))
    return figures_by_step


REPORTS: dict[str, Callable[[Grid], str]] = {
    "table2": report_table2,
    "regimes": report_regimes,
    "sources": report_sources,
    "scaling": report_scaling,
    "drift": report_drift,
    "figure7": figure7.report_figure7,
    "table1": table1.report_table1,
    "policies": learned.report_policies,
}

# Of experiments whose figures are not those of margins alone.
ENTRIES: dict[str, Callable[[Grid], list[dict[str, Any]]]] = {
    "figure7": figure7.every_figure,
    "table1": table1.every_figure,
    "policies": learned.every_figure,
}


def every_entry(grid: Grid) -> list[dict[str, Any]]:
    """Every figure, as report.json holds it."""
    own = ENTRIES.get(grid.options.experiment)
    return own(grid) if own else every_figure(grid.cells, grid.results)
