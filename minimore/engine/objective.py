"""What a training step minimises: from the reward model's features to a loss and its weights.

K sources, B pairs in a step, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.pairs import PairBatch, TokenPair, pack_pairs, split_by_tokens
from ..more import SEPARABLE, bradley_terry_losses, head_gradients, weighted_loss


class StepResult(NamedTuple):
    """What a step saw at the head, before its update.

    z_chosen, z_rejected: (B, D) features; weights: (K,) lambda, the mean over groups under scope
    `group`; loss: ().
    """

    z_chosen: Tensor
    z_rejected: Tensor
    weights: Tensor
    loss: Tensor

    @classmethod
    def of_parts(cls, parts: Sequence["StepResult"]) -> "StepResult":
        """The result of a step from those of its parts, each with its share of weights and loss."""
        z_chosen, z_rejected, weights, loss = zip(*parts)
        return cls(torch.cat(z_chosen), torch.cat(z_rejected), sum(weights), sum(loss))


@dataclass(frozen=True)
class RewardObjective:
    """How the losses of K sources become one loss.

    weigh: (losses (K,), gradients (K, D), pairs (K,)) -> weights (K,), one of more.WEIGHTINGS with
    its state. method: its name there. scope: "step" solves the weights over the whole step, "group"
    over every group of one pair a source. smoothing: the share of labels taken as the wrong way
    round.
    """

    sources: int
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    method: str = "more"
    scope: str = "step"
    sampling: str = "equal"
    smoothing: float = 0.0

    def loss(
        self, head: Tensor, z_chosen: Tensor, z_rejected: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss () of these pairs, and its weights (K,), detached.

        head: (D,); z_chosen, z_rejected: (B, D); source: (B,). The loss is solved over all pairs at
        once; under scope `group`, loss and weights are means over the groups. Raises NonFiniteLoss.
        """
        K, size = self.sources, self.sources if self.scope == "group" else len(source)
        mean_loss, mean_weights = torch.zeros_like(head[0]), head.new_zeros(K)
        for z_c, z_r, s in zip(z_chosen.split(size), z_rejected.split(size), source.split(size)):
            losses = bradley_terry_losses(head, z_c, z_r, s, K, self.smoothing)  # (K,)  Eq. 1
            gradients = head_gradients(head, z_c, z_r, s, K, self.smoothing)  # (K, D)  Eq. 8
            require_finite(losses + gradients.abs().amax(1), s)
            counts = torch.bincount(s, minlength=K)
            weights = self.weigh(losses, gradients, counts)  # (K,) on the simplex
            loss = weighted_loss(weights, losses)  # ()  Eq. 7
            share = len(s) / len(source)
            mean_loss = mean_loss + loss * share
            mean_weights = mean_weights + weights * share
        return mean_loss, mean_weights.detach()

    @property
    def unit(self) -> int | None:
        """How many consecutive pairs may be weighted on their own; None if only the whole step may.

        A step of which parts may be weighted apart is cut into micro-batches that are finished one
        after the other. Any other step needs all features before its weights are known.
        """
        if self.scope == "group":
            return self.sources
        separable = SEPARABLE.get(self.method)
        if separable == "groups":  # equal shares in every group, so equal sampling only
            return self.sources if self.sampling == "equal" else None
        return 1 if separable == "pairs" else None


def micro_batches(
    pairs: Sequence[TokenPair], source: Sequence[int], micro_tokens: int, unit: int = 1
) -> list[PairBatch]:
    """Consecutive batches of at most micro_tokens tokens, never cut inside a unit of pairs."""
    return [
        pack_pairs(pairs[part.start : part.stop], source[part.start : part.stop])
        for part in split_by_tokens([pair.tokens for pair in pairs], micro_tokens, unit)
    ]


# ---- numbers that are not finite -----------------------------------------------------------------


class NonFiniteLoss(FloatingPointError):
    """The loss of source number `source`, or its gradient, is infinite or not a number."""

    def __init__(self, source: int):
        self.source = source


class NonFiniteGradient(FloatingPointError):
    """Every loss is finite, but the gradient of a parameter is not.

    With the streamed engine some blocks may have been changed already.
    """


def largest(gradients: Sequence[Tensor]) -> Tensor:
    """The largest absolute value in all of these gradients, (); NaN where there is one."""
    return torch.nn.utils.get_total_norm(gradients, torch.inf)


def require_finite(values: Tensor, source: Tensor) -> None:
    """Raise NonFiniteLoss for the first source in the batch whose value (K,) is not finite."""
    numbers = values.tolist()
    for k in source.unique().tolist():
        if not math.isfinite(numbers[k]):
            raise NonFiniteLoss(k)
