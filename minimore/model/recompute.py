"""What backward keeps of a block, and what it makes again."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .attention import Stream

RECOMPUTE = ("none", "selective", "full")


def run_block(
    block: Callable, x: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream, recompute: str
) -> Tensor:
    """block(x), keeping for backward everything (none), matrix products and attention (selective) or x alone (full)."""
    if recompute == "full" and torch.is_grad_enabled():
        return checkpoint(block, x, rotation, stream, use_reentrant=False, preserve_rng_state=False)
    if recompute == "selective" and torch.is_grad_enabled():
        with selective():
            return block(x, rotation, stream)
    return block(x, rotation, stream)


_selecting = False


@contextmanager
def selective():
    """Within, the graph keeps what `cheap` functions start from, neither their results nor what they need inside."""
    global _selecting
    before, _selecting = _selecting, True
    try:
        with saved_tensors_hooks(
            lambda tensor: getattr(tensor, "again", None) or tensor.detach(),
            lambda kept: kept() if callable(kept) else kept,
        ):
            yield
    finally:
        _selecting = before


def cheap(f, *inputs: Tensor) -> Tensor:
    """f(*inputs), for an f that costs little to compute: within `selective` it is computed again in backward."""
    if not _selecting or isinstance(f, nn.Identity):
        return f(*inputs)
    result = checkpoint(
        f, *inputs, use_reentrant=False, preserve_rng_state=False
    )  # drops what f keeps inside
    result.again = cache(
        torch.no_grad()(partial(f, *inputs))
    )  # drops the result where it is kept as an input
    return result
