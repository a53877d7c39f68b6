"""Calibration by hand: does a probability of .7 come true 70% of the time? numpy only.

A reward model says that the chosen response is preferred with the probability sigmoid(margin),
where margin = r_chosen - r_rejected. Two conventions are kept apart by name:

- the paper's (`pair_*`, arXiv 2312.07401v5, section 2): every pair enters in both orders, (p, 1)
  and (1 - p, 0). The two are mirror images, so an even number M of bins over [0, 1] holds what
  M / 2 bins over [.5, 1] hold for the predicted winner, except for probabilities on an edge.
- the general one (`expected_calibration_error`): any probabilities with their outcomes, nothing
  folded or mirrored.

An outcome is 0 or 1, or the share of votes where several annotators saw the same pair. By default
it is 1 for every pair: one vote for the chosen response.

N pairs or predictions, M bins. Probabilities are in [0, 1], margins and losses in nats.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Reliability(NamedTuple):
    """The bins of a reliability diagram.

    count (M,); confidence (M,), the mean probability; accuracy (M,), the mean outcome; edges
    (M + 1,). Empty bins hold NaN means. For quantile bins the edges are the largest probability of
    each bin.
    """

    count: np.ndarray  # type: ignore[assignment]  # it stands in the place of tuple.count
    confidence: np.ndarray
    accuracy: np.ndarray
    edges: np.ndarray


def accuracy(margins: ArrayLike, outcomes: ArrayLike = 1.0) -> float:
    """Share of pairs with a positive margin; a reward tie (margin exactly 0) counts one half.

    With outcomes that are shares of votes it is the share of all votes with which the model agrees,
    every pair counting the same; with `majority(outcomes)`, its accuracy against the majority.

    >>> accuracy([1.0, -2.0, 0.0, 3.0])
    0.625
    """
    m = _vector(margins, "margins")
    return float(np.mean(_expected(outcomes, is_right(m), is_right(-m))))


def is_right(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen response has the higher reward, 1/2 at a reward tie, else 0."""
    return (margins > 0) + 0.5 * (margins == 0)


def majority(outcomes: ArrayLike) -> np.ndarray:
    """What most votes say: 1, or 0; 1/2 where they are evenly split."""
    return is_right(np.asarray(outcomes, dtype=np.float64) - 0.5)


def probability(margins: ArrayLike) -> np.ndarray:
    """The model's probability that the chosen response is preferred: sigmoid(margin). (N,) -> (N,).

    Written so that no exponential overflows.
    """
    m = np.asarray(margins, dtype=np.float64)
    e = np.exp(-np.abs(m))
    return np.where(m >= 0, 1 / (1 + e), e / (1 + e))


def brier(margins: ArrayLike, outcomes: ArrayLike = 1.0) -> float:
    """Brier score: mean (1 - p)^2, p the probability given to the chosen response.

    0 is best, and .25 knows nothing. With shares of votes y it is the mean over votes,
    y (1 - p)^2 + (1 - y) p^2.
    """
    m = _vector(margins, "margins")
    return float(np.mean(_expected(outcomes, probability(-m) ** 2, probability(m) ** 2)))


def negative_log_likelihood(margins: ArrayLike, outcomes: ArrayLike = 1.0) -> float:
    """mean -log p of the chosen response, nats: Eq. 1 as a metric; log 2 = .693 knows nothing.

    With shares of votes it is the mean over votes.
    """
    return float(np.mean(pair_likelihoods(margins, outcomes)))


def pair_likelihoods(margins: ArrayLike, outcomes: ArrayLike = 1.0) -> np.ndarray:
    """The negative log likelihood of each pair, (N,), nats; a mean over its votes."""
    m = _vector(margins, "margins")
    return _expected(outcomes, np.logaddexp(0, -m), np.logaddexp(0, m))


def _expected(outcomes: ArrayLike, if_chosen: np.ndarray, if_rejected: np.ndarray) -> np.ndarray:
    """The mean over the votes of each pair of what one vote for either side gives: (N,)."""
    y = outcomes_of(outcomes, len(if_chosen))
    return y * if_chosen + (1 - y) * if_rejected


def fit_temperature(margins: ArrayLike, outcomes: ArrayLike = 1.0) -> float:
    """The T that minimises the mean of -log sigmoid(margin / T) over held-out pairs.

    margins: (N,); with shares of votes it is the mean over votes. The loss is convex in 1 / T; the
    root of its slope is bracketed and bisected to the last bits. Two results are no temperature to
    use. It is 0 if the pairs are separable: no vote is against its margin, so the loss falls for
    ever as T falls to 0. It is infinity if the margins do not speak for the votes: their mean over
    votes is 0 or less, so no probability is better than 1/2. Source: Guo et al. 2017, for pairs.

    >>> # right in 3 of 4, so each margin should be log 3
    >>> round(fit_temperature([2.0, 2.0, 2.0, -2.0]), 6)
    1.820478
    """
    m = _vector(margins, "margins")
    scale = np.abs(m).max()
    m = m / scale if scale > 0 else m
    y = outcomes_of(outcomes, len(m))
    if np.mean(m * (2 * y - 1)) <= 1e-12:  # 0, but for rounding
        return float("inf")
    if _expected(y, np.minimum(m, 0), np.minimum(-m, 0)).min() >= 0:
        return 0.0

    def slope(t: float) -> float:
        """Of one vote m sigmoid(-t m): half the mean margin at t = 0, then it falls below 0."""
        return float(np.mean(_expected(y, m * probability(-t * m), -m * probability(t * m))))

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    middle = (low + high) / 2
    while low < middle < high:
        if slope(middle) > 0:
            low = middle
        else:
            high = middle
        middle = (low + high) / 2
    return float(scale / middle)


def reliability(
    probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10, strategy: str = "uniform"
) -> Reliability:
    """Sort predictions into bins and compare what was said with what came true.

    probabilities, outcomes: (N,) in [0, 1]. `uniform`: M equal bins over [0, 1],
    right-closed, 0 in the first, as in the paper. `quantile`: M bins of equal count, `array_split`
    of a stable sort. Raises ValueError for values out of range, unequal lengths, or no prediction.
    """
    p, y = _vector(probabilities, "probabilities"), _vector(outcomes, "outcomes")
    if p.shape != y.shape:
        raise ValueError(
            f"probabilities and outcomes must have equal lengths, got {len(p)} and {len(y)}"
        )
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"probabilities must lie in [0, 1], got {p.min()} to {p.max()}")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {y.min()} to {y.max()}")
    if not isinstance(bins, (int, np.integer)) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    if strategy == "uniform":
        edges = np.linspace(0, 1, bins + 1)
        index = np.searchsorted(edges[1:-1], p, side="left")  # ((m - 1) / M, m / M]
    elif strategy == "quantile":
        order = np.argsort(p, kind="stable")
        index = np.empty(len(p), dtype=np.int64)
        for m, members in enumerate(np.array_split(order, bins)):
            index[members] = m
        edges = np.concatenate([[p.min()], [p[index <= m].max() for m in range(bins)]])
    else:
        raise ValueError(f"strategy: {strategy!r} is not one of uniform, quantile")
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, weights=p, minlength=bins) / count
        accuracy = np.bincount(index, weights=y, minlength=bins) / count
    return Reliability(count, confidence, accuracy, edges)


def expected_calibration_error(
    probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10, strategy: str = "uniform"
) -> float:
    """ECE = sum_m |B_m| / N |acc(B_m) - conf(B_m)|.

    Arguments as in `reliability`. Source: Naeini et al. 2015; Guo et al. 2017; section 2 of the
    paper.

    >>> round(expected_calibration_error([.9, .9, .9, .9], [1, 1, 1, 0]), 10)
    0.15
    """
    r = reliability(probabilities, outcomes, bins, strategy)
    return float(np.sum(r.count * _gaps(r)) / r.count.sum())


def pair_reliability(margins: ArrayLike, bins: int = 10, outcomes: ArrayLike = 1.0) -> Reliability:
    """`reliability` in the paper's convention: both orders of every pair, a symmetric diagram."""
    m = _vector(margins, "margins")
    y = outcomes_of(outcomes, len(m))
    both = np.concatenate([probability(m), probability(-m)])
    return reliability(both, np.concatenate([y, 1 - y]), bins)


def pair_ece(margins: ArrayLike, bins: int = 10, outcomes: ArrayLike = 1.0) -> float:
    """The paper's expected calibration error of a reward model.

    margins: (N,), chosen minus rejected; outcomes: (N,), shares of votes for the chosen response.
    It mirrors every pair itself, so it cannot be fed one order only. Source: section 2; the
    authors' code.
    """
    r = pair_reliability(margins, bins, outcomes)
    return float(np.sum(r.count * _gaps(r)) / r.count.sum())


def pair_ace(margins: ArrayLike, bins: int = 10, outcomes: ArrayLike = 1.0) -> float:
    """Average calibration error: the unweighted mean gap over non-empty bins of equal width.

    Others call adaptive calibration error ACE, too; its bins have equal counts.
    """
    r = pair_reliability(margins, bins, outcomes)
    is_filled = r.count > 0
    return float(_gaps(r)[is_filled].mean())


def pair_mce(margins: ArrayLike, bins: int = 10, outcomes: ArrayLike = 1.0) -> float:
    """Maximum calibration error: the largest gap over non-empty bins."""
    return float(_gaps(pair_reliability(margins, bins, outcomes)).max())


def _gaps(r: Reliability) -> np.ndarray:
    """|accuracy - confidence| per bin, 0 for an empty one."""
    return np.nan_to_num(np.abs(r.accuracy - r.confidence))


def outcomes_of(outcomes: ArrayLike, pairs: int) -> np.ndarray:
    """An outcome for each of N pairs: (N,), where one number stands for all. Raises ValueError."""
    y = _vector(np.broadcast_to(np.asarray(outcomes, dtype=np.float64), pairs), "outcomes")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {y.min()} to {y.max()}")
    return y


def _vector(values: ArrayLike, name: str) -> np.ndarray:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0 or not np.isfinite(v).all():
        raise ValueError(
            f"{name} must be a non-empty vector of finite numbers, got shape {v.shape}"
        )
    return v
