"""Tables that compare schemes: a mean over seeds and half the width of its 95% interval a cell."""

import math
from collections.abc import Sequence

import numpy as np

from ..tables import Table
from ..uncertainty import over_seeds
from .statistics import (
    RESAMPLED_RATES,
    ByName,
    Schemes,
    SeedFigures,
    is_clear,
    is_single,
    mean_outliers,
    noise_of_pairs,
    source_of_single,
)

LONGEST_NAME = 14  # characters of a source in a header


def cell_text(values: Sequence[float] | np.ndarray, pairs: float = 0.0) -> str:
    """Mean over seeds, and half the width of its 95% interval if there are three seeds or more.

    pairs: half the width of an interval over test pairs, which is added to that over seeds. The two
    are independent, so their squares add up.
    """
    mean, half = over_seeds(values)
    half = math.hypot(0 if math.isnan(half) else half, pairs)
    return f"{mean:.3f} ± {half:.3f}" if half else f"{mean:.3f}"


def difference_text(
    values: Sequence[float] | np.ndarray, pairs: float = 0.0, may_flag: bool = True
) -> str:
    """A difference seed by seed, with its sign.

    A ! follows where there are at least three seeds and its 95% interval excludes 0, else a blank.
    """
    mean, half = over_seeds(values)
    is_flagged = may_flag and len(values) > 2 and abs(mean) > math.hypot(half, pairs)
    text = cell_text(values, pairs).replace(f"{mean:.3f}", f"{mean:+.3f}", 1)
    return text + ("!" if is_flagged else " ")


def headers_of(names: Sequence[str]) -> list[str]:
    """Names of sources as headers of columns."""
    return [name[:LONGEST_NAME] for name in names]


def shared(schemes: Schemes) -> Schemes:
    """The schemes but for the models of single sources."""
    return {scheme: rows for scheme, rows in schemes.items() if not is_single(scheme)}


def by_source(rows: list[SeedFigures], rate: str) -> np.ndarray:
    """A rate of every seed and source: (S, K)."""
    return np.array([row.rates[rate] for row in rows])


# ---- schemes -------------------------------------------------------------------------------------


def scheme_table(schemes: Schemes, names: list[str], real: bool = False) -> str:
    """Two tables with a line a scheme: accuracy by source; then ECE, and differences from uniform.

    real: seeds share their test pairs. The noise of the pairs is then added to that of seeds where
    it is known, which it is not for worst sources and NLL.
    """
    return f"{accuracy_table(schemes, names, real)}\n\n{calibration_table(schemes, names, real)}"


def accuracy_table(schemes: Schemes, names: list[str], real: bool) -> Table:
    """Accuracy of each source, their mean, and the worst source."""
    table = Table("accuracy", *headers_of(names), "mean", "worst")
    for scheme, rows in shared(schemes).items():
        accuracy = by_source(rows, "accuracy")
        noise = pair_noise(rows, names, real)["accuracy"]
        table.add(
            scheme,
            *(cell_text(column, half) for column, half in zip(accuracy.T, noise)),
            cell_text(accuracy.mean(1), half_of_mean(noise)),
            cell_text(accuracy.min(1)),
        )
    return table


def calibration_table(schemes: Schemes, names: list[str], real: bool) -> Table:
    """ECE: mean, worst source and floor; then what a scheme changes against uniform weights."""
    table = Table(
        "calibration",
        "ECE mean",
        "ECE worst",
        "floor",
        "| minus uniform: accuracy",
        "ECE less noise",
        "NLL",
    )
    base = schemes.get("uniform")
    for scheme, rows in shared(schemes).items():
        ece = by_source(rows, "ece")
        noise = pair_noise(rows, names, real)["ece less noise"]
        differences: list[str | None] = [None, None, None]
        if base and scheme != "uniform":
            differences = differences_from(base, rows, names, real)
        table.add(
            scheme,
            cell_text(ece.mean(1), half_of_mean(noise)),
            cell_text(ece.max(1)),
            f"{by_source(rows, 'floor').mean():.3f}",
            *differences,
        )
    return table


def differences_from(
    base: list[SeedFigures], rows: list[SeedFigures], names: list[str], real: bool
) -> list[str | None]:
    """Differences of mean accuracy, ECE less noise and NLL, seed by seed."""
    noise = pair_noise(rows, names, real, base)
    may_flag = {
        "accuracy": True,
        "ece less noise": is_clear(rows, base),
        "nll": not real,  # its noise of pairs is not known
    }
    texts: list[str | None] = []
    for rate, is_allowed in may_flag.items():
        half = half_of_mean(noise[rate]) if rate in noise else 0.0
        texts.append(difference_text(gaps(rows, base, rate), half, is_allowed))
    return texts


def gaps(rows: list[SeedFigures], base: list[SeedFigures], rate: str) -> list[float]:
    """The difference of a rate, its mean over sources, seed by seed."""
    return [row.mean(rate) - base_row.mean(rate) for row, base_row in zip(rows, base)]


def pair_noise(
    rows: list[SeedFigures], names: list[str], real: bool, base: Sequence[SeedFigures] = ()
) -> ByName:
    """`noise_of_pairs` where seeds share their test pairs, else none: {rate: (K,)}."""
    if real:
        return noise_of_pairs(rows, base)
    return {rate: np.zeros(len(names)) for rate in RESAMPLED_RATES}


def half_of_mean(halves: np.ndarray) -> float:
    """Half an interval of the mean over K independent sources, from those of each (K,)."""
    return float(np.sqrt((halves**2).sum()) / len(halves))


# ---- single models, and margins ------------------------------------------------------------------


def cross_table(schemes: Schemes, names: list[str]) -> Table:
    """Fig. 1: accuracy of the model trained on one source (row) on every source (column)."""
    table = Table("trained on / tested on", *headers_of(names))
    for scheme, rows in schemes.items():
        if is_single(scheme):
            columns = by_source(rows, "accuracy").T
            table.add(source_of_single(scheme), *map(cell_text, columns))
    return table


def outlier_table(schemes: Schemes) -> Table:
    """Tables 4-6: box-plot outliers of the margins; shares and means over seeds and sources."""
    table = Table("", "above: share", "mean", "below: share", "mean", "all: mean |margin|")
    for scheme, rows in shared(schemes).items():
        table.add(scheme, *(f"{figure:.3f}" for figure in mean_outliers(rows)))
    return table
