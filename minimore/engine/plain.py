"""The plain engine: autograd over the whole model, then the optimizer.

It is the oracle that the streamed engine is tested against.

K sources, B pairs in a step, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.pairs import PairBatch, TokenPair
from ..reward import RewardModel
from .objective import NonFiniteGradient, RewardObjective, StepResult, largest, micro_batches
from .optim import AdamW
from .recipe import Recipe


class PlainEngine:
    """Forward, backward and update, one after the other, over the whole model.

    What may be weighted on its own is a part of the step: a micro-batch, or all pairs at once.

        a part of one micro-batch    forward -> loss -> backward
        a part of several            forward without a graph -> loss -> gradient of the features
                                     -> forward and backward again, one micro-batch at a time
    """

    def __init__(self, model: RewardModel, optimizer: AdamW, recipe: Recipe):
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        model.trunk.recompute = recipe.recompute

    def step(
        self, pairs: Sequence[TokenPair], source: Sequence[int], objective: RewardObjective
    ) -> StepResult:
        """One optimizer step on B pairs; source: (B,) the source of each.

        Raises NonFiniteLoss, or NonFiniteGradient before anything is updated.
        """
        unit = objective.unit
        batches = micro_batches(pairs, source, self.recipe.micro_tokens, unit or 1)
        parts = [batches] if unit is None else [[batch] for batch in batches]
        results = []
        for part in parts:
            z_chosen, z_rejected = self._features(part)  # (B, D)
            part_source = torch.cat([batch.source for batch in part]).to(z_chosen.device)
            loss, weights = objective.loss(self.model.head, z_chosen, z_rejected, part_source)
            share = len(part_source) / len(pairs)
            (loss * share).backward()
            if len(part) > 1:
                self._carry_on(part, gradient_of(z_chosen), gradient_of(z_rejected))
            results.append(
                StepResult(
                    z_chosen.detach(), z_rejected.detach(), weights * share, loss.detach() * share
                )
            )
        self._update()
        return StepResult.of_parts(results)

    def _features(self, part: Sequence[PairBatch]) -> tuple[Tensor, Tensor]:
        """Features of all pairs of a part: two (B, D). Several micro-batches get no graph."""
        if len(part) == 1:
            return self.model.features(part[0])
        with torch.no_grad():
            features = [self.model.features(batch) for batch in part]
        z_chosen, z_rejected = (torch.cat(side).requires_grad_() for side in zip(*features))
        return z_chosen, z_rejected

    def _carry_on(self, part: Sequence[PairBatch], d_chosen: Tensor, d_rejected: Tensor) -> None:
        """Carry the gradient of the features on to the parameters, one micro-batch at a time."""
        sizes = [len(batch.source) for batch in part]
        for batch, d_c, d_r in zip(part, d_chosen.split(sizes), d_rejected.split(sizes)):
            torch.autograd.backward(self.model.features(batch), (d_c, d_r))

    def _update(self) -> None:
        """Let the optimizer change every parameter by its gradient, and drop the gradients."""
        parameters = dict(self.model.named_parameters())
        if not largest([gradient_of(p) for p in parameters.values()]).isfinite():
            raise NonFiniteGradient
        if self.recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.recipe.max_grad_norm)
        for name, parameter in parameters.items():
            self.optimizer.update(name, parameter, gradient_of(parameter))
            parameter.grad = None
        self.optimizer.steps += 1

    def settle(self) -> None:
        """Nothing is under way after a plain step."""


def gradient_of(tensor: Tensor) -> Tensor:
    """The `.grad` that backward has left."""
    assert tensor.grad is not None
    return tensor.grad
