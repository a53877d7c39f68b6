"""What a training step minimises: from states of the trunk to a loss.

An engine knows a model, which is a trunk with one parameter on top, and an objective. It cuts the
items of a step into batches with the objective, computes the final states at the tokens that each
batch reads, and gives all of them to the objective, which returns a loss with a graph:

    items -> objective.batches -> trunk -> states (M, D) -> objective.loss -> loss, result

The reward objective is below. A new idea about losses is a new objective; a new idea about memory
is a recipe (recipe.py), and knows no loss.

K sources, B pairs in a step, M tokens that are read, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.labels import ONE_VOTE, Label
from ..data.pairs import PairBatch, TokenPair, pack_pairs, split_by_tokens
from ..model.attention import Stream
from ..model.trunk import Trunk
from ..more import SEPARABLE, Labels, bradley_terry_losses, head_gradients, weighted_loss


class Model(Protocol):
    """A trunk with one parameter on top: the reward head, or the unembedding."""

    trunk: Trunk

    @property
    def top(self) -> Tensor:
        """The parameter on top; it may be the trunk's embedding."""


class Batch(Protocol):
    """Some of a step's items as one stream."""

    stream: Stream

    @property
    def reads(self) -> Tensor:
        """(M,) the places of the tokens whose final states the objective needs."""

    @property
    def size(self) -> int:
        """Its weight in a mean over batches: of how many single losses its loss is the mean."""


class Objective(Protocol):
    """What is minimised."""

    @property
    def unit(self) -> int | None:
        """How many consecutive items may be finished on their own; None if only the whole step."""

    def batches(
        self, items: Sequence[Any], source: Sequence[int], micro_tokens: int, unit: int = 1
    ) -> list[Any]:
        """Consecutive batches of at most micro_tokens tokens, never cut inside a unit of items."""

    def loss(self, top: Tensor, states: Tensor, batches: Sequence[Any]) -> tuple[Tensor, Any]:
        """The loss () of some batches with its graph, and a result that says what happened.

        top: the parameter on top; states: (M, D), those of all batches one after the other. The
        result has `times` and `of_parts`, as StepResult has.
        """


class StepResult(NamedTuple):
    """What a step saw at the head, before its update.

    head: (D,); z_chosen, z_rejected: (B, D) features; weights: (K,) lambda, the mean over groups
    under scope `group`; loss: ().
    """

    head: Tensor
    z_chosen: Tensor
    z_rejected: Tensor
    weights: Tensor
    loss: Tensor

    def times(self, share: float) -> "StepResult":
        """The same with its share of a step's weights and loss."""
        return self._replace(weights=self.weights * share, loss=self.loss * share)

    @classmethod
    def of_parts(cls, parts: Sequence["StepResult"]) -> "StepResult":
        """The result of a step from those of its parts, each with its share of weights and loss."""
        (head, *_), z_chosen, z_rejected, weights, loss = zip(*parts)
        return cls(head, torch.cat(z_chosen), torch.cat(z_rejected), sum(weights), sum(loss))


# (losses (K,), gradients (K, D), pairs (K,)) -> weights (K,)
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RewardObjective:
    """How the losses of K sources become one loss.

    weigh: (losses (K,), gradients (K, D), pairs (K,)) -> weights (K,), one of more.WEIGHTINGS with
    its state. method: its name there. scope: "step" solves the weights over the whole step, "group"
    over every group of one pair a source. smoothing: the share of labels taken as the wrong way
    round. over_all: the gradients are those of the whole model (whole.py), not of the head alone.
    """

    sources: int
    weigh: Weigh
    method: str = "more"
    scope: str = "step"
    sampling: str = "equal"
    smoothing: float = 0.0
    over_all: bool = False

    def batches(
        self, pairs: Sequence[TokenPair], source: Sequence[int], micro_tokens: int, unit: int = 1
    ) -> list[PairBatch]:
        """Consecutive batches of at most micro_tokens tokens, never cut inside a unit of pairs.

        With over_all, a batch holds pairs of one source alone.
        """
        if not self.over_all:
            return micro_batches(pairs, source, micro_tokens, unit)
        batches, start = [], 0
        for k, run in groupby(source):
            stop = start + len(list(run))
            batches += micro_batches(pairs[start:stop], [k] * (stop - start), micro_tokens, unit)
            start = stop
        return batches

    def loss(
        self, head: Tensor, z: Tensor, batches: Sequence[PairBatch]
    ) -> tuple[Tensor, StepResult]:
        """The weighted loss () of the pairs of these batches, and what the step saw.

        head: (D,); z: (2B, D), the features of the chosen and the rejected text of each pair in
        turn. The weights are solved over all pairs at once; under scope `group`, loss and weights
        are means over the groups. Raises NonFiniteLoss.
        """
        z_chosen, z_rejected = z[0::2], z[1::2]
        source = torch.cat([batch.source for batch in batches]).to(z.device)
        K, size = self.sources, self.sources if self.scope == "group" else len(source)
        labels = labels_of([label for batch in batches for label in batch.labels], head)
        mean_loss, mean_weights = torch.zeros_like(head[0]), head.new_zeros(K)
        for z_c, z_r, s, own_labels in zip(
            z_chosen.split(size),
            z_rejected.split(size),
            source.split(size),
            repeat(None) if labels is None else labels.split(size),
        ):
            losses, weights = self.losses_and_weights(head, z_c, z_r, s, own_labels)
            loss = weighted_loss(weights, losses)  # ()  Eq. 7
            share = len(s) / len(source)
            mean_loss = mean_loss + loss * share
            mean_weights = mean_weights + weights * share
        result = StepResult(
            head.detach().clone(),
            z_chosen.detach(),
            z_rejected.detach(),
            mean_weights.detach(),
            mean_loss.detach(),
        )
        return mean_loss, result

    def losses_and_weights(
        self,
        head: Tensor,
        z_chosen: Tensor,
        z_rejected: Tensor,
        source: Tensor,
        labels: Labels | None,
    ) -> tuple[Tensor, Tensor]:
        """The losses of the sources and their weights, both (K,). Raises NonFiniteLoss.

        Shapes as in `more.bradley_terry_losses`.
        """
        K = self.sources
        pairs = (head, z_chosen, z_rejected, source, K, self.smoothing, labels)
        losses = bradley_terry_losses(*pairs)  # (K,)  Eq. 1
        gradients = head_gradients(*pairs)  # (K, D)  Eq. 8
        require_finite(losses + gradients.abs().amax(1), source)
        counts = torch.bincount(source, minlength=K)
        return losses, self.weigh(losses, gradients, counts)  # λ on the simplex

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


def labels_of(labels: Sequence[Label], head: Tensor) -> Labels | None:
    """The labels of B pairs as tensors where the head is; None if each is one vote for chosen."""
    if all(label == ONE_VOTE for label in labels):
        return None
    share, _, margin, weight = torch.tensor(labels, dtype=head.dtype, device=head.device).T
    return Labels(share, margin, weight)


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


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm () of all gradients together: the root of the sum of their squares.

    It is finite if they all are, unless a square overflows, which AdamW's second moment would, too.
    """
    return torch.nn.utils.get_total_norm(gradients)


def require_finite(values: Tensor, source: Tensor) -> None:
    """Raise NonFiniteLoss for the first source in the batch whose value (K,) is not finite."""
    numbers = values.tolist()
    for k in source.unique().tolist():
        if not math.isfinite(numbers[k]):
            raise NonFiniteLoss(k)
