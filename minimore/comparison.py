"""Two models on the same pairs, and one model at another temperature."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from . import calibration, uncertainty
from .data.pairs import Source
from .options import require
from .report import Margins, Report, ends_of
from .tables import Table, number, with_interval

# The figures that are compared, with their keys in a report.
FIGURES = {"accuracy": "accuracy", "nll": "nll", "ece": "ece_debiased"}
NAMES = {"nll": "NLL", "ece": "ECE"}  # where they are not called by their keys

# ---- two models ----------------------------------------------------------------------------------


def compare(
    margins: Mapping[str, np.ndarray],
    sources: Sequence[Source],
    baseline: Mapping[str, np.ndarray],
    baseline_sources: Sequence[Source],
) -> Report:
    """Per source, this model minus the baseline on the pairs that both could use.

    Two models may read a file differently: their tokenizers cut other texts. `exceeds_noise` names
    the figures whose difference does. Raises InputError for a source without a common pair.
    """
    differences = {}
    for source, baseline_source in zip(sources, baseline_sources):
        name = source.name
        mine, theirs = places_of_common_pairs(source, baseline_source)
        prompts = np.array([source.pairs[place].prompt for place in mine])
        differences[name] = difference(
            margins[name][mine],
            baseline[name][theirs],
            prompts,
            source.shares[mine],
            source.votes[mine],
        )
    return differences


def places_of_common_pairs(source: Source, other: Source) -> tuple[list[int], list[int]]:
    """Where the pairs that both have stand in each, in the order of their file."""
    place = {pair.index: place for place, pair in enumerate(source.pairs)}
    other_place = {pair.index: place for place, pair in enumerate(other.pairs)}
    common = sorted(place.keys() & other_place.keys())
    require(common, f"source {source.name!r}: no pair that both models can use")
    return [place[index] for index in common], [other_place[index] for index in common]


def difference(
    margins: np.ndarray,
    baseline: np.ndarray,
    prompts: np.ndarray,
    shares: np.ndarray,
    votes: np.ndarray,
) -> Report:
    """Accuracy, NLL and ECE of margins (N,) minus those of baseline, with paired intervals.

    ece_interval is None where both lie near the floor: two such ECEs are not ranked.
    """
    accuracy, ece = uncertainty.difference_intervals(margins, baseline, prompts, outcomes=shares)
    both = (margins, baseline)
    mine, theirs = (calibration.pair_likelihoods(m, shares) for m in both)
    nll = uncertainty.mean_interval(mine - theirs, prompts)
    my_ece, their_ece = (calibration.pair_ece(m, outcomes=shares) for m in both)
    my_floor, their_floor = (
        uncertainty.noise_floor(m, prompts, outcomes=shares, votes=votes) for m in both
    )
    eces, floors = (my_ece, their_ece), (my_floor, their_floor)
    one_is_clear = any(map(uncertainty.is_miscalibrated, eces, floors))
    exceeds_noise = {
        "accuracy": accuracy.excludes_zero,
        "nll": nll.excludes_zero,
        "ece": uncertainty.may_rank(ece, eces, floors),
    }
    return {
        "pairs": len(margins),
        "accuracy": accuracy.value,
        "accuracy_interval": ends_of(accuracy),
        "nll": nll.value,
        "nll_interval": ends_of(nll),
        "ece_debiased": ece.value,
        "ece_interval": ends_of(ece) if one_is_clear else None,
        "exceeds_noise": [name for name, exceeds in exceeds_noise.items() if exceeds],
    }


def mean_difference(differences: Report) -> Report:
    """The mean over sources of what `compare` found, whose prompts are independent.

    Half an interval is the root of the sum of the squares of the sources' halves, over their
    number. There is none where a source has none, and for the ECE where a source's two are not
    ranked.
    """
    rows = list(differences.values())
    mean: Report = {"pairs": sum(row["pairs"] for row in rows), "exceeds_noise": []}
    for figure, key in FIGURES.items():
        value = float(np.mean([row[key] for row in rows]))
        ends = [row[f"{figure}_interval"] for row in rows]
        mean |= {key: value, f"{figure}_interval": None}
        if all(both is not None and None not in both for both in ends):
            half = math.hypot(*((high - low) / 2 for low, high in ends)) / len(rows)
            mean[f"{figure}_interval"] = [value - half, value + half]
            if abs(value) > half:
                mean["exceeds_noise"].append(figure)
    return mean


def comparison_table(differences: Report, baseline: str) -> str:
    """What `compare` found, as text. baseline: the name of the other model."""
    aligned_left = ("accuracy [95%]", "NLL [95%]", "ECE less noise [95%]", "exceeds noise")
    rows = Table("source", "pairs", *aligned_left, left=aligned_left)
    lines = dict(differences)
    if len(differences) > 1:
        lines["mean"] = mean_difference(differences)
    for name, row in lines.items():
        texts = [
            difference_text(row[key], row[f"{figure}_interval"], figure)
            for figure, key in FIGURES.items()
        ]
        exceeds = " and ".join(NAMES.get(figure, figure) for figure in row["exceeds_noise"])
        rows.add(name, row["pairs"], *texts, exceeds or "nothing")
    return (
        f"minus {baseline}, on the same pairs (at 95%, one in 20 differences that are only noise"
        f" seems to exceed it):\n{rows}"
    )


def difference_text(value: float, interval: list | None, figure: str) -> str:
    """A difference with its interval; a word where an ECE has none."""
    if interval is not None:
        return with_interval(value, interval)
    return "both near the floor" if figure == "ece" else number(value)


# ---- temperature ---------------------------------------------------------------------------------


def temperatures(
    margins: Margins, held_out: Margins, shares: Margins, held_out_shares: Margins
) -> Report:
    """Temperatures fitted on held-out margins, and what they do to the test sources.

    margins, held_out: {source: (N,)}, and the shares of votes for their chosen responses. One
    temperature is fitted for each held-out source, and one for all of them. A temperature changes
    no ranking, so no accuracy. Where the held-out pairs leave none (they are separable, or not
    informative) it is None, and so is what would follow.
    """
    names = list(held_out)
    pooled = usable_temperature(
        np.concatenate([held_out[name] for name in names]),
        np.concatenate([held_out_shares[name] for name in names]),
    )
    own = {name: usable_temperature(held_out[name], held_out_shares[name]) for name in names}
    sources = {}
    for name, values in margins.items():
        sources[name] = {
            "temperature": own.get(name),
            **figures_at(values, shares[name], 1.0),
            "by_pooled": figures_at(values, shares[name], pooled),
            "by_own": figures_at(values, shares[name], own.get(name)),
        }
    return {"pooled": pooled, "sources": sources}


def usable_temperature(margins: np.ndarray, shares: np.ndarray) -> float | None:
    """The fitted temperature, or None if it is 0 or infinite."""
    temperature = calibration.fit_temperature(margins, shares)
    return temperature if 0 < temperature < math.inf else None


def figures_at(margins: np.ndarray, shares: np.ndarray, temperature: float | None) -> Report:
    """ECE and NLL of margins (N,) divided by a temperature; None without one."""
    if temperature is None:
        return {"ece": None, "nll": None}
    scaled = margins / temperature
    return {
        "ece": calibration.pair_ece(scaled, outcomes=shares),
        "nll": calibration.negative_log_likelihood(scaled, shares),
    }


def temperature_table(report: Report) -> str:
    """The temperatures as text."""
    rows = Table(
        "source",
        "own T",
        "ECE: as is",
        "one T",
        "own T",
        "NLL: as is",
        "one T",
        "own T",
    )
    for name, row in report["sources"].items():
        versions = (row, row["by_pooled"], row["by_own"])
        rows.add(
            name,
            or_none(row["temperature"]),
            *(or_none(version["ece"]) for version in versions),
            *(or_none(version["nll"]) for version in versions),
        )
    text = f"temperature fitted on held-out pairs; one for all: {or_none(report['pooled'])}\n{rows}"
    own = [row["temperature"] for row in report["sources"].values()]
    if None not in (report["pooled"], *own):
        return text
    return f"{text}\nnone: no such pairs were given, or they are separable, or not informative"


def or_none(value: float | None) -> str:
    """A number, or the word none."""
    return number(value, missing="none")
