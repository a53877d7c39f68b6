"""The plain engine: autograd over the whole model, then the optimizer.

It is the oracle that the streamed engine is tested against.

M tokens that are read, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .objective import Batch, NonFiniteGradient, Objective, global_norm
from .optim import AdamW
from .recipe import Recipe


class PlainEngine:
    """Forward, backward and update, one after the other, over the whole model.

    What may be finished on its own is a part of the step: a micro-batch, or all items at once.

        a part of one micro-batch    forward -> loss -> backward
        a part of several            forward without a graph -> loss -> gradient of the states
                                     -> forward and backward again, one micro-batch at a time

    Where the head alone is trained, no part goes through the trunk again. Of frozen blocks autograd
    keeps nothing (trained.py).
    """

    def __init__(self, model: Any, optimizer: AdamW, recipe: Recipe):
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        model.trunk.recompute = recipe.recompute

    def step(self, items: Sequence[Any], source: Sequence[int], objective: Objective) -> Any:
        """One optimizer step on some items; source: the source of each. Returns the result.

        Raises NonFiniteLoss, or NonFiniteGradient before anything is updated.
        """
        self.model.zero_grad()  # of a step that could not be taken
        unit = objective.unit  # None: no part of the step has a loss of its own
        batches = objective.batches(items, source, self.recipe.micro_tokens, unit or 1)
        parts = [batches] if unit is None else [[batch] for batch in batches]
        step_size = sum(batch.size for batch in batches)
        results = []
        for part in parts:
            states = self._states(part)  # (M, D)
            loss, result = objective.loss(computed_with(self.model), states, part)
            share = sum(batch.size for batch in part) / step_size
            (loss * share).backward()  # reaches the trunk if the part is one batch, else `states`
            if len(part) > 1 and states.requires_grad:
                self._carry_on(part, gradient_of(states))
            results.append(result.times(share))
        self._update()
        return type(results[0]).of_parts(results)

    def _states(self, part: Sequence[Batch]) -> Tensor:
        """States at all tokens that a part reads: (M, D). Several micro-batches get no graph.

        They are where their graph begins, if anything below them is trained.
        """
        if len(part) == 1:
            return self._states_of(part[0])
        with torch.no_grad():
            states = [self._states_of(batch) for batch in part]
        is_needed = any(p.requires_grad for p in self.model.trunk.parameters())
        return torch.cat(states).requires_grad_(is_needed)

    def _states_of(self, batch: Batch) -> Tensor:
        device = self.model.top.device
        stream = batch.stream.to(device)
        if batch.reads is batch.stream.last:
            return self.model.trunk(stream)
        return self.model.trunk.states_at(stream, batch.reads.to(device))

    def _carry_on(self, part: Sequence[Batch], d_states: Tensor) -> None:
        """Carry the gradient of the states on to the parameters, one micro-batch at a time."""
        for batch, d in zip(part, d_states.split([len(batch.reads) for batch in part])):
            torch.autograd.backward(self._states_of(batch), d)

    def _update(self) -> None:
        """Let the optimizer change what is trained by its gradient, and drop the gradients."""
        named = self.model.named_parameters()
        parameters = {name: p for name, p in named if p.requires_grad}
        gradients = {name: gradient_of(p) for name, p in parameters.items()}
        if not self._is_finite(gradients):
            raise NonFiniteGradient
        if self.recipe.max_grad_norm is not None:
            self._clip(gradients, self.recipe.max_grad_norm)
        for name, parameter in parameters.items():
            self.optimizer.update(name, parameter, gradients.pop(name))
            parameter.grad = None
        self.optimizer.steps += 1

    def _is_finite(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether all gradients are finite; by their names."""
        return bool(global_norm(list(gradients.values())).isfinite())

    def _clip(self, gradients: Mapping[str, Tensor], most: float) -> None:
        """Scale the gradients down, in place, to a global norm of at most `most`."""
        norm = global_norm(list(gradients.values()))
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)

    def settle(self) -> None:
        """Nothing is under way after a plain step."""


def computed_with(model: Any) -> Tensor:
    """The parameter on top as it is computed with: a matrix in the compute type, a vector as is."""
    return model.top.to(model.trunk.compute_dtype) if model.top.ndim > 1 else model.top


def gradient_of(tensor: Tensor) -> Tensor:
    """The `.grad` that backward has left."""
    assert tensor.grad is not None
    return tensor.grad
