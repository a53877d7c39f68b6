"""One training step: the plain engine, autograd on one device. The gradient of a whole step, in micro-batches if need be.

K sources, B pairs in a step, D width.
"""

import math
from typing import Callable, Sequence

import torch
from torch import Tensor

from .more import bradley_terry_losses, head_gradients, weighted_loss
from .pairs import PairBatch, TokenPair, pack_pairs, split_by_tokens
from .reward import RewardModel

Step = tuple[Tensor, Tensor, Tensor, Tensor]     # z_chosen, z_rejected (B, D); weights (K,); loss ()


def step(model: RewardModel, batches: Sequence[PairBatch], sources: int, weigh: Callable, group: int | None = None,
         share: float = 1.0, smoothing: float = 0.0) -> Step:
    """Add the gradient of share x the weighted loss of these pairs to the parameters; weights over all of them at once.

    batches: consecutive micro-batches. Several of them cost one more forward: a first pass without a graph gives every
    pair's hidden state, the loss is differentiated down to these, and a second pass carries that on, batch by batch.
    group: solve per so many consecutive pairs instead, and average. Returns z_chosen, z_rejected; share x weights and loss.
    """
    several = len(batches) > 1
    with torch.set_grad_enabled(not several):
        features = [model.features(batch) for batch in batches]
    z_chosen, z_rejected = (torch.cat(side) for side in zip(*features))                       # (B, D) fp32 each
    if several:
        z_chosen.requires_grad_(), z_rejected.requires_grad_()
    source = torch.cat([batch.source for batch in batches]).to(z_chosen.device)               # (B,)

    loss, mean_weights = 0.0, 0.0
    size = group or len(source)
    for zc, zr, s in zip(z_chosen.split(size), z_rejected.split(size), source.split(size)):   # once, without groups
        losses = bradley_terry_losses(model.head, zc, zr, s, sources, smoothing)              # (K,)   Eq. 1
        gradients = head_gradients(model.head, zc, zr, s, sources, smoothing)                 # (K, D) closed form
        require_finite(losses + gradients.abs().amax(1), s)
        weights = weigh(losses, gradients, torch.bincount(s, minlength=sources))              # (K,) on the simplex
        loss = loss + weighted_loss(weights, losses) * (len(s) / len(source))                 # ()     Eq. 7
        mean_weights = mean_weights + weights * (len(s) / len(source))
    (loss * share).backward()

    if several:
        sizes = [len(batch.source) for batch in batches]
        for batch, *gradient in zip(batches, z_chosen.grad.split(sizes), z_rejected.grad.split(sizes)):
            torch.autograd.backward(model.features(batch), gradient)
    return z_chosen.detach(), z_rejected.detach(), mean_weights.detach() * share, loss.detach() * share


def optimizer_step(model: RewardModel, pairs: Sequence[TokenPair], source: Sequence[int], sources: int, weigh: Callable, *,
                   method: str, scope: str, sampling: str, micro_tokens: int, smoothing: float = 0.0) -> Step:
    """Cut one optimizer step into micro-batches and run it.

    How it may be cut depends on what the weights must see. A group of one pair a source stands alone under scope `group`; any
    number of such groups does under uniform weights and equal shares, and any number of pairs under proportional weights.
    Everything else is solved over the whole step.
    """
    grouped = scope == "group" or (method == "uniform" and sampling == "equal")
    alone = grouped or method == "proportional"
    parts = split_by_tokens([p.tokens for p in pairs], micro_tokens, sources if grouped else 1)
    batches = [pack_pairs(pairs[part.start:part.stop], source[part.start:part.stop]) for part in parts]
    if not alone:
        return step(model, batches, sources, weigh, smoothing=smoothing)
    group = sources if scope == "group" else None
    done = [step(model, [batch], sources, weigh, group, len(batch.source) / len(pairs), smoothing) for batch in batches]
    z_chosen, z_rejected, weights, loss = zip(*done)
    return torch.cat(z_chosen), torch.cat(z_rejected), sum(weights), sum(loss)


class NonFiniteLoss(FloatingPointError):
    """The loss of source number `source`, or its gradient, is infinite or not a number."""

    def __init__(self, source: int):
        self.source = source


def require_finite(values: Tensor, source: Tensor):
    """Raise NonFiniteLoss for the first source in the batch whose value (K,) is not finite."""
    values = values.tolist()
    for k in source.unique().tolist():
        if not math.isfinite(values[k]):
            raise NonFiniteLoss(k)
