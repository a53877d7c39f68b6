"""The best of n samples by a proxy, and what it is truly worth: exact, over all subsets of N.

Of N samples to a prompt, ordered by a proxy r₍₁₎ <= ... <= r₍N₎, the i-th is the best of n drawn
without replacement in

    C(i - 1, n - 1) / C(N, n)

of all subsets. The expected true reward of the best of n is therefore a weighted sum over the N
samples, and no subset is ever drawn. Source: order statistics; compare the pass@k of Chen et al.
2021, arXiv 2107.03374, and the best-of-n curves of Gao et al. 2022, arXiv 2210.10760.

P prompts, N samples of each, n of them compared.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def weights_of_ranks(N: int, n: int) -> np.ndarray:
    """The share of subsets of n in which the i-th smallest of N is the largest: (N,), summing to 1.

    The last is n / N, and each one before it follows from

        C(i - 2, n - 1) = C(i - 1, n - 1) (i - n) / (i - 1)

    >>> weights_of_ranks(4, 2).round(6).tolist()
    [0.0, 0.166667, 0.333333, 0.5]

    Raises ValueError unless 1 <= n <= N.
    """
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} out of {N} samples: expected 1 to {N}")
    weights = np.zeros(N)
    weights[N - 1] = n / N
    for i in range(N, n, -1):
        weights[i - 2] = weights[i - 1] * (i - n) / (i - 1)
    return weights


def expected_best(proxy: ArrayLike, value: ArrayLike, n: int) -> np.ndarray:
    """The expected value of the sample that the proxy finds best among n of N: (P,).

    proxy, value: (P, N). Among samples with equal proxies each is taken as often. With the value as
    its own proxy, this is the expected maximum of n.
    """
    proxies, values = np.asarray(proxy, np.float64), np.asarray(value, np.float64)
    P, N = proxies.shape
    weights = np.broadcast_to(weights_of_ranks(N, n), (P, N))
    order = np.argsort(proxies, axis=1, kind="stable")
    ordered = np.take_along_axis(proxies, order, 1)
    shared = averaged_over_ties(weights, ordered)
    return (shared * np.take_along_axis(values, order, 1)).sum(1)


def averaged_over_ties(weights: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Weights (P, N), the same for all entries of a row that have equal values in `ordered`."""
    is_first = np.concatenate([np.ones((len(ordered), 1), bool), np.diff(ordered) != 0], 1)
    group = np.cumsum(is_first.ravel()) - 1  # rows never share a group
    means = np.bincount(group, weights.ravel()) / np.bincount(group)
    return means[group].reshape(ordered.shape)


def curve(proxy: ArrayLike, value: ArrayLike, counts: Sequence[int]) -> np.ndarray:
    """The mean over prompts of the expected value of the best of n, for every n: (len(counts),)."""
    return np.array([expected_best(proxy, value, n).mean() for n in counts])


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`.

    >>> powers_of_two(20)
    [1, 2, 4, 8, 16]
    """
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def choices(proxy: ArrayLike) -> np.ndarray:
    """Which sample of every prompt the proxy finds best, the first of equal ones: (P,)."""
    return np.argmax(np.asarray(proxy), axis=1)


def chosen(values: ArrayLike, places: np.ndarray) -> np.ndarray:
    """The values (P, N) of the samples at these places (P,): (P,)."""
    return np.take_along_axis(np.asarray(values), places[:, None], 1)[:, 0]
