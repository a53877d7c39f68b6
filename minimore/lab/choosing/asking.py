"""Which comparison to ask next: the one whose answer says most about which point is best.

    I(a, b) = H(E p) - Σ_i P(i is best) H(E[p | i is best])        p = P(a over b), H in nats

That is the mutual information of the answer and the best point, over tastes that are drawn from
what is known. It is not the information about the taste itself: a criterion that no choice hangs on
need not be known, and two points of which neither can be best need not be compared. No comparison
is asked twice. Source: Lindley 1956, of whose expected information this is the case of one target;
compare Houlsby et al. 2011, arXiv 1112.5745.

P points, C criteria, S drawn tastes, Q comparisons that may be asked.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ...calibration import probability
from .taste import best_in_draws, learned_taste

CLEAR = 0.9  # probability of being best at which nothing is asked any more
WORTH_ASKING = 0.02  # nats; a question that says less is not worth an answer

Comparison = tuple[int, int]  # two points, the preferred one first where an answer is known


class Standing(NamedTuple):
    """Where the search stands: what the answers so far say, and what could still be asked.

    probabilities: (P,), how probably each point is the best. unasked: the Q comparisons that have
    no answer. informations: (Q,), what an answer to each of them is expected to say, in nats.
    """

    probabilities: np.ndarray
    unasked: list[Comparison]
    informations: np.ndarray

    @property
    def best(self) -> int:
        """The point that is most probably the best."""
        return int(self.probabilities.argmax())

    @property
    def is_clear(self) -> bool:
        """Whether it is so probable that nothing is asked any more."""
        return bool(self.probabilities.max() >= CLEAR)

    @property
    def is_over(self) -> bool:
        """Whether the best point is clear, or no comparison is left that is worth an answer."""
        return self.is_clear or self.informations.max(initial=0) < WORTH_ASKING


def standing_of(points: np.ndarray, answers: Sequence[Comparison]) -> Standing:
    """What answers say of points (P, C), each answer with the preferred point first."""
    chosen, rejected = columns_of(answers)
    draws = learned_taste(points[chosen] - points[rejected]).draws()
    wins = np.bincount(best_in_draws(points, draws), minlength=len(points))  # (P,)
    probabilities = wins / len(draws)
    asked = {frozenset(answer) for answer in answers}
    all_pairs = combinations(range(len(points)), 2)
    unasked = [pair for pair in all_pairs if frozenset(pair) not in asked]
    return Standing(probabilities, unasked, informations(points, draws, unasked))


def columns_of(comparisons: Sequence[Comparison]) -> tuple[np.ndarray, np.ndarray]:
    """The first points of all comparisons, and the second ones; both are empty if there are none.

    >>> columns_of([(0, 1), (0, 2)])
    (array([0, 0]), array([1, 2]))
    """
    first, second = np.array(comparisons, dtype=int).reshape(-1, 2).T
    return first, second


def most_informative(standing: Standing) -> Comparison:
    """The comparison with the largest expected information about which point is best."""
    return standing.unasked[int(standing.informations.argmax())]


def informations(points: np.ndarray, draws: np.ndarray, pairs: Sequence[Comparison]) -> np.ndarray:
    """I(a, b) = H(E p) - Σ_i P(i is best) H(E[p | i is best]) of every pair: (Q,)."""
    first, second = columns_of(pairs)
    p = probability(draws @ (points[first] - points[second]).T)  # (S, Q)
    best = best_in_draws(points, draws)  # (S,)
    information = entropy(p.mean(0))  # H(E p)
    for point in np.unique(best):
        is_best = best == point  # (S,), the draws in which it is
        information -= is_best.mean() * entropy(p[is_best].mean(0))
    return information


def entropy(p: np.ndarray) -> np.ndarray:
    """H of an answer with two outcomes, in nats."""
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    return -inside * np.log(inside) - (1 - inside) * np.log(1 - inside)
