"""Confidence from agreement: how far n answers to one question agree says how sure to be.

Whoever answers is asked the same question n times, and the most frequent answer counts. The three
measures read only how often each answer came, and lie in [0, 1]:

    agreement       n₁ / n                       share of the most frequent answer
    entropy         1 - H / log a                H = -Σ (nᵢ / n) log (nᵢ / n), of the a answers that
                                                 came at all; 1 if only one came
    first-second    (n₁ - n₂) / n                share of the first minus that of the second

Source: Lyu et al. 2024, arXiv 2402.13904, checked against the authors' code (consistency.py of
veronica320/Calibrating-LLMs-with-Consistency); the paper's text could not be opened, so no equation
is cited. Differs: their entropy and first-second distance leave out answers that cannot be read,
where here these are one answer more. numpy only.

N questions, n answers to each, A possible answers.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def counts_of(answers: ArrayLike, possible: int) -> np.ndarray:
    """How often every answer came: (N, n) whole numbers in [0, possible) -> (N, A)."""
    drawn = np.asarray(answers, dtype=np.int64)
    counts = np.zeros((len(drawn), possible), dtype=np.int64)
    np.add.at(counts, (np.arange(len(drawn))[:, None], drawn), 1)
    return counts


def most_frequent(counts: np.ndarray) -> np.ndarray:
    """The answer that came most often, the first of equal ones: (N, A) -> (N,)."""
    return counts.argmax(1)


def agreement(counts: np.ndarray) -> np.ndarray:
    """The share of the most frequent answer: (N, A) -> (N,).

    >>> agreement(np.array([[3, 1, 0], [4, 0, 0]]))
    array([0.75, 1.  ])
    """
    return counts.max(1) / counts.sum(1)


def entropy_consistency(counts: np.ndarray) -> np.ndarray:
    """One minus the entropy of the answers, as a share of the largest that so many can have: (N,).

    Two answers that came as often give 0, and so do three: it is divided by the logarithm of how
    many different answers came, not of how many could have.

    >>> entropy_consistency(np.array([[2, 2, 0], [2, 2, 2], [4, 0, 0]])).round(12)
    array([0., 0., 1.])
    """
    shares = counts / counts.sum(1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = -(shares * logs).sum(1)
    different = (counts > 0).sum(1)
    largest = np.where(different > 1, np.log(different), 1.0)
    return np.clip(1 - entropy / largest, 0, 1)  # rounding may leave it by a last bit


def first_second_distance(counts: np.ndarray) -> np.ndarray:
    """The share of the most frequent answer minus that of the second: (N, A) -> (N,).

    >>> first_second_distance(np.array([[3, 1, 0], [2, 2, 0]]))
    array([0.5, 0. ])
    """
    ordered = np.sort(counts, 1)
    return (ordered[:, -1] - ordered[:, -2]) / counts.sum(1)


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "agreement": agreement,
    "entropy": entropy_consistency,
    "first-second": first_second_distance,
}
