"""The report: how good is a reward model, how well calibrated, and how sure is that?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import calibration, uncertainty
from .data.pairs import Source
from .disagreement import disagreement
from .reward import RewardModel, pair_rewards
from .tables import Table, as_term, number, with_interval
from .uncertainty import Floor, Interval

ROUNDING = 1e-6  # margins below this are what is left of the rounding of two rewards in fp32
RATES = (
    "accuracy",
    "ece",
    "ace",
    "mce",
    "brier",
    "nll",
    "mean_margin",
    "length_accuracy",
    "random_accuracy",
)

AGAINST_SHARES = (
    "on pairs with several votes NLL and ECE are against the share of votes, and accuracy against"
    " the majority"
)
MISCALIBRATED = ("over-confident", "under-confident")  # what may be said with an interval

Margins = dict[str, np.ndarray]  # name of a source -> (N,) float64
Report = dict[str, Any]


def evaluate_sources(
    model: RewardModel, sources: Sequence[Source], micro_tokens: int = 8192
) -> tuple[Report, Margins]:
    """The report of a model on its test sources, and the margins by source.

    The report is {"sources": {name: figures}, "mean": rates, "worst": rates}; see `report_of`.
    """
    margins = {source.name: source_margins(model, source, micro_tokens) for source in sources}
    return report_of(margins, sources), margins


def source_margins(model: RewardModel, source: Source, micro_tokens: int) -> np.ndarray:
    """Margins (chosen minus rejected) of every pair of a source: (N,) float64."""
    rewards = pair_rewards(model, source.pairs, micro_tokens).double()  # (N, 2)
    return (rewards[:, 0] - rewards[:, 1]).numpy()


def report_of(margins: Mapping[str, np.ndarray], sources: Sequence[Source]) -> Report:
    """The report from margins by source.

    `mean` averages every rate over the sources, each source counting the same. `worst` has the
    lowest accuracy and the largest ECE of any source.
    """
    figures = {source.name: source_report(margins[source.name], source) for source in sources}

    def values(rate: str) -> list[float]:
        return [row[rate] for row in figures.values()]

    return {
        "sources": figures,
        "mean": {rate: float(np.mean(values(rate))) for rate in (*RATES, "ece_debiased")},
        "worst": {"accuracy": min(values("accuracy")), "ece": max(values("ece"))},
    }


def source_report(margins: np.ndarray, source: Source) -> Report:
    """All figures of one source.

    `pairs` excludes label ties. ece, ace and mce are the paper's: 10 bins, both orders of a pair.
    Intervals are 95%, and whole prompts are resampled. ece_debiased is the ECE less what noise adds
    to it; ece_floor is what it would be by noise alone.

    `calibration` is what `calibration_kind` says. ece_interval is the interval of ece_debiased; it
    is None unless the model is over- or under-confident, because a bootstrap of so small an ECE
    covers too little.

    Baselines on the same pairs: length_accuracy prefers the longer response, counted in characters;
    random_accuracy is 1/2.

    Where pairs have several votes, both accuracies are against their majority, and evenly split
    votes count one half; calibration, brier and nll are those of the shares of votes. `votes` then
    has what annotators disagree about and what the model gets wrong; see `Disagreement`.
    """
    prompts, shares = np.array([pair.prompt for pair in source.pairs]), source.shares
    votes = source.votes if (source.votes != 1).any() else None
    most = calibration.majority(shares)
    accuracy, debiased_ece = uncertainty.intervals(margins, prompts, outcomes=shares)
    floor = uncertainty.noise_floor(margins, prompts, outcomes=shares, votes=votes)
    kind = calibration_kind(margins, floor, shares)
    figures = {
        "pairs": len(margins),
        "prompts": len(np.unique(prompts)),
        "label_ties": source.label_ties,
        "identical": source.identical,
        "truncated": source.truncated,
        "blank": source.blank,
        "named": source.named,
        "dropped": source.dropped,
        "reward_ties": int((margins == 0).sum()),
        "accuracy": calibration.accuracy(margins, most),
        "accuracy_interval": ends_of(accuracy),
        "ece": calibration.pair_ece(margins, outcomes=shares),
        "ece_debiased": debiased_ece.value,
        "ece_floor": floor.mean,
        "ece_floor_high": floor.high,
        "ace": calibration.pair_ace(margins, outcomes=shares),
        "mce": calibration.pair_mce(margins, outcomes=shares),
        "brier": calibration.brier(margins, shares),
        "nll": calibration.negative_log_likelihood(margins, shares),
        "mean_margin": float(margins.mean()),
        "length_accuracy": calibration.accuracy([pair.longer for pair in source.pairs], most),
        "random_accuracy": 0.5,
        "calibration": kind,
        "ece_interval": ends_of(debiased_ece) if kind in MISCALIBRATED else None,
    }
    of_votes = disagreement(margins, shares, source.votes)
    return figures | ({"votes": of_votes._asdict()} if of_votes else {})


def calibration_kind(margins: np.ndarray, floor: Floor, shares: ArrayLike = 1.0) -> str:
    """One of MISCALIBRATED, or "indistinguishable" from calibrated, or "no margins".

    There are none where all of them are rounding. floor: of the ECE of these margins; shares: of
    votes for the chosen responses.
    """
    if np.abs(margins).max() < ROUNDING:
        return "no margins"
    if not uncertainty.is_miscalibrated(calibration.pair_ece(margins, outcomes=shares), floor):
        return "indistinguishable"
    confidence = calibration.probability(np.abs(margins)).mean()
    is_over = confidence > calibration.accuracy(margins, shares)
    return "over-confident" if is_over else "under-confident"


def is_at_chance(report: Report) -> bool:
    """Whether no accuracy is apart from 1/2: the 95% interval of every source holds it.

    Sources that are too small for an interval say nothing.
    """
    intervals = [row["accuracy_interval"] for row in report["sources"].values()]
    known = [(low, high) for low, high in intervals if low is not None]
    return bool(known) and all(low <= 1 / 2 <= high for low, high in known)


def ends_of(interval: Interval) -> list[float | None]:
    """The two ends of an interval, as JSON can hold them: None where there is no number."""
    return [None if math.isnan(end) else float(end) for end in interval[1:]]


def table(report: Report) -> str:
    """The report as text: one line a source, then the mean and the worst source.

    Where pairs have several votes, it says in front what the figures are compared with.
    """
    rows = Table(
        "source",
        "pairs",
        "prompts",
        "accuracy [95%]",
        "NLL",
        "margin",
        "longer",
        "ECE",
        "floor",
        "calibration: ECE less noise [95%]",
        left=("accuracy [95%]", "calibration: ECE less noise [95%]"),
    )
    for name, row in report["sources"].items():
        rows.add(
            name,
            row["pairs"],
            row["prompts"],
            with_interval(row["accuracy"], row["accuracy_interval"]),
            number(row["nll"]),
            number(row["mean_margin"]),
            number(row["length_accuracy"]),
            number(row["ece"]),
            number(row["ece_floor"]),
            verdict(row),
        )
    mean, worst = report["mean"], report["worst"]
    rows.add(
        "mean",
        *(None, None),
        number(mean["accuracy"]),
        number(mean["nll"]),
        number(mean["mean_margin"]),
        number(mean["length_accuracy"]),
        number(mean["ece"]),
        *(None, None),
    )
    rows.add(
        "worst",
        *(None, None),
        number(worst["accuracy"]),
        *(None, None, None),
        number(worst["ece"]),
        *(None, None),
    )
    of_votes = votes_table(report)
    return f"{AGAINST_SHARES}\n{rows}\n{of_votes}" if of_votes else str(rows)


def votes_table(report: Report) -> str:
    """What annotators disagree about and what the model gets wrong; "" without votes.

    A score is written as the model's own, then the annotators' part and the model's.
    """
    rows = Table(
        "source",
        "pairs",
        "votes",
        "annotators agree",
        "model agrees",
        "at most",
        "Brier: disagreement + model",
        "NLL: disagreement + model",
        left=("Brier: disagreement + model", "NLL: disagreement + model"),
    )
    for name, row in report["sources"].items():
        if "votes" not in row:
            continue
        figures = row["votes"]
        low, high = figures["nll_floor"]
        brier, brier_floor, nll = figures["brier"], figures["brier_floor"], figures["nll"]
        rows.add(
            name,
            figures["pairs"],
            number(figures["votes"], 1),
            number(figures["annotators_agree"]),
            number(figures["model_agrees"]),
            number(figures["ceiling"]),
            f"{number(brier)} = {number(brier_floor)} {as_term(brier - brier_floor)}",
            f"{number(nll)} = ({number(low)} to {number(high)}) + ({number(nll - high)} to"
            f" {number(nll - low)})",
        )
    if not any("votes" in row for row in report["sources"].values()):
        return ""
    return (
        "on pairs with several votes: how often two annotators agree, how often the model agrees"
        f" with one,\nand how often any rule could; what no model can avoid, and what this one"
        f" adds (below 0 by chance alone)\n{rows}"
    )


def verdict(row: Report) -> str:
    """What can be said of a source's calibration."""
    if row["calibration"] == "no margins":
        return "no margins beyond rounding: the model tells nothing apart"
    if row["ece_interval"] is None:
        return "indistinguishable from calibrated"
    return f"{with_interval(row['ece_debiased'], row['ece_interval'])} {row['calibration']}"
