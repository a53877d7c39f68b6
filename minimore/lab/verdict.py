"""Whether one method is better than another, and how sure that is.

An interval has two parts, which are independent: what another seed of the training would have
changed (Student's t over seeds), and what other test prompts would have (resampled by prompt).

S seeds, K sources, N pairs of a source.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ..calibration import pair_likelihoods
from ..tables import Table
from ..uncertainty import detectable, mean_interval, over_seeds
from .scheme_tables import by_source, cell_text, gaps, half_of_mean, pair_noise
from .statistics import Schemes, SeedFigures, is_clear

SURE = NormalDist().inv_cdf(0.975)  # standard errors in half a 95% interval
POWER = NormalDist().inv_cdf(0.8)  # standard errors beyond it, to show a difference 4 times in 5
# What a figure is called, and whether more of it is better.
FIGURES = {"accuracy": ("accuracy", True), "nll": ("NLL", False), "ece less noise": ("ECE", False)}
FEWEST_SEEDS = 3  # with which anything is said of what another seed would change


def verdict_text(schemes: Schemes, names: list[str]) -> str:
    """A table of the methods, and what each of them changes against the first.

    schemes: the seeds of every method, the first one being that with which others are compared.
    """
    (base, base_rows), *others = schemes.items()
    lines = [str(method_table(schemes, names)), ""]
    for method, rows in others:
        lines.append(f"{method} against {base}:")
        lines += [f"  {sentence(rows, base_rows, names, figure)}" for figure in FIGURES]
    seeds = len(base_rows)
    lines.append(what_intervals_are(seeds))
    if all(is_chance(rows) for rows in schemes.values()):
        lines.append(
            "No method ranks more pairs right than chance would. Look at the learning rate, the"
            " number of steps and `minimore data look`."
        )
    return "\n".join(lines)


def method_table(schemes: Schemes, names: list[str]) -> Table:
    """Accuracy by source, and the means over sources of all figures."""
    table = Table("method", *(f"acc. {name[:12]}" for name in names), "mean", "NLL", "ECE", "floor")
    for method, rows in schemes.items():
        noise = pair_noise(rows, names, real=True)["accuracy"]
        accuracy = by_source(rows, "accuracy")  # (S, K)
        table.add(
            method,
            *(cell_text(column, half) for column, half in zip(accuracy.T, noise)),
            cell_text(accuracy.mean(1), half_of_mean(noise)),
            *(f"{mean_of(rows, figure):.3f}" for figure in ("nll", "ece", "floor")),
        )
    return table


def sentence(
    rows: list[SeedFigures], base: list[SeedFigures], names: list[str], figure: str
) -> str:
    """What a method changes of a figure, whether that is clear, and what would have been."""
    word, more_is_better = FIGURES[figure]
    if figure == "ece less noise" and not is_clear(rows, base):
        return f"{word}: both near what noise alone makes of it, so not ranked"
    differences = gaps(rows, base, figure)
    of_pairs = half_of_pairs(rows, base, names, figure)
    mean, of_seeds = over_seeds(differences)
    if math.isnan(of_pairs):
        return f"{word} {mean:+.3f}; a source has one test prompt, of which there is no interval"
    if math.isnan(of_seeds):
        return f"{word} {mean:+.3f} ± {of_pairs:.3f} by test prompts alone"
    half = math.hypot(of_seeds, of_pairs)
    text = f"{word} {mean:+.3f} ± {half:.3f}"
    if abs(mean) > half:
        return f"{text}, {'better' if (mean > 0) == more_is_better else 'worse'}"
    smallest = math.hypot(detectable(differences), of_pairs * (1 + POWER / SURE))
    return f"{text}, no clear difference (one of {smallest:.3f} shows 4 times in 5)"


def half_of_pairs(
    rows: list[SeedFigures], base: list[SeedFigures], names: list[str], figure: str
) -> float:
    """Half a 95% interval of a difference, mean over sources, from other test prompts."""
    if figure == "nll":
        halves = [nll_half(rows, base, name) for name in names]
        return half_of_mean(np.array(halves))
    return half_of_mean(pair_noise(rows, names, True, base)[figure])


def nll_half(rows: Sequence[SeedFigures], base: Sequence[SeedFigures], name: str) -> float:
    """Half a 95% interval of the difference in NLL on a source, from other test prompts.

    All seeds of both methods answer the same pairs, so the loss of a pair is a mean over seeds.
    """
    losses = np.mean([pair_likelihoods(row.margins[name]) for row in rows], axis=0)  # (N,)
    base_losses = np.mean([pair_likelihoods(row.margins[name]) for row in base], axis=0)
    interval = mean_interval(losses - base_losses, rows[0].prompts[name])
    return (interval.high - interval.low) / 2


def mean_of(rows: list[SeedFigures], figure: str) -> float:
    """A figure, mean over seeds and sources."""
    return float(np.mean([row.mean(figure) for row in rows]))


def is_chance(rows: list[SeedFigures]) -> bool:
    """Whether the share of pairs that are ranked right is within two standard errors of a half."""
    pairs = sum(len(margins) for margins in rows[0].margins.values())
    return mean_of(rows, "accuracy") < 0.5 + 1 / math.sqrt(pairs)


def what_intervals_are(seeds: int) -> str:
    """What ± means with so many seeds."""
    if seeds < FEWEST_SEEDS:
        return (
            f"± is half a 95% interval over test prompts. {seeds} of {FEWEST_SEEDS} seeds that are"
            " needed to say what another training would change; give --seeds."
        )
    return f"± is half a 95% interval over {seeds} seeds and over test prompts."
