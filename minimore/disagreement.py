"""What annotators disagree about, and what a model gets wrong: its scores on votes, in two parts.

Let π be the probability that an annotator prefers the chosen response of a pair, and p what the
model says. Over many votes

    Brier    mean of  π (1 - p)² + (1 - π) p²            =  π (1 - π)  +  (p - π)²
    NLL      mean of  -π log p - (1 - π) log(1 - p)      =  H(π)       +  KL(π, p)

where the first part is the annotators' own disagreement, which no model can go below, and the
second is the model's. A few votes say little of π, and yet the first part can be estimated without
bias: every polynomial of π has an estimate that is right on average, if its degree is at most the
number of votes. π (1 - π) is such a polynomial. The entropy H is none, and stands between two.
numpy only.

N pairs, n votes of a pair.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .calibration import accuracy, brier, negative_log_likelihood

MOST_TERMS = 5  # of the series of the entropy: ten votes


class Disagreement(NamedTuple):
    """The scores of a model on pairs with at least two whole votes each, every pair counting alike.

    pairs, votes: how many pairs, and their mean number of votes. annotators_agree: how often two
    annotators of one pair agree. model_agrees: how often the model agrees with one annotator.
    ceiling: the most that any rule could reach on these very votes, which is a little more than it
    could on new ones. brier, nll: of the model, the mean over votes. brier_floor: the annotators'
    part of the Brier score. nll_floor: between these two numbers lies their part of the NLL.
    """

    pairs: int
    votes: float
    annotators_agree: float
    model_agrees: float
    ceiling: float
    brier: float
    brier_floor: float
    nll: float
    nll_floor: tuple[float, float]


def disagreement(margins: ArrayLike, shares: ArrayLike, votes: ArrayLike) -> Disagreement | None:
    """The two parts of a model's scores; None if no pair has two whole votes.

    margins, shares, votes: (N,); shares are of the votes, for the chosen response.
    """
    m, y, n = (np.asarray(values, dtype=np.float64) for values in (margins, shares, votes))
    for_chosen = np.round(y * n)
    is_whole = (np.abs(y * n - for_chosen) < 1e-6) & (n == np.round(n))
    is_used = is_whole & (n >= 2)
    if not is_used.any():
        return None
    m, y, n, for_chosen = m[is_used], y[is_used], n[is_used], for_chosen[is_used]
    variance = y * (1 - y) * n / (n - 1)
    bounds = [entropy_bounds(int(a), int(b)) for a, b in zip(for_chosen, n - for_chosen)]
    lower, upper = np.mean(bounds, 0)
    return Disagreement(
        pairs=len(m),
        votes=float(n.mean()),
        annotators_agree=float(np.mean(1 - 2 * variance)),
        model_agrees=accuracy(m, y),
        ceiling=float(np.mean(np.maximum(y, 1 - y))),
        brier=brier(m, y),
        brier_floor=float(variance.mean()),
        nll=negative_log_likelihood(m, y),
        nll_floor=(float(lower), float(upper)),
    )


@cache
def entropy_bounds(for_chosen: int, for_rejected: int) -> tuple[float, float]:
    """Two numbers of one pair's votes, of which the means stand below and above its entropy, nats.

    With the lead x = 2 π - 1 the entropy is log 2 less a series, and n votes can estimate its first
    K terms, 2K <= n:

        H = log 2 - Σ_k x^(2k) / (2k (2k - 1))       for k = 1, 2, ...

    Upper bound: these K terms alone are taken off. All others together are at most their sum at
    x = 1 times x^(2K). Lower bound: that is taken off, too. At x = 0 and x = 1 it is H itself.

    >>> [round(bound, 3) for bound in entropy_bounds(4, 0)]  # as if all annotators agreed
    [0.0, 0.11]
    """
    terms = min(MOST_TERMS, (for_chosen + for_rejected) // 2)
    upper, rest = math.log(2), math.log(2)
    for k in range(1, terms + 1):
        share = 1 / (2 * k * (2 * k - 1))
        upper -= share * power_of_lead(for_chosen, for_rejected, 2 * k)
        rest -= share
    return upper - rest * power_of_lead(for_chosen, for_rejected, 2 * terms), upper


def power_of_lead(for_chosen: int, for_rejected: int, power: int) -> float:
    """An unbiased estimate of (2 π - 1)^power from at least so many votes.

    Taken as +1 and -1, it is the mean of the product over every choice of `power` of the votes.

    >>> power_of_lead(3, 1, 2)  # of six products of two votes three are 1, three -1
    0.0
    """
    total = sum(
        (-1) ** i * math.comb(for_rejected, i) * math.comb(for_chosen, power - i)
        for i in range(power + 1)
    )
    return total / math.comb(for_chosen + for_rejected, power)
