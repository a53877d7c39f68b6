"""Element-wise functions that a GPU computes in one pass over its memory.

A norm is several operations of PyTorch, and each of them reads what the one before has written. On
a GPU such functions wait for memory, not for arithmetic. Compiled, a function is one kernel: it
reads every input once and writes its result once. On a CPU it runs as it is written.

The numbers are those of the same formulas. The last bit may differ, since a sum may be taken in
another order.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

DEVICES = {"cuda"}  # kinds of devices for which functions are compiled

# How many versions of one function may be compiled: for every type, with and without gradients.
VERSIONS = 64


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, compiled at its first call with a tensor of one of DEVICES.

    The first dimension of a matrix counts tokens, and one compiled version serves every count.
    """

    @wraps(function)
    def call(*inputs: object) -> Tensor:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        device = tensors[0].device.type
        if device not in DEVICES or not compiles(device):
            return function(*inputs)
        for tensor in tensors:
            if tensor.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(function)(*inputs)

    return call


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function; nothing is compiled before it is called."""
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


@cache
def compiles(device: str) -> bool:
    """Whether torch can compile for this kind of device here; if it cannot, that is said once."""
    try:
        torch.compile(torch.square)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler raises
        print(
            "norms and activations run unfused, which is slower: torch cannot compile them here "
            f"({type(error).__name__})",
            file=sys.stderr,
        )
        return False
    return True
