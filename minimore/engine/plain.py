"""One training step. Here: what both engines share, and the plain one, autograd over the whole model. streamed.py has the other.

K sources, B pairs in a step, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.pairs import PairBatch, TokenPair, pack_pairs, split_by_tokens
from ..model.trunk import RECOMPUTE
from ..more import bradley_terry_losses, head_gradients, weighted_loss
from ..options import InputError
from ..reward import RewardModel
from .optim import MOMENTS, PARAMETERS, AdamW

Step = tuple[Tensor, Tensor, Tensor, Tensor]  # z_chosen, z_rejected (B, D); weights (K,); loss ()
ENGINES, OFFLOADS = ("plain", "streamed"), ("inputs", "states")


@dataclass(frozen=True)
class Recipe:
    """How a step is carried out: memory against time. Beyond rounding, only the storage of parameters and moments, and clipping, change its result."""

    engine: str = "plain"
    parameters: str = "float32"
    moments: str = "float32"
    recompute: str = "none"
    offload: tuple[str, ...] = ()
    micro_tokens: int = 8192
    max_grad_norm: float | None = None

    def check(self):
        """Refuse what contradicts itself (InputError)."""
        plain, known = (
            self.engine == "plain",
            {
                "engine": ENGINES,
                "parameters": PARAMETERS,
                "moments": MOMENTS,
                "recompute": RECOMPUTE,
            },
        )
        refuse = [
            *(
                (
                    getattr(self, name) not in values,
                    f"--{name} {getattr(self, name)}: expected one of {', '.join(values)}",
                )
                for name, values in known.items()
            ),
            (self.micro_tokens < 1, f"--micro-tokens {self.micro_tokens}: expected at least 1"),
            (
                self.max_grad_norm is not None and not self.max_grad_norm > 0,
                f"--max-grad-norm {self.max_grad_norm}: expected more than 0",
            ),
            (
                plain and self.parameters != "float32",
                f"--parameters {self.parameters} needs --engine streamed: the plain engine's gradients are of the parameters' type, "
                "and bfloat16 gradients do not add up",
            ),
            (
                plain and self.offload,
                f"--offload {self.offload[0] if self.offload else ''} needs --engine streamed: the plain engine needs everything at once",
            ),
            (
                "inputs" in self.offload and self.recompute != "full",
                f"--offload inputs needs --recompute full: with --recompute {self.recompute} more than the blocks' inputs is kept",
            ),
            (
                not plain and self.max_grad_norm is not None,
                "--max-grad-norm needs --engine plain: the streamed engine has changed the last blocks before it "
                "knows the gradient of the first",
            ),
        ]
        for wrong, message in refuse:
            if wrong:
                raise InputError(message)

    def __str__(self):
        """The recipe as options of the command."""
        words = [
            f"--engine {self.engine}",
            f"--parameters {self.parameters}",
            f"--moments {self.moments}",
            f"--recompute {self.recompute}",
            *(f"--offload {what}" for what in self.offload),
            f"--micro-tokens {self.micro_tokens}",
        ]
        return " ".join(
            words
            + (
                [f"--max-grad-norm {self.max_grad_norm:g}"]
                if self.max_grad_norm is not None
                else []
            )
        )


@dataclass(frozen=True)
class Weighing:
    """How the sources' losses become one: `weigh` is one of more.WEIGHTINGS with its state."""

    sources: int
    weigh: Callable
    method: str = "more"
    scope: str = "step"  # solve over the whole step, or per "group" of one pair a source
    sampling: str = "equal"
    smoothing: float = 0.0

    def loss(
        self, head: Tensor, z_chosen: Tensor, z_rejected: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss () of these pairs and its weights (K,), detached; under scope `group` both are means over groups."""
        loss, mean_weights = 0.0, 0.0
        size = self.sources if self.scope == "group" else len(source)
        for zc, zr, s in zip(
            z_chosen.split(size), z_rejected.split(size), source.split(size)
        ):  # once, without groups
            losses = bradley_terry_losses(
                head, zc, zr, s, self.sources, self.smoothing
            )  # (K,)   Eq. 1
            gradients = head_gradients(
                head, zc, zr, s, self.sources, self.smoothing
            )  # (K, D) closed form
            require_finite(losses + gradients.abs().amax(1), s)
            weights = self.weigh(
                losses, gradients, torch.bincount(s, minlength=self.sources)
            )  # (K,) on the simplex
            loss = loss + weighted_loss(weights, losses) * (len(s) / len(source))  # ()     Eq. 7
            mean_weights = mean_weights + weights * (len(s) / len(source))
        return loss, mean_weights.detach()


# ---- the plain engine --------------------------------------------------------------------------------------------------


def step(
    model: RewardModel, batches: Sequence[PairBatch], how: Weighing, share: float = 1.0
) -> Step:
    """Add the gradient of share x the weighted loss of these pairs to the parameters; weights over all of them at once.

    batches: consecutive micro-batches. Several of them cost one more forward: a first pass without a graph gives every
    pair's hidden state, the loss is differentiated down to these, and a second pass carries that on, batch by batch.
    Returns z_chosen, z_rejected; share x weights and loss.
    """
    several = len(batches) > 1
    with torch.set_grad_enabled(not several):
        features = [model.features(batch) for batch in batches]
    z_chosen, z_rejected = (torch.cat(side) for side in zip(*features))  # (B, D) fp32 each
    if several:
        z_chosen.requires_grad_(), z_rejected.requires_grad_()
    source = torch.cat([batch.source for batch in batches]).to(z_chosen.device)  # (B,)
    loss, weights = how.loss(model.head, z_chosen, z_rejected, source)
    (loss * share).backward()

    if several:
        sizes = [len(batch.source) for batch in batches]
        for batch, *gradient in zip(
            batches, z_chosen.grad.split(sizes), z_rejected.grad.split(sizes)
        ):
            torch.autograd.backward(model.features(batch), gradient)
    return z_chosen.detach(), z_rejected.detach(), weights * share, loss.detach() * share


def plain_step(
    model: RewardModel,
    pairs: Sequence[TokenPair],
    source: Sequence[int],
    how: Weighing,
    micro_tokens: int,
) -> Step:
    """The gradient of one optimizer step, cut into micro-batches.

    How it may be cut depends on what the weights must see. A group of one pair a source stands alone under scope `group`; any
    number of such groups does under uniform weights and equal shares, and any number of pairs under proportional weights.
    Everything else is solved over the whole step.
    """
    grouped = how.scope == "group" or (how.method == "uniform" and how.sampling == "equal")
    batches = cut(pairs, source, micro_tokens, how.sources if grouped else 1)
    if not grouped and how.method != "proportional":
        return step(model, batches, how)
    done = [step(model, [batch], how, len(batch.source) / len(pairs)) for batch in batches]
    z_chosen, z_rejected, weights, loss = zip(*done)
    return torch.cat(z_chosen), torch.cat(z_rejected), sum(weights), sum(loss)


def cut(
    pairs: Sequence[TokenPair], source: Sequence[int], micro_tokens: int, unit: int = 1
) -> list[PairBatch]:
    """Consecutive batches of at most micro_tokens tokens, never cut inside a unit of pairs."""
    parts = split_by_tokens([p.tokens for p in pairs], micro_tokens, unit)
    return [
        pack_pairs(pairs[part.start : part.stop], source[part.start : part.stop]) for part in parts
    ]


class PlainEngine:
    """Forward, backward, update, one after the other, over the whole model."""

    def __init__(self, model: RewardModel, optimizer: AdamW, recipe: Recipe):
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        model.trunk.recompute = recipe.recompute

    def step(self, pairs: Sequence[TokenPair], source: Sequence[int], how: Weighing) -> Step:
        """One optimizer step on B pairs; source: the source of each. Raises NonFiniteLoss, or NonFiniteGradient."""
        done = plain_step(self.model, pairs, source, how, self.recipe.micro_tokens)
        if not torch.stack([largest(p.grad) for p in self.model.parameters()]).isfinite().all():
            raise NonFiniteGradient
        if self.recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        for name, p in self.model.named_parameters():
            self.optimizer.update(name, p, p.grad)
            p.grad = None
        self.optimizer.steps += 1
        return done

    def settle(self):
        """Nothing is under way after a plain step."""


# ---- what is not a number ----------------------------------------------------------------------------------------------


class NonFiniteLoss(FloatingPointError):
    """The loss of source number `source`, or its gradient, is infinite or not a number."""

    def __init__(self, source: int):
        self.source = source


class NonFiniteGradient(FloatingPointError):
    """Every loss is finite, the gradient of a parameter is not. With the streamed engine blocks may have been changed already."""


def largest(gradient: Tensor) -> Tensor:
    """The largest absolute value; NaN where there is one."""
    return torch.linalg.vector_norm(gradient, torch.inf)


def require_finite(values: Tensor, source: Tensor):
    """Raise NonFiniteLoss for the first source in the batch whose value (K,) is not finite."""
    values = values.tolist()
    for k in source.unique().tolist():
        if not math.isfinite(values[k]):
            raise NonFiniteLoss(k)
