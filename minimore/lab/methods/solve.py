"""The one minimiser of all methods: L-BFGS over all pairs at once.

It has no learning rate to choose, so that no method is better tuned than another.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Parameters = dict[str, Tensor]  # of a method, by name
Loss = Callable[[Parameters], Tensor]  # parameters -> ()
Steps = deque[tuple[np.ndarray, np.ndarray]]  # recent steps, and how the gradient changed by each

# Of the squares of all parameters, beside a mean loss: thirty pairs of forty words can be separated
# by a hyperplane, and their loss falls for ever as the head grows.
PRIOR = 1e-3

SMALL_GRADIENT = 1e-7  # its largest entry, at which the search ends
SMALL_FALL = 1e-12  # of the loss in one step, at which it ends, too
SMALLEST_STEP = 1e-10  # share of a step; where even this does not help, rounding has won
REMEMBERED = 10  # steps, whose changes of the gradient stand for the curvature


def penalty(value: Tensor, prior: float) -> Tensor:
    """prior / 2 times the sum of squares: ()."""
    return prior / 2 * value.square().sum()


def solve(loss: Loss, start: Parameters, prior: float = PRIOR, iterations: int = 200) -> Parameters:
    """The parameters that minimise loss + penalty, from a start on. Every step lowers it.

    Source: Nocedal and Wright 2006, algorithms 7.5 and 3.1 (a step is halved until it helps).
    """

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        """The penalised loss at a point, and its gradient."""
        leaf = torch.from_numpy(point).requires_grad_()
        value = loss(unpacked(leaf, start)) + penalty(leaf, prior)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.numpy()

    point = torch.cat([value.reshape(-1) for value in start.values()]).numpy()
    value, gradient = evaluate(point)
    steps: Steps = deque(maxlen=REMEMBERED)
    for _ in range(iterations):
        direction = descent(gradient, steps)
        slope, share = direction @ gradient, 1.0
        while share > SMALLEST_STEP:
            next_value, next_gradient = evaluate(point + share * direction)
            if next_value <= value + 1e-4 * share * slope:
                break
            share /= 2
        else:
            break
        step, change = share * direction, next_gradient - gradient
        if step @ change > 0:  # else the curvature along it is negative, which cannot be used
            steps.append((step, change))
        fall = value - next_value
        point, value, gradient = point + step, next_value, next_gradient
        if fall < SMALL_FALL or np.abs(gradient).max() < SMALL_GRADIENT:
            break
    return unpacked(torch.from_numpy(point), start)


def unpacked(point: Tensor, like: Parameters) -> Parameters:
    """A flat vector as parameters of these shapes."""
    parts = point.split([value.numel() for value in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts)}


def descent(gradient: np.ndarray, steps: Steps) -> np.ndarray:
    """Minus the gradient, multiplied by an estimate of the inverse Hessian.

    The first direction has at most the length 1. Source: algorithm 7.4, the two-loop recursion.
    """
    if not steps:
        return -gradient / max(1.0, np.linalg.norm(gradient))
    direction, shares = -gradient, []
    for step, change in reversed(steps):
        shares.append((step @ direction) / (step @ change))
        direction = direction - shares[-1] * change
    step, change = steps[-1]
    direction = direction * (step @ change) / (change @ change)
    for (step, change), share in zip(steps, reversed(shares)):
        direction = direction + (share - (change @ direction) / (step @ change)) * step
    return direction
