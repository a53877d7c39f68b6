"""How sure are we? Bootstrap intervals by prompt, a debiased ECE, and the noise floor that any ECE stands on. numpy only.

Pairs of one prompt are not independent, so whole prompts are drawn. An ECE is a sum of absolute values, so noise only adds to
it: on 2,300 pairs a perfectly calibrated model shows about .015, on 130 about .06. Nothing below twice that floor is called
miscalibrated here, and no two ECEs are ranked that both lie below it.

N pairs, G prompts, M bins, R bootstrap replicates.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from .calibration import probability

REPLICATES = 1000
BLOCK = 2**22  # numbers of one block of bootstrap weights
CLEAR = 2.0  # times the floor, from which an ECE counts as miscalibration


class Interval(NamedTuple):
    """An estimate with the ends of its 95% interval; NaN ends where fewer than three prompts leave none."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0: the difference exceeds noise."""
        return self.low > 0 or self.high < 0


class Floor(NamedTuple):
    """The ECE that a perfectly calibrated model with these very probabilities shows on N pairs: its mean, and its 95% quantile."""

    mean: float
    high: float


# ---- the noise floor ---------------------------------------------------------------------------------------------------


def noise_floor(
    margins, prompts=None, replicates: int = REPLICATES, seed: int = 0, bins: int = 10
) -> Floor:
    """ECE of the paper's kind if every outcome were drawn from the model's own probability.

    margins: (N,). Which side is called chosen is redrawn with probability sigmoid(|margin|), so that the model is right by
    construction, and the ECE of that is noise alone. Where prompts (N,) have several pairs, whose outcomes may go together, the floor is no
    lower than what the prompts' own sums of outcome minus probability, centred and with random signs and sizes, would show (a wild
    cluster bootstrap).
    """
    m = np.abs(np.asarray(margins, dtype=np.float64))
    p, random = probability(m), np.random.default_rng(seed)
    index, first = _bins(p, bins), _bins(1 - p, bins)
    eces = []
    for _ in range(replicates):
        right = random.random(len(m)) < p
        gaps = np.bincount(index, right - p, bins) + np.bincount(first, p - right, bins)
        eces.append(np.abs(gaps).sum() / (2 * len(m)))
    floor = Floor(float(np.mean(eces)), float(np.quantile(eces, 0.95)))
    sums = prompt_sums(margins, prompts, bins)
    G = len(sums.pairs)
    if len(m) > G:
        few = (
            student_t(G - 1) / NormalDist().inv_cdf(0.975) if G > 2 else 2.2
        )  # few prompts know their own spread badly
        centred = (sums.gaps - sums.gaps.mean(0)) * math.sqrt(G / (G - 1)) * few
        wild = np.abs(random.standard_normal((replicates, G)) @ centred).sum(1) / (2 * len(m))
        floor = Floor(
            max(floor.mean, float(wild.mean())), max(floor.high, float(np.quantile(wild, 0.95)))
        )
    return floor


def is_miscalibrated(ece: float, floor: Floor) -> bool:
    """Whether an ECE can be told from the floor: at least twice its mean and above its 95% quantile."""
    return ece >= CLEAR * floor.mean and ece > floor.high


# ---- sums a prompt, all that a replicate needs ---------------------------------------------------------------------------


class Sums(NamedTuple):
    """Per prompt: pairs (G,), pairs ranked right (G,), and outcome minus probability in each bin, both orders (G, M)."""

    pairs: np.ndarray
    right: np.ndarray
    gaps: np.ndarray


def prompt_sums(margins, prompts=None, bins: int = 10) -> Sums:
    """Sums over the pairs of every prompt; prompts: (N,) whole numbers, by default each pair its own.

    One prompt alone cannot be resampled: its pairs are then taken as independent.
    """
    m = np.asarray(margins, dtype=np.float64)
    group = (
        np.arange(len(m))
        if prompts is None
        else np.unique(np.asarray(prompts), return_inverse=True)[1]
    )
    if group.max(initial=0) == 0:
        group = np.arange(len(m))
    p, G = probability(m), group.max() + 1
    gaps = np.zeros((G, bins))
    np.add.at(gaps, (group, _bins(p, bins)), 1 - p)  # the pair as it is, outcome 1
    np.add.at(gaps, (group, _bins(1 - p, bins)), p - 1)  # its mirror image, outcome 0
    return Sums(
        np.bincount(group).astype(float), np.bincount(group, (m > 0) + 0.5 * (m == 0)), gaps
    )


def _bins(p, bins):
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p, side="left")


def _debiased(gaps, squares, pairs, prompts):
    """sum_m 2 |d_m| - E |normal(d_m, s_m)|, at least 0, per pair and order: gaps and squares (..., M), pairs (...)."""
    s = np.sqrt(np.maximum(squares - gaps**2 / prompts, 1e-300))
    a = np.abs(gaps)
    z = a / s
    folded = s * math.sqrt(2 / math.pi) * np.exp(-np.minimum(z * z / 2, 700)) + a * _erf(
        z / math.sqrt(2)
    )
    return np.maximum((2 * a - folded).sum(-1), 0) / (2 * pairs)


def _erf(x):
    """The error function of x >= 0, to 1.5e-7: Abramowitz and Stegun 7.1.26."""
    t = 1 / (1 + 0.3275911 * x)
    polynomial = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return 1 - polynomial * np.exp(-np.minimum(x * x, 700))


def debiased_ece(margins, prompts=None, bins: int = 10) -> float:
    """The paper's ECE less what noise adds to it, at least 0.

    Every bin's gap is taken as normal around its true value, with the spread that prompts show; the expected absolute value of such
    a normal exceeds the true gap by as much as is taken off here. Source: the folded normal; compare Kumar et al. 2019, arXiv
    1909.10155, section 4.
    """
    sums = prompt_sums(margins, prompts, bins)
    return float(
        _debiased(sums.gaps.sum(0), (sums.gaps**2).sum(0), sums.pairs.sum(), len(sums.pairs))
    )


# ---- the bootstrap -------------------------------------------------------------------------------------------------------


def resample(
    samples: list[Sums], replicates: int = REPLICATES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and debiased ECE of every sample in every replicate, the same prompts drawn for all: two (samples, R) arrays."""
    G, random = len(samples[0].pairs), np.random.default_rng(seed)
    accuracies, eces = [], []
    rows = max(1, BLOCK // G)
    for start in range(0, replicates, rows):
        drawn = random.multinomial(G, np.full(G, 1 / G), size=min(rows, replicates - start)).astype(
            np.float64
        )  # (rows, G)
        accuracies.append([(drawn @ s.right) / (drawn @ s.pairs) for s in samples])
        eces.append(
            [_debiased(drawn @ s.gaps, drawn @ s.gaps**2, drawn @ s.pairs, G) for s in samples]
        )
    return np.concatenate(accuracies, 1), np.concatenate(eces, 1)


def _interval(value, replicates, prompts) -> Interval:
    """Percentiles, moved outwards for few prompts as Student's t is wider than the normal (Hesterberg 2015, arXiv 1411.5279, section 5.3)."""
    if prompts < 3:
        return Interval(float(value), math.nan, math.nan)
    tail = NormalDist().cdf(-math.sqrt(prompts / (prompts - 1)) * student_t(prompts - 1))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def student_t(freedom: int) -> float:
    """The .975 quantile of Student's t with at least 2 degrees of freedom, to 1%: Abramowitz and Stegun 26.7.5."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def intervals(
    margins, prompts=None, replicates: int = REPLICATES, seed: int = 0
) -> tuple[Interval, Interval]:
    """Accuracy and debiased ECE of one model on one source, each with its 95% interval."""
    sums = prompt_sums(margins, prompts)
    accuracies, eces = resample([sums], replicates, seed)
    G = len(sums.pairs)
    accuracy = _interval(sums.right.sum() / sums.pairs.sum(), accuracies[0], G)
    if accuracy.low == accuracy.high in (0, 1):  # all right, or all wrong: the rule of three
        accuracy = Interval(
            accuracy.value, max(0.0, accuracy.low - 3 / G), min(1.0, accuracy.high + 3 / G)
        )
    return accuracy, _interval(debiased_ece(margins, prompts), eces[0], G)


def difference_intervals(
    margins, baseline, prompts=None, replicates: int = REPLICATES, seed: int = 0
) -> tuple[Interval, Interval]:
    """The model's accuracy and debiased ECE minus the baseline's on the same pairs, prompts drawn together for both."""
    if len(margins) != len(baseline):
        raise ValueError(
            f"margins and baseline must be of the same pairs, got {len(margins)} and {len(baseline)}"
        )
    mine, theirs = prompt_sums(margins, prompts), prompt_sums(baseline, prompts)
    accuracies, eces = resample([mine, theirs], replicates, seed)
    G, accuracy = len(mine.pairs), (mine.right.sum() - theirs.right.sum()) / mine.pairs.sum()
    ece = debiased_ece(margins, prompts) - debiased_ece(baseline, prompts)
    return _interval(accuracy, accuracies[0] - accuracies[1], G), _interval(
        ece, eces[0] - eces[1], G
    )


def may_rank(ece: Interval, eces: tuple[float, float], floors: tuple[Floor, Floor]) -> bool:
    """Whether two ECEs may be ranked: their difference exceeds noise, and at least one of them stands clear of its floor."""
    return ece.excludes_zero and any(map(is_miscalibrated, eces, floors))


# ---- over seeds ----------------------------------------------------------------------------------------------------------


def over_seeds(values) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% interval (NaN for fewer than three)."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(student_t(len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v))) if len(
        v
    ) > 2 else math.nan


def detectable(values) -> float:
    """The smallest true difference that as many seeds with this spread show in about 80% of cases (three seeds: 74%); NaN for fewer than three."""
    v = np.asarray(values, dtype=float)
    return (
        float(
            (student_t(len(v) - 1) + NormalDist().inv_cdf(0.8)) * v.std(ddof=1) / math.sqrt(len(v))
        )
        if len(v) > 2
        else math.nan
    )
