"""What a person wants, learned from comparisons: Bradley-Terry on criteria, and how sure we are.

A taste w says how much a standard deviation of each criterion is worth. A person who compares two
points a and b prefers a with the probability

    P(a over b) = σ(w · (a - b))

which is the model of a reward model with the criteria as its features. Before any comparison

    w ~ normal(MEAN, SPREAD² I)

where MEAN > 0 says that more of everything is better, else the person would not ask for the best.
After some, Laplace's approximation puts a normal around the likeliest taste ŵ:

    precision = I / SPREAD² + Σ p (1 - p) d dᵀ        over the comparisons, d = chosen - rejected

Source: Bradley and Terry 1952; MacKay 1992, "The evidence framework applied to classification
networks". numpy only. P points, C criteria, N comparisons, S draws.
"""

from typing import NamedTuple

import numpy as np

from ...calibration import probability

MEAN, SPREAD = 3.0, 3.0  # of the weight of a criterion; σ(3) = .95 of answers, a deviation apart
DRAWS = 1000
NEWTON_STEPS, SMALL_STEP, ROUNDING = 100, 1e-10, 1e-12


class Taste(NamedTuple):
    """The likeliest taste (C,), and the covariance (C, C) of what it may be."""

    mean: np.ndarray
    covariance: np.ndarray

    def draws(self) -> np.ndarray:
        """DRAWS tastes, as probable as the comparisons leave them: (S, C); always the same ones."""
        normal = np.random.default_rng(0).standard_normal((DRAWS, len(self.mean)))
        return self.mean + normal @ np.linalg.cholesky(self.covariance).T


def learned_taste(differences: np.ndarray) -> Taste:
    """The taste that comparisons show. differences: chosen minus rejected criteria (N, C).

    Newton's method finds the lowest loss, which is convex. A step that would raise it is halved.
    """
    taste = np.full(differences.shape[1], MEAN)
    for _ in range(NEWTON_STEPS):
        step = newton_step(taste, differences)
        loss = loss_at(taste, differences)
        while loss_at(taste + step, differences) > loss + ROUNDING:
            step = step / 2
        taste = taste + step
        if np.abs(step).max() < SMALL_STEP:
            break
    return Taste(taste, np.linalg.inv(precision_at(taste, differences)))


def newton_step(taste: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The step (C,) to the lowest loss, if the loss were the parabola that touches it here."""
    p_of_other_answer = probability(-(differences @ taste))  # (N,)
    gradient = (taste - MEAN) / SPREAD**2 - differences.T @ p_of_other_answer
    return -np.linalg.inv(precision_at(taste, differences)) @ gradient


def loss_at(taste: np.ndarray, differences: np.ndarray) -> float:
    """-log P(comparisons | taste) - log P(taste), but for a constant.

    The first is the Bradley-Terry loss (Eq. 1), and the second that of the normal before any.
    """
    of_comparisons = np.logaddexp(0, -(differences @ taste)).sum()
    of_taste = np.square(taste - MEAN).sum() / (2 * SPREAD**2)
    return float(of_comparisons + of_taste)


def precision_at(taste: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """I / SPREAD² + Σ p (1 - p) d dᵀ, the second derivative of the loss: (C, C)."""
    p = probability(differences @ taste)
    of_taste = np.eye(len(taste)) / SPREAD**2
    return of_taste + (differences * (p * (1 - p))[:, None]).T @ differences


def best_in_draws(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Which of the points (P, C) each drawn taste (S, C) finds best: (S,)."""
    return (draws @ points.T).argmax(1)
