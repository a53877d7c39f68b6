"""How sure are we? Intervals by prompt, a debiased ECE, and the floor that any ECE stands on.

Pairs of one prompt are not independent, so the bootstrap draws whole prompts. An ECE is a sum of
absolute values, so noise only adds to it: on 2,300 pairs a perfectly calibrated model shows about
.015, on 130 about .06. Nothing below twice that floor is called miscalibrated here, and no two ECEs
are ranked that both lie below it. numpy only.

Several votes on the same pairs make less noise than one vote each: where margins have outcomes,
these are the shares of votes for the chosen response, as in calibration.py.

N pairs, G prompts, M bins, R bootstrap replicates.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .calibration import is_right, majority, outcomes_of, probability

REPLICATES = 1000
NUMBERS_AT_ONCE = 2**22  # bootstrap weights in memory at the same time
CLEAR = 2.0  # times the floor, from which an ECE counts as miscalibration


class Interval(NamedTuple):
    """An estimate and the ends of its 95% interval: NaN with fewer than three prompts."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0: the difference exceeds noise."""
        return self.low > 0 or self.high < 0


class Floor(NamedTuple):
    """The ECE that a perfectly calibrated model with these very probabilities shows on N pairs.

    mean: its mean; high: its 95% quantile.
    """

    mean: float
    high: float


# ---- the noise floor -----------------------------------------------------------------------------


def noise_floor(
    margins: ArrayLike,
    prompts: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    bins: int = 10,
    outcomes: ArrayLike = 1.0,
    votes: ArrayLike | None = None,
) -> Floor:
    """ECE of the paper's kind if every outcome were drawn from the model's own probability.

    margins: (N,). Which side is called chosen is redrawn with probability sigmoid(|margin|); with
    votes (N,), each of so many votes of a pair is. The model is then right by construction, and its
    ECE is noise alone.

    Where prompts (N,) have several pairs, their outcomes may go together. The floor is then no
    lower than `_floor_of_prompts`.
    """
    random = np.random.default_rng(seed)
    p = probability(np.abs(np.asarray(margins, dtype=np.float64)))  # of the side it prefers
    N, bin_of_p, bin_of_rest = len(p), _bins(p, bins), _bins(1 - p, bins)
    eces = []
    for _ in range(replicates):
        gap = _drawn(p, votes, random) - p  # outcome minus probability; the other side's is -gap
        gaps = np.bincount(bin_of_p, gap, bins) + np.bincount(bin_of_rest, -gap, bins)
        eces.append(np.abs(gaps).sum() / (2 * N))
    independent = Floor(float(np.mean(eces)), float(np.quantile(eces, 0.95)))
    sums = prompt_sums(margins, prompts, bins, outcomes)
    if len(sums.pairs) == N:  # every prompt has one pair
        return independent
    clustered = _floor_of_prompts(sums, replicates, random)
    return Floor(max(independent.mean, clustered.mean), max(independent.high, clustered.high))


def _drawn(p: np.ndarray, votes: ArrayLike | None, random: np.random.Generator) -> np.ndarray:
    """The share of votes that a side with the probability p gets: binomial, or 0 or 1 for one."""
    if votes is None:
        return random.random(len(p)) < p
    whole = np.maximum(np.asarray(votes), 1).astype(np.int64)  # a part of a vote adds no certainty
    return random.binomial(whole, p) / whole


def _floor_of_prompts(sums: "Sums", replicates: int, random: np.random.Generator) -> Floor:
    """The ECE of sums of outcome minus probability that are centred, with random signs and sizes.

    This is a wild cluster bootstrap: what the prompts' own spread shows if nothing is wrong.
    """
    G = len(sums.pairs)
    # A few prompts know their own spread badly: widen it as Student's t is wider than the normal.
    widening = student_t(G - 1) / NormalDist().inv_cdf(0.975) if G > 2 else 2.2
    centred = (sums.gaps - sums.gaps.mean(0)) * math.sqrt(G / (G - 1)) * widening  # (G, M)
    signed = random.standard_normal((replicates, G)) @ centred  # (R, M)
    eces = np.abs(signed).sum(1) / (2 * int(sums.pairs.sum()))
    return Floor(float(eces.mean()), float(np.quantile(eces, 0.95)))


def is_miscalibrated(ece: float, floor: Floor) -> bool:
    """Whether an ECE can be told from its floor: twice its mean, and above its 95% quantile."""
    return ece >= CLEAR * floor.mean and ece > floor.high


# ---- sums of a prompt, all that a replicate needs ------------------------------------------------


class Sums(NamedTuple):
    """Per prompt: pairs (G,), pairs ranked as most votes do (G,), the gap of every bin (G, M).

    A gap is outcome minus probability, summed over both orders of every pair.
    """

    pairs: np.ndarray
    right: np.ndarray
    gaps: np.ndarray


def groups_of(prompts: ArrayLike | None, pairs: int) -> np.ndarray:
    """The independent group of each pair, numbered from 0 on: (N,); the pairs of a prompt are one.

    prompts: (N,) whole numbers, by default each pair its own. One prompt alone cannot be resampled:
    its pairs are then taken as independent.
    """
    if prompts is not None:
        distinct, group = np.unique(np.asarray(prompts), return_inverse=True)
        if len(distinct) > 1:
            return group
    return np.arange(pairs)


def prompt_sums(
    margins: ArrayLike,
    prompts: ArrayLike | None = None,
    bins: int = 10,
    outcomes: ArrayLike = 1.0,
) -> Sums:
    """Sums over the pairs of every prompt; prompts: see `groups_of`."""
    m = np.asarray(margins, dtype=np.float64)
    group = groups_of(prompts, len(m))
    p, G = probability(m), group.max() + 1
    gaps = np.zeros((G, bins))
    y = outcomes_of(outcomes, len(m))
    np.add.at(gaps, (group, _bins(p, bins)), y - p)  # the pair as it is, outcome y
    np.add.at(gaps, (group, _bins(1 - p, bins)), p - y)  # its mirror image, outcome 1 - y
    most = majority(y)
    right = np.bincount(group, most * is_right(m) + (1 - most) * is_right(-m))
    return Sums(np.bincount(group).astype(float), right, gaps)


def _bins(p: np.ndarray, bins: int) -> np.ndarray:
    """The right-closed bin of every probability, as in calibration.py."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p, side="left")


def _debiased(
    gaps: np.ndarray, squares: np.ndarray, pairs: np.ndarray | float, prompts: int
) -> np.ndarray:
    """The ECE less what noise adds to it, at least 0.

        sum_m 2 |d_m| - E |normal(d_m, s_m)|

    gaps d: (..., M), sums over all prompts; squares: (..., M), sums of the prompts' squared gaps,
    which give the spread s; pairs: (...). Returned per pair and order: (...).
    """
    s = np.sqrt(np.maximum(squares - gaps**2 / prompts, 1e-300))
    a = np.abs(gaps)
    z = a / s
    density = np.exp(-np.minimum(z * z / 2, 700))
    folded = s * math.sqrt(2 / math.pi) * density + a * _erf(z / math.sqrt(2))  # E |normal(d, s)|
    return np.maximum((2 * a - folded).sum(-1), 0) / (2 * pairs)


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function of x >= 0, to 1.5e-7: Abramowitz and Stegun 7.1.26."""
    t = 1 / (1 + 0.3275911 * x)
    polynomial = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return 1 - polynomial * np.exp(-np.minimum(x * x, 700))


def debiased_ece(
    margins: ArrayLike,
    prompts: ArrayLike | None = None,
    bins: int = 10,
    outcomes: ArrayLike = 1.0,
) -> float:
    """The paper's ECE less what noise adds to it, at least 0.

    Every bin's gap d is taken as normal around its true value, with the spread s that prompts show.
    Then |d| is larger than the true |gap| on average. How much larger is estimated as if d were the
    true gap, E |normal(d, s)| - |d|, and taken off. Source: the folded normal; compare Kumar et al.
    2019, arXiv 1909.10155, section 4.
    """
    sums = prompt_sums(margins, prompts, bins, outcomes)
    gaps, squares = sums.gaps.sum(0), (sums.gaps**2).sum(0)
    return float(_debiased(gaps, squares, sums.pairs.sum(), len(sums.pairs)))


# ---- the bootstrap -------------------------------------------------------------------------------


def resample(
    samples: Sequence[Sums], replicates: int = REPLICATES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and debiased ECE of every sample in every replicate: two (samples, R) arrays.

    The same prompts are drawn for all samples.
    """
    G, random = len(samples[0].pairs), np.random.default_rng(seed)
    accuracies, eces = [], []
    rows = max(1, NUMBERS_AT_ONCE // G)
    for start in range(0, replicates, rows):
        size = min(rows, replicates - start)
        drawn = random.multinomial(G, np.full(G, 1 / G), size=size).astype(np.float64)  # (rows, G)
        accuracies.append([(drawn @ s.right) / (drawn @ s.pairs) for s in samples])
        eces.append(
            [_debiased(drawn @ s.gaps, drawn @ s.gaps**2, drawn @ s.pairs, G) for s in samples]
        )
    return np.concatenate(accuracies, 1), np.concatenate(eces, 1)


def _interval(value: float, replicates: np.ndarray, prompts: int) -> Interval:
    """The percentiles of the replicates, moved outwards for few prompts.

    They move as Student's t is wider than the normal. Source: Hesterberg 2015, arXiv 1411.5279,
    section 5.3.
    """
    if prompts < 3:
        return Interval(float(value), math.nan, math.nan)
    tail = NormalDist().cdf(-math.sqrt(prompts / (prompts - 1)) * student_t(prompts - 1))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def student_t(freedom: int) -> float:
    """The .975 quantile of Student's t with at least 2 degrees of freedom, to 1%.

    It is the normal quantile z plus terms in 1 / freedom. Source: Abramowitz and Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def intervals(
    margins: ArrayLike,
    prompts: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    outcomes: ArrayLike = 1.0,
) -> tuple[Interval, Interval]:
    """Accuracy and debiased ECE of one model on one source, each with its 95% interval.

    The accuracy is against the majority of votes. n votes a pair instead of one make the interval
    of the ECE narrower by at most √n: what differs from pair to pair stays.
    """
    sums = prompt_sums(margins, prompts, outcomes=outcomes)
    accuracies, eces = resample([sums], replicates, seed)
    G = len(sums.pairs)
    accuracy = _interval(sums.right.sum() / sums.pairs.sum(), accuracies[0], G)
    if accuracy.low == accuracy.high in (0, 1):  # all right, or all wrong: the rule of three
        low, high = max(0.0, accuracy.low - 3 / G), min(1.0, accuracy.high + 3 / G)
        accuracy = Interval(accuracy.value, low, high)
    return accuracy, _interval(debiased_ece(margins, prompts, outcomes=outcomes), eces[0], G)


def difference_intervals(
    margins: np.ndarray,
    baseline: np.ndarray,
    prompts: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    outcomes: ArrayLike = 1.0,
) -> tuple[Interval, Interval]:
    """The model's accuracy and debiased ECE minus the baseline's on the same pairs.

    Prompts are drawn together for both. Raises ValueError for unequal numbers of pairs.
    """
    if len(margins) != len(baseline):
        raise ValueError(
            "margins and baseline must be of the same pairs,"
            f" got {len(margins)} and {len(baseline)}"
        )
    mine, theirs = (prompt_sums(m, prompts, outcomes=outcomes) for m in (margins, baseline))
    accuracies, eces = resample([mine, theirs], replicates, seed)
    G = len(mine.pairs)
    accuracy = (mine.right.sum() - theirs.right.sum()) / mine.pairs.sum()
    my_ece, their_ece = (debiased_ece(m, prompts, outcomes=outcomes) for m in (margins, baseline))
    return (
        _interval(accuracy, accuracies[0] - accuracies[1], G),
        _interval(my_ece - their_ece, eces[0] - eces[1], G),
    )


def mean_interval(values: ArrayLike, prompts: ArrayLike | None = None) -> Interval:
    """The mean of values (N,) of pairs, of which whole prompts are independent.

    half = t √(G / (G - 1) Σ over prompts of (Σ of their values less the mean)²) / N

    t: of Student's distribution with G - 1 degrees of freedom. prompts: see `groups_of`.
    """
    v = np.asarray(values, dtype=np.float64)
    group = groups_of(prompts, len(v))
    mean, G = float(v.mean()), int(group.max()) + 1
    if G < 3:
        return Interval(mean, math.nan, math.nan)
    squares = np.bincount(group, v - mean) ** 2
    half = student_t(G - 1) * math.sqrt(G / (G - 1) * squares.sum()) / len(v)
    return Interval(mean, mean - half, mean + half)


def may_rank(ece: Interval, eces: tuple[float, float], floors: tuple[Floor, Floor]) -> bool:
    """Whether two ECEs may be ranked.

    Their difference must exceed noise, and at least one of them must stand clear of its floor.
    """
    return ece.excludes_zero and any(map(is_miscalibrated, eces, floors))


# ---- over seeds ----------------------------------------------------------------------------------


def over_seeds(values: ArrayLike) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% interval (NaN for fewer than three)."""
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 3:
        return float(v.mean()), math.nan
    half_width = student_t(len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v))
    return float(v.mean()), float(half_width)


def detectable(values: ArrayLike) -> float:
    """The smallest true difference that as many seeds with this spread show in 80% of cases.

    With three seeds it is 74%. NaN for fewer than three.
    """
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 3:
        return math.nan
    quantiles = student_t(len(v) - 1) + NormalDist().inv_cdf(0.8)
    return float(quantiles * v.std(ddof=1) / math.sqrt(len(v)))
