"""What depends on the scale of rewards, where the best of n does not.

    a threshold        keep what the model is sure of: σ(r - r₀) > .8
    a penalty          weigh samples by exp(r / β): the policy that is best for reward - β KL
    a mixture          choose by the mean reward of several models

Each of them is judged by the truth, in the units in which people decide: true log-odds.

P prompts, N samples of each, K annotators.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..calibration import probability

THRESHOLD = 0.8  # probability with which a sample must beat the prompt's first one to be used
BETA = 1.0  # price of a nat of KL, in log-odds


# ---- a threshold ---------------------------------------------------------------------------------


def is_sure(rewards: ArrayLike, threshold: float = THRESHOLD) -> np.ndarray:
    """Which samples the model says to beat the first with more probability: (P, N) -> (P, N - 1).

    σ(r - r₀) > threshold
    """
    r = np.asarray(rewards, np.float64)
    return r[:, 1:] - r[:, :1] > math.log(threshold / (1 - threshold))


def preferences(values: np.ndarray, decisiveness: Sequence[float]) -> np.ndarray:
    """The true probability that a sample is preferred to the first one: (P, N - 1).

    It is that of an annotator drawn at random. values: (P, N, K), true rewards of every annotator.
    """
    margins = values[:, 1:] - values[:, :1]  # (P, N - 1, K)
    return probability(np.asarray(decisiveness) * margins).mean(2)


def use_of_threshold(
    is_kept: np.ndarray, preferred: np.ndarray, threshold: float = THRESHOLD
) -> float:
    """The mean of what is won by keeping these samples: p - threshold of each that is kept.

    Nothing wins more than to keep exactly those with p > threshold. is_kept, preferred: (P, N - 1).
    """
    return float((is_kept * (preferred - threshold)).mean())


# ---- a penalty -----------------------------------------------------------------------------------


def tilted(rewards: ArrayLike, beta: float = BETA) -> np.ndarray:
    """Weights of samples, exp(r / β) over their sum: (P, N).

    Of all weights w they maximise Σ w r - β KL(w | uniform).
    """
    r = np.asarray(rewards, np.float64) / beta
    w = np.exp(r - r.max(1, keepdims=True))
    return w / w.sum(1, keepdims=True)


def divergence_of(weights: np.ndarray) -> np.ndarray:
    """KL of weights (P, N) from uniform ones, in nats: (P,)."""
    N = weights.shape[1]
    logs = np.log(np.where(weights > 0, weights * N, 1.0))
    return (weights * logs).sum(1)


def use_of_penalty(weights: np.ndarray, truth: np.ndarray, beta: float = BETA) -> float:
    """Σ w r - β KL(w | uniform), less what uniform weights have; the mean over prompts.

    truth: (P, N), true rewards in log-odds. Nothing has more than `tilted(truth)`.
    """
    gained = (weights * truth).sum(1) - truth.mean(1)
    return float((gained - beta * divergence_of(weights)).mean())
