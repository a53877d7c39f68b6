"""What stored margins say: rates of every scheme and seed, and schemes that need no training.

K sources, S seeds, N pairs of a source.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration import accuracy, fit_temperature, negative_log_likelihood, pair_ece
from ..uncertainty import CLEAR, debiased_ece, noise_floor, prompt_sums, resample
from .cells import ModelMargins
from .grid import Cell

FLOOR_REPLICATES = 100
REPORTED_RATES = ("accuracy", "ece", "ece less noise", "floor", "nll")  # in report.json
RESAMPLED_RATES = ("accuracy", "ece less noise")  # those of `uncertainty.resample`, in its order

ByName = dict[str, np.ndarray]  # name of a source -> (N,)


Results = dict[str, ModelMargins]  # name of a cell -> margins of its model


@dataclass(frozen=True, eq=False)
class SeedFigures:
    """One scheme and seed on its test pairs. rates: {rate: (K,)}, see `figures_of`."""

    margins: ByName
    prompts: ByName
    rates: ByName

    def mean(self, rate: str) -> float:
        """The mean over sources, each source counting the same."""
        return float(self.rates[rate].mean())


Schemes = dict[str, list[SeedFigures]]  # name of a scheme -> its seeds


def figures_of(margins: ByName, prompts: ByName) -> SeedFigures:
    """Accuracy, NLL, ECE, its floor and what is left of it without noise, of every source."""

    def floor(m: np.ndarray, prompts_of_source: np.ndarray) -> float:
        return noise_floor(m, prompts_of_source, replicates=FLOOR_REPLICATES).mean

    values = margins.values()
    with_prompts = [(m, prompts[name]) for name, m in margins.items()]
    rates = {
        "accuracy": np.array([accuracy(m) for m in values]),
        "nll": np.array([negative_log_likelihood(m) for m in values]),
        "ece": np.array([pair_ece(m) for m in values]),
        "ece less noise": np.array([debiased_ece(m, p) for m, p in with_prompts]),
        "floor": np.array([floor(m, p) for m, p in with_prompts]),
    }
    return SeedFigures(margins, prompts, rates)


# ---- schemes that need no training of their own --------------------------------------------------


def with_derived(models: Mapping[str, ModelMargins]) -> dict[str, ByName]:
    """Test margins of every scheme of one seed: those that were trained, and what follows of them.

    top                each source by its own single model
    averaging          the mean of the single models' margins
    averaging scaled   the same, each model's margins divided by their root mean square
    SCHEME + T         the scheme's margins divided by one temperature for all sources

    models: {scheme: margins by source}. Root mean squares and temperatures come from the held-out
    pairs. Where none are held out, root mean squares come from the test pairs, and no temperature
    is fitted.
    """
    test = {scheme: test_margins(sources) for scheme, sources in models.items()}
    held_out = {scheme: held_out_margins(sources) for scheme, sources in models.items()}
    return test | of_single_models(test, held_out) | with_temperature(test, held_out)


def test_margins(sources: ModelMargins) -> ByName:
    """Margins of the test pairs, by source."""
    return {name: margins[is_test] for name, (margins, is_test, _) in sources.items()}


def held_out_margins(sources: ModelMargins) -> np.ndarray:
    """Margins of the held-out pairs of all sources together."""
    return np.concatenate([margins[~is_test] for margins, is_test, _ in sources.values()])


def is_single(scheme: str) -> bool:
    """Whether a scheme is the model of a single source."""
    return scheme.startswith("single ")


def source_of_single(scheme: str) -> str:
    """The source on which a single model was trained."""
    return scheme.removeprefix("single ")


def of_single_models(
    test: Mapping[str, ByName], held_out: Mapping[str, np.ndarray]
) -> dict[str, ByName]:
    """The schemes top, averaging and averaging scaled; none if there is no single model."""
    singles = [scheme for scheme in test if is_single(scheme)]
    if not singles:
        return {}
    names = [source_of_single(scheme) for scheme in singles]
    scales = {}
    for scheme in singles:
        margins = held_out[scheme]
        if not len(margins):
            margins = np.concatenate(list(test[scheme].values()))
        scales[scheme] = math.sqrt(np.mean(margins**2))
    top, averaging, scaled = {}, {}, {}
    for name, own_scheme in zip(names, singles):
        top[name] = test[own_scheme][name]
        averaging[name] = np.mean([test[scheme][name] for scheme in singles], 0)
        scaled[name] = np.mean([test[scheme][name] / scales[scheme] for scheme in singles], 0)
    return {"top": top, "averaging": averaging, "averaging scaled": scaled}


def with_temperature(
    test: Mapping[str, ByName], held_out: Mapping[str, np.ndarray]
) -> dict[str, ByName]:
    """The schemes "... + T" of all shared models whose held-out pairs give a temperature."""
    tempered = {}
    for scheme, sources in test.items():
        if scheme == "raw" or is_single(scheme) or not len(held_out[scheme]):
            continue
        temperature = fit_temperature(held_out[scheme])
        if 0 < temperature < math.inf:
            tempered[f"{scheme} + T"] = {name: m / temperature for name, m in sources.items()}
    return tempered


# ---- seed by seed --------------------------------------------------------------------------------


def by_seed(cells: Sequence[Cell], results: Results, **place: Any) -> Schemes:
    """The figures of every scheme at one place of the grid, derived schemes included.

    place: values of `Cell.at`. A scheme that lacks a seed is left out.
    """
    seeds = sorted({cell.at["seed"] for cell in cells})
    schemes: Schemes = {}
    for seed in seeds:
        wanted = (place | {"seed": seed}).items()
        models = {
            cell.at["scheme"]: results[cell.name] for cell in cells if wanted <= cell.at.items()
        }
        if not models:
            continue
        any_model = next(iter(models.values()))
        prompts = {name: prompts[is_test] for name, (_, is_test, prompts) in any_model.items()}
        for scheme, margins in with_derived(models).items():
            schemes.setdefault(scheme, []).append(figures_of(margins, prompts))
    return {scheme: rows for scheme, rows in schemes.items() if len(rows) == len(seeds)}


def places_of(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The places of a grid, which differ in more than scheme and seed, in order."""
    places: list[dict[str, Any]] = []
    for cell in cells:
        place = {key: value for key, value in cell.at.items() if key not in ("scheme", "seed")}
        if place not in places:
            places.append(place)
    return places


def every_figure(cells: Sequence[Cell], results: Results) -> list[dict[str, Any]]:
    """What the tables are made of: one entry a place of the grid, scheme and seed."""
    entries = []
    for place in places_of(cells):
        for scheme, rows in by_seed(cells, results, **place).items():
            for seed, row in enumerate(rows):
                entry = place | {"scheme": scheme, "seed": seed}
                for rate in REPORTED_RATES:
                    entry[rate] = dict(zip(row.margins, row.rates[rate].tolist()))
                entries.append(entry)
    return entries


def is_clear(*schemes: list[SeedFigures]) -> bool:
    """Whether the mean ECE of any of these schemes stands clear of its floor.

    ECEs that all lie near their floors are not ranked.
    """

    def mean(rows: list[SeedFigures], rate: str) -> float:
        return float(np.mean([row.rates[rate] for row in rows]))

    return any(mean(rows, "ece") >= CLEAR * mean(rows, "floor") for rows in schemes)


def noise_of_pairs(rows: list[SeedFigures], base: Sequence[SeedFigures] = ()) -> ByName:
    """Half a 95% interval of the mean over seeds, from test pairs resampled by prompt.

    Returns {rate: (K,)}. base: rows whose mean is taken off. In the world every seed has test pairs
    of its own, so seeds show this noise. On real files they share their test pairs.
    """
    halves: dict[str, list[float]] = {rate: [] for rate in RESAMPLED_RATES}
    for name in rows[0].margins:
        samples = [prompt_sums(row.margins[name], row.prompts[name]) for row in (*rows, *base)]
        for rate, replicates in zip(RESAMPLED_RATES, resample(samples)):  # (samples, R)
            means = replicates[: len(rows)].mean(0)
            if base:
                means = means - replicates[len(rows) :].mean(0)
            low, high = np.quantile(means, [0.025, 0.975])
            halves[rate].append((high - low) / 2)
    return {rate: np.array(half) for rate, half in halves.items()}


# ---- outliers ------------------------------------------------------------------------------------


def outliers(margins: np.ndarray) -> list[float]:
    """Box-plot outliers of margins (N,), which lie beyond 1.5 interquartile ranges.

    Returns the share and the mean of those above, of those below, and the mean |margin| of all. The
    mean of no outlier is NaN.
    """
    low, high = np.quantile(margins, [0.25, 0.75])
    reach = 1.5 * (high - low)
    above, below = margins[margins > high + reach], margins[margins < low - reach]
    return [
        len(above) / len(margins),
        float(above.mean()) if len(above) else math.nan,
        len(below) / len(margins),
        float(below.mean()) if len(below) else math.nan,
        float(np.abs(margins).mean()),
    ]


def mean_outliers(rows: Iterable[SeedFigures]) -> list[float]:
    """`outliers` averaged over seeds and sources; the mean of no outlier anywhere is 0."""
    figures = np.array([outliers(m) for row in rows for m in row.margins.values()])
    return [float(np.nanmean(column)) if np.isfinite(column).any() else 0.0 for column in figures.T]
