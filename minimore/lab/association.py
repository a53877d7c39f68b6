"""How closely two figures go together: rank correlations, and what is left given a third.

M models, P prompts, N samples of a prompt.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 1 along the last axis; equal values share the mean of theirs.

    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [2.5, 1.0, 2.5]
    """
    v = np.asarray(values, np.float64)
    rows = v.reshape(-1, v.shape[-1])
    below = (rows[:, :, None] > rows[:, None, :]).sum(2)
    equal = (rows[:, :, None] == rows[:, None, :]).sum(2)
    return (below + (equal + 1) / 2).reshape(v.shape)


def pearson(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Correlation along the last axis; NaN where one side is constant."""
    dx, dy = centred(x), centred(y)
    with np.errstate(invalid="ignore"):
        return (dx * dy).sum(-1) / np.sqrt((dx * dx).sum(-1) * (dy * dy).sum(-1))


def centred(values: ArrayLike) -> np.ndarray:
    """Values minus their mean along the last axis."""
    v = np.asarray(values, np.float64)
    return v - v.mean(-1, keepdims=True)


def spearman(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Correlation of the ranks along the last axis: 1 if one rises whenever the other does."""
    return pearson(ranks(x), ranks(y))


def kendall(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Kendall's tau-b along the last axis, over all pairs of entries.

        (pairs in the same order - pairs in the opposite order) / √(pairs apart in x  · apart in y)

    NaN where one side is constant.
    """
    dx, dy = signs_of_differences(x), signs_of_differences(y)
    with np.errstate(invalid="ignore"):
        agreement = (dx * dy).sum((-2, -1))
        return agreement / np.sqrt((dx * dx).sum((-2, -1)) * (dy * dy).sum((-2, -1)))


def signs_of_differences(values: ArrayLike) -> np.ndarray:
    """Of every two entries along the last axis, which is the larger: (..., N) -> (..., N, N)."""
    v = np.asarray(values, np.float64)
    return np.sign(v[..., :, None] - v[..., None, :])


def partial(x: ArrayLike, y: ArrayLike, others: Sequence[ArrayLike]) -> float:
    """Correlation of the ranks of x and y (M,) given others: of what these do not explain of both.

    It is the correlation of the residuals of two linear regressions on the ranks of the others. NaN
    if they explain all of one side.
    """
    X = np.stack([np.ones(len(np.asarray(x))), *map(ranks, others)], 1)  # (M, 1 + others)
    residuals = []
    for side in (ranks(x), ranks(y)):
        residual = side - X @ np.linalg.lstsq(X, side, rcond=None)[0]
        if np.linalg.norm(residual) < 1e-9 * np.linalg.norm(side):
            return math.nan
        residuals.append(residual)
    return float(pearson(*residuals))
