"""The one minimiser of all methods: L-BFGS over all pairs at once.

It has no learning rate to choose, so that no method is better tuned than another.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Parameters = dict[str, Tensor]  # of a method, by name
Loss = Callable[[Parameters], Tensor]  # parameters -> ()

# Of the squares of all parameters, beside a mean loss: thirty pairs of forty words can be separated
# by a hyperplane, and their loss falls for ever as the head grows.
PRIOR = 1e-4


def penalty(parameters: Parameters, prior: float) -> Tensor:
    """prior / 2 times the sum of squares of all parameters: ()."""
    return prior / 2 * torch.stack([value.square().sum() for value in parameters.values()]).sum()


def solve(loss: Loss, start: Parameters, prior: float = PRIOR, iterations: int = 200) -> Parameters:
    """The parameters that minimise loss + penalty, from a start on.

    Every step lowers it (strong Wolfe conditions). Source: Nocedal and Wright 2006, algorithm 7.5;
    torch.optim.LBFGS.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(leaves) + penalty(leaves, prior)
        value.backward()
        return value

    optimizer.step(evaluate)  # type: ignore[arg-type]  # it may return a tensor
    return {name: value.detach() for name, value in leaves.items()}
