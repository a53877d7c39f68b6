"""What the functions of more.py must do, by definition, by autograd and by optimality.

Each check takes the function and raises WrongAnswer for the first case in which it is wrong.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .expect import expect, expect_close, expect_refused


def float64(values: Any) -> Tensor:
    """A tensor of float64."""
    return torch.tensor(values, dtype=torch.float64)


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers of float64, the same ones for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- losses and their gradients ------------------------------------------------------------------


def check_pair_losses(pair_losses: Callable) -> None:
    """-log sigmoid(m) = log(1 + exp(-m)), by Python's `math`, and its slope."""
    margins = [0.0, 1.0, -2.0, 3.5]
    plain = [math.log1p(math.exp(-m)) for m in margins]
    other = [math.log1p(math.exp(m)) for m in margins]
    smoothed = [0.9 * a + 0.1 * b for a, b in zip(plain, other)]
    expect_close(f"margins {margins}", pair_losses(float64(margins)), plain)
    expect_close(f"margins {margins}, smoothing .1", pair_losses(float64(margins), 0.1), smoothed)
    expect_close("margins [-10000, 10000]", pair_losses(float64([-1e4, 1e4])), [1e4, 0.0])
    m = float64(margins).requires_grad_()
    losses = pair_losses(m)
    expect(losses.requires_grad, "margins with a graph", "losses with a graph", "detached ones")
    (slope,) = torch.autograd.grad(losses.sum(), m)
    right = [-1 / (1 + math.exp(v)) for v in margins]
    expect_close(f"the slope of the losses at margins {margins}", slope, right)


def check_head_gradients(head_gradients: Callable) -> None:
    """Autograd on the mean loss of each source."""
    head = random_numbers(5).requires_grad_()
    z_chosen, z_rejected = random_numbers(12, 5, seed=1), random_numbers(12, 5, seed=2)
    source = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0, 1])
    for smoothing in (0.0, 0.1):
        gradients = head_gradients(head, z_chosen, z_rejected, source, smoothing=smoothing)
        margins = (z_chosen - z_rejected) @ head
        losses = (1 - smoothing) * torch.log1p(torch.exp(-margins))
        losses = losses + smoothing * torch.log1p(torch.exp(margins))
        means = [losses[source == k].mean() for k in range(3)]
        right = [torch.autograd.grad(mean, head, retain_graph=True)[0] for mean in means]
        case = f"12 pairs of 3 sources, smoothing {smoothing:g}"
        expect_close(case, gradients, torch.stack(right))
        expect(not gradients.requires_grad, case, "gradients that are detached", "a graph")
    gradients = head_gradients(head, z_chosen, z_rejected, source, 4)
    case = "4 sources, of which the last has no pair"
    expect(tuple(gradients.shape) == (4, 5), case, "shape (4, 5)", str(tuple(gradients.shape)))
    expect_close(f"{case}: its row", gradients[3:], np.full((1, 5), math.nan))


# ---- weights -------------------------------------------------------------------------------------


def check_normalize_gradients(normalize_gradients: Callable) -> None:
    """The four formulas, on lengths that are known: 5, 0 and 10."""
    gradients, losses = float64([[3, 4], [0, 0], [6, -8]]), float64([0.5, 1.0, 2.0])
    share = np.array([1.5, 2.0, 3.0]) / 6.5  # of (l + 1)
    units = np.array([[0.6, 0.8], [0, 0], [0.6, -0.8]])
    expected = {
        "none": gradients,
        "l2": units,
        "loss": gradients.numpy() / share[:, None],
        "loss+": units / np.array([0.5, 1.0, 2.0])[:, None],
    }
    for name, right in expected.items():
        case = f"rows (3, 4), (0, 0), (6, -8), losses .5, 1, 2, {name!r}"
        expect_close(case, normalize_gradients(gradients, losses, name), right)
    tiny = normalize_gradients(gradients * 1e-200, losses, "l2")
    expect_close("rows 1e-200 times as long, 'l2'", tiny, units)
    single = normalize_gradients(gradients.float(), losses.float(), "none")
    expect(single.dtype == torch.float64, "fp32 gradients", "float64", str(single.dtype))
    expect_refused("normalize 'l3'", lambda: normalize_gradients(gradients, losses, "l3"))


def check_min_norm_weights(min_norm_weights: Callable) -> None:
    """Two gradients by hand; for more, the condition that no other vector of the hull is shorter.

    v = sum lambda_k g_k is the shortest if and only if g_k · v >= v · v for every k.
    """
    by_hand = {
        "gradients (2, 0), (0, 1)": ([[2, 0], [0, 1]], [0.2, 0.8]),
        "gradients (1, 0), (3, 1): one is the shortest": ([[1, 0], [3, 1]], [1, 0]),
        "gradients (1, 0), (-3, 0): they cancel": ([[1, 0], [-3, 0]], [0.75, 0.25]),
        "gradients (0, 0), (3, 1)": ([[0, 0], [3, 1]], [1, 0]),
        "a single gradient (2, 1)": ([[2, 1]], [1]),
        "gradients (2e-150, 0), (0, 1e-150)": ([[2e-150, 0], [0, 1e-150]], [0.2, 0.8]),
    }
    for case, (gradients, right) in by_hand.items():
        expect_close(case, min_norm_weights(float64(gradients)), right, 1e-6)
    for K in (2, 3, 4, 5):
        for seed in range(5):
            G = random_numbers(K, 6, seed=seed) + float64([1, 0, 0, 0, 0, 0])
            expect_shortest(f"{K} random gradients (seed {seed})", min_norm_weights(G), G)
    expect_refused("a gradient of NaN", lambda: min_norm_weights(float64([[1, math.nan], [0, 1]])))


def expect_shortest(case: str, weights: Tensor, G: Tensor) -> None:
    """Raise WrongAnswer unless these weights lie on the simplex and make the shortest vector."""
    expect_close(f"{case}: the sum of the weights", weights.sum(), 1.0)
    least = weights.min().item()
    expect(least >= -1e-9, case, "no weight below 0", f"{least:.6g}")
    v = weights.double() @ G
    products = G @ v
    worst = int(products.argmin())
    expect(
        products[worst] >= v @ v - 1e-6,
        f"{case}: g_{worst} · v, where v is the weighted sum",
        f"at least v · v = {v @ v:.6g}",
        f"{products[worst]:.6g}, so v is not the shortest",
    )


def check_group_dro_weights(group_dro_weights: Callable) -> None:
    """Two steps of q <- q exp(rate L), normalised, by hand; then an absent source, then overflow.

    Whatever is kept between the steps is in the state.
    """
    losses, gradients = float64([1.0, 2.0, 0.5]).requires_grad_(), torch.zeros(3, 4)
    pairs, absent = torch.tensor([2, 2, 2]), torch.tensor([2, 0, 2])
    state: dict[str, Tensor] = {}
    growth = np.exp(0.5 * np.array([1.0, 2.0, 0.5]))
    weights = group_dro_weights(losses, gradients, pairs, state, rate=0.5)
    expect_close("losses 1, 2, .5, rate .5", weights, growth / growth.sum())
    expect(not weights.requires_grad, "losses with a graph", "weights that are detached", "a graph")
    weights = group_dro_weights(losses, gradients, pairs, state, rate=0.5)
    expect_close("the same losses in a second step", weights, growth**2 / (growth**2).sum())
    q = growth**2 * np.array([growth[0], 1, growth[2]])  # the absent source keeps its share
    weights = group_dro_weights(losses, gradients, absent, state, rate=0.5)
    present = np.array([q[0], 0, q[2]])
    expect_close("source 1 absent in a third step", weights, present / present.sum())
    weights = group_dro_weights(losses, gradients, pairs, state, rate=0.5)
    q = q * growth
    expect_close("source 1 back in a fourth step", weights, q / q.sum())
    weights = group_dro_weights(losses.detach() * 1e5, gradients, pairs, {}, rate=0.5)
    expect_close("losses 100,000 times as large", weights, [0, 1, 0])


# ---- the best of n -------------------------------------------------------------------------------


def check_weights_of_ranks(weights_of_ranks: Callable) -> None:
    """All subsets are listed, and the largest rank of each is counted."""
    N = 6
    for n in range(1, N + 1):
        largest = [max(subset) for subset in combinations(range(N), n)]
        right = np.bincount(largest, minlength=N) / len(largest)
        expect_close(f"the best of {n} out of {N}", weights_of_ranks(N, n), right)
    weights = weights_of_ranks(2000, 1000)
    expect_close("the best of 1000 out of 2000: the sum", np.sum(weights), 1.0)
    expect_refused("the best of 5 out of 4", lambda: weights_of_ranks(4, 5))
    expect_refused("the best of 0 out of 4", lambda: weights_of_ranks(4, 0))
