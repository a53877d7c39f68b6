"""What a GPU computes in few passes over its memory.

Norms, rotations, activations and sums do little arithmetic for every number they read, so on a GPU
they wait for memory. As operations of PyTorch each of them reads what the one before has written.
Compiled, they become few kernels that read every input once and write every result once, and the
CPU, which has to start every kernel, has less to do.

A block is compiled as two functions, before and after its attention (trunk.py). On a CPU they run
as they are written.

The numbers are those of the same formulas. Roundings differ: inside a kernel nothing is rounded to
bf16, and a sum may be taken in another order.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..files import one_line

DEVICES = {"cuda"}  # kinds of devices for which functions are compiled
BACKEND = "inductor"  # of torch.compile

# How many versions of one function may be compiled: for every type, with and without gradients.
VERSIONS = 64

_as_written = ContextVar("_as_written", default=False)

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


def fused(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """The same function, compiled at its first call with a tensor of one of DEVICES.

    The first dimension of a matrix counts tokens, and one compiled version serves every count.
    Where torch cannot compile it, that is said once, and from then on every function of this device
    runs as it is written. All tensors given by place must be on one device.
    """

    @wraps(function)
    def call(*inputs: Inputs.args, **named: Inputs.kwargs) -> Result:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        device = tensors[0].device.type
        if device not in DEVICES or _as_written.get():
            return function(*inputs, **named)
        for tensor in tensors:
            if tensor.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(function)(*inputs, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            DEVICES.discard(device)  # no other function is tried
            print(
                "blocks run uncompiled, which is slower: torch cannot compile them here "
                f"({type(error).__name__}: {one_line(error)})",
                file=sys.stderr,
            )
            return function(*inputs, **named)

    return call


@contextmanager
def as_written() -> Iterator[None]:
    """Within, functions that this thread calls run as they are written on every device."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


@cache
def compiled(function: Callable) -> Callable:
    """The compiled function; nothing is compiled before it is called."""
    # torch's compiler looks at the .grad of inputs that have none, and warns of that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, backend=BACKEND)
