"""Recomputation: what the forward pass keeps of a block, and what backward computes again.

The gradient of a function needs numbers from the forward pass: a matrix product needs its input, an
activation needs what entered it. Keeping them all is fast and takes the most memory. Each of them
can be dropped, and computed again when backward comes by.

    x -> norm -> n -> q, k, v -> attention -> a -> + -> x'
    x' -> norm -> n' -> up -> u -> activation -> h -> down -> + -> the next block's input

                 x     n     q, k, v     a     x'     n'     u     h      computed twice
    none         #     #        #        #     #      #      #     #      nothing
    selective    #     .        #        #     #      .      #     .      norms and activations
    full         #     .        .        .     .      .      .     .      the whole block

    #  kept from the forward pass to backward
    .  dropped, and computed again in backward

x is the block's input, n and n' are what leaves the norms, a is the result of attention, x' is the
residual between attention and MLP (a parallel block has none), u enters the activation of the MLP
(gate and up where it is gated), and h leaves it. `none` also keeps what norms need inside, and h
alone where the activation is relu. Where norms stand behind attention and MLP, what enters them is
kept by `none` and by `selective`; without norms before, n is x and n' is x'.

The numbers that come out are the same to the bit on a CPU, since the same operations run on the
same inputs. On a GPU blocks are compiled (fused.py) and the last bits may differ. Not so under
`selective`: a compiler would decide by itself what is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .attention import Stream
from .fused import as_written

RECOMPUTE = ("none", "selective", "full")


def run_block(
    block: Callable[..., Tensor],
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    stream: Stream,
    recompute: str,
) -> Tensor:
    """block(x, rotation, stream), keeping for backward what `recompute` says, one of RECOMPUTE."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(x, rotation, stream)
    if recompute == "full":
        return checkpoint(block, x, rotation, stream, use_reentrant=False, preserve_rng_state=False)
    with selective():
        return block(x, rotation, stream)


# ---- selective -----------------------------------------------------------------------------------

_is_selective = ContextVar("_is_selective", default=False)


class Recomputed:
    """What the graph holds in the place of a tensor: the function and the inputs that made it.

    It is computed at most once, however many products read it.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.function, self.inputs = function, inputs
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """The same numbers as in the forward pass, without a graph."""
        if self._tensor is None:
            with torch.no_grad():
                self._tensor = self.function(*self.inputs)
        return self._tensor


def save(tensor: Tensor) -> Tensor | Recomputed:
    """What the graph is to hold of a tensor that an operation wants to find again in backward."""
    if hasattr(tensor, "recomputed"):
        return tensor.recomputed
    return tensor.detach()  # a result that held its own graph would never be freed


def load(saved: Tensor | Recomputed) -> Tensor:
    """The tensor that was saved."""
    return saved.tensor() if isinstance(saved, Recomputed) else saved


@contextmanager
def selective() -> Iterator[None]:
    """Inside, `cheap` functions are computed again in backward, and their results are not kept."""
    token = _is_selective.set(True)
    try:
        with saved_tensors_hooks(save, load), as_written():
            yield
    finally:
        _is_selective.reset(token)


def cheap(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), for a function that costs little to compute: a norm, an activation.

    Outside `selective` that is all. Inside, two things are dropped after the forward pass. First,
    what the function needs inside for its own gradient: `checkpoint` keeps its inputs instead.
    Second, its result, which the matrix products behind it would keep as their input: the result
    carries a `Recomputed`, and `save` gives this to the graph instead.
    """
    if torch.compiler.is_compiling():  # which is never under `selective`, and cannot read it
        return function(*inputs)
    if not _is_selective.get() or isinstance(function, nn.Identity):
        return function(*inputs)
    result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    result.recomputed = Recomputed(function, inputs)
    return result
