"""AdamW by hand. Its numbers are stored as storage.py says.

Matrices are stored as asked. Vectors (norms, biases, the head) are a ten-thousandth of the numbers,
and always in fp32. n numbers of a flat parameter.
"""

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import one_line
from ..model.trunk import replace_parameter
from .storage import (
    ROUNDED,
    SCALE_BLOCK,
    SCALES,
    empty_moments,
    join,
    key_of,
    places,
    random_bits,
    read_moments,
    round_at_random,
    split,
    write_moments,
)

State = dict[str, Tensor]  # kind -> tensor: the state of one parameter, all flat
Keys = dict[str, int] | dict[str, Tensor]  # of ROUNDED: the key of its random bits

# Numbers updated at a time: few enough for a CPU's cache, and for what an update holds in between.
SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}


class Coefficients(NamedTuple):
    """What the step number and the learning rate enter an update with: numbers, or tensors ()."""

    keep: float | Tensor  # 1 - learning rate x weight decay
    rate: float | Tensor  # learning rate / (1 - beta1^t)
    root: float | Tensor  # sqrt(1 - beta2^t)


class StepNumbers(NamedTuple):
    """What every update of one step needs, and when and where it holds."""

    step: int
    learning_rate: float
    device: torch.device | None
    coefficients: Coefficients
    keys: dict[str, Keys]  # parameter name -> its keys


def where_it_is(tensor: Tensor) -> Tensor:
    """The home of a state that stays on its device."""
    return tensor


class AdamW:
    """Decoupled weight decay, bias correction, no AMSGrad.

    Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.

    steps: how many have been taken; whoever updates all parameters adds one. state: that of each
    parameter, by name; the low halves of split parameters are state, too. seed: of the random
    rounding. What it draws is a function of seed, step, parameter and place, so no random state
    needs saving.
    """

    def __init__(
        self,
        parameters: str = "float32",
        moments: str = "float32",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ):
        self.parameters, self.moments, self.weight_decay = parameters, moments, weight_decay
        self.betas, self.eps, self.seed = betas, eps, seed
        self.steps, self.learning_rate = 0, 0.0
        self.state: dict[str, State] = {}
        self._numbers: StepNumbers | None = None

    def adopt(
        self,
        name: str,
        value: Tensor,
        home: Callable[[Tensor], Tensor] = where_it_is,
        is_trained: bool = True,
    ) -> Tensor:
        """Begin a parameter's state with moments of zero; returns what the model is to hold of it.

        home: moves a tensor of the state to where it is to stay. is_trained: one that is not has no
        moments, and is stored as the others are.
        """
        flat, state = value.reshape(-1), {}
        is_matrix = value.ndim > 1
        if is_matrix and self.parameters == "split":
            high, state["low"] = split(flat.float())
            value = high.view(value.shape)
        elif is_matrix and self.parameters == "bfloat16":
            value = value.bfloat16()
        if is_trained:
            state |= empty_moments(flat, self.moments if is_matrix else "float32")
        self.state[name] = {kind: home(tensor) for kind, tensor in state.items()}
        return value

    def adopt_all(self, model: torch.nn.Module) -> None:
        """Begin the state of every parameter that a model holds already."""
        for name, p in model.named_parameters():
            held = self.adopt(name, p.detach(), is_trained=p.requires_grad)
            if held.dtype != p.dtype:
                replace_parameter(model, name, held)

    @torch.no_grad()
    def update(self, name: str, p: Tensor, gradient: Tensor, state: State | None = None) -> None:
        """Change one parameter in place, as step number `self.steps + 1` does.

        state: what to change in place of self.state[name], such as a copy of it on the GPU.
        """
        if state is None:
            state = self.state[name]
        compiled = compiled_update(self.parameters, self.moments) if p.is_cuda else None
        update_part = compiled or update_slice
        numbers = self.numbers(p.device if compiled else None)  # a compiled update takes tensors
        flat_p, flat_gradient = p.view(-1), gradient.reshape(-1)
        size = SLICE[p.device.type]
        for start in range(0, len(flat_p), size):
            end = start + size
            update_part(
                flat_p[start:end],
                flat_gradient[start:end],
                slice_of_state(state, start, end),
                numbers.coefficients,
                numbers.keys[name],
                start,
                self.betas,
                self.eps,
            )

    def numbers(self, device: torch.device | None = None) -> StepNumbers:
        """The coefficients and keys of this step: with a device, as tensors there, sent once."""
        step = self.steps + 1
        wanted = step, self.learning_rate, device
        if self._numbers is None or self._numbers[:3] != wanted:
            coefficients, keys = self._coefficients(step), self._keys(step)
            if device is not None:
                coefficients, keys = on_device(coefficients, keys, device)
            self._numbers = StepNumbers(*wanted, coefficients, keys)
        return self._numbers

    def _coefficients(self, step: int) -> Coefficients:
        return Coefficients(
            keep=1 - self.learning_rate * self.weight_decay,
            rate=self.learning_rate / (1 - self.betas[0] ** step),
            root=math.sqrt(1 - self.betas[1] ** step),
        )

    def _keys(self, step: int) -> dict[str, Keys]:
        return {
            name: {rounded: key_of(self.seed, step, name, rounded) for rounded in ROUNDED}
            for name in self.state
        }

    def value(self, name: str, p: Tensor) -> Tensor:
        """The number that a parameter stands for, in fp32 (float64 stays): exact."""
        low = self.state[name].get("low")
        if low is None:
            return p.detach().to(torch.promote_types(p.dtype, torch.float32))
        return join(p.detach().reshape(-1), low.to(p.device)).view(p.shape)

    def bytes(self, model: torch.nn.Module) -> int:
        """Bytes of all parameters and states, counted from live tensors."""
        states = (tensor for state in self.state.values() for tensor in state.values())
        return sum(tensor.nbytes for tensor in (*model.parameters(), *states))


def slice_of_state(state: State, start: int, end: int) -> State:
    """The state of the numbers from `start` to `end`; `start` is the first of a block of scales."""
    numbers = slice(start, end)
    blocks = slice(start // SCALE_BLOCK, end // SCALE_BLOCK)
    return {kind: tensor[blocks if kind in SCALES else numbers] for kind, tensor in state.items()}


def on_device(
    coefficients: Coefficients, keys: dict[str, Keys], device: torch.device
) -> tuple[Coefficients, dict[str, Keys]]:
    """The same numbers as tensors () of a device, in two copies."""
    rows = torch.tensor([list(row.values()) for row in keys.values()], dtype=torch.int32)
    rows = rows.to(device)
    sent = {name: dict(zip(ROUNDED, row.unbind())) for name, row in zip(keys, rows)}
    return Coefficients(*torch.tensor(coefficients).to(device)), sent


# ---- one update ----------------------------------------------------------------------------------


def update_slice(
    p: Tensor,
    g: Tensor,
    state: State,
    coefficients: Coefficients,
    keys: Keys,
    start: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Read, step, write: p (n,) and state are changed in place by the gradient g (n,).

    start: the place of p[0] in its parameter.
    """

    def bits(rounded: str) -> Tensor:
        return random_bits(keys[rounded], places(len(p), start, p.device))

    wide = torch.promote_types(p.dtype, torch.float32)
    value = join(p, state["low"]) if "low" in state else p.to(wide)
    m, v = read_moments(state, len(p))  # what is stored in fp32 is value, m and v themselves
    adamw_(value, m, v, g.to(value.dtype), coefficients, betas, eps)
    write_moments(state, m, v, bits)
    if "low" in state:
        high, low = split(value)
        p.copy_(high)
        state["low"].copy_(low)
    elif p.dtype == torch.bfloat16:
        p.copy_(round_at_random(value, bits("value")))
    else:
        p.copy_(value)


def adamw_(
    value: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    coefficients: Coefficients,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW on the gradient g: value and its moments are changed in place.

        m      <-  β₁ m + (1 - β₁) g
        v      <-  β₂ v + (1 - β₂) g²
        value  <-  keep value - rate m / (sqrt(v) / root + eps)

    with the coefficients keep = 1 - η weight decay, rate = η / (1 - β₁ᵗ), root = sqrt(1 - β₂ᵗ) of
    step t at learning rate η.
    """
    value.mul_(coefficients.keep)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g * (1 - betas[1]), g)
    value.addcdiv_(m * -coefficients.rate, v.sqrt().div_(coefficients.root).add_(eps))


# ---- one update as one kernel --------------------------------------------------------------------


def compile_update(backend: str | Callable) -> Callable:
    """`update_slice` as one graph for every length.

    Every storage and every type of gradient makes its own graph: more than the eight that torch
    allows by default.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Betas and eps are constants of the graph. As inputs they would be float64, and so would be a
    # part of the arithmetic of every number.
    torch._dynamo.config.specialize_float = True
    return torch.compile(update_slice, fullgraph=True, dynamic=True, backend=backend)


@cache
def compiled_update(parameters: str, moments: str) -> Callable | None:
    """`update_slice` compiled for CUDA, so that few kernels read and write each number once.

    None where torch cannot compile it, which is said once.
    """
    compiled = compile_update("inductor")
    try:
        try_compiled(compiled, AdamW(parameters, moments))
    except Exception as error:  # whatever a compiler raises
        print(
            "the optimizer runs unfused, which is slower: torch cannot compile it here "
            f"({type(error).__name__}: {one_line(error)})",
            file=sys.stderr,
        )
        return None
    return compiled


def try_compiled(compiled: Callable, optimizer: AdamW) -> None:
    """Update a small matrix and a vector on the GPU, as this optimizer stores them.

    What compiles for one storage need not compile for another.
    """
    for shape in ((2, SCALE_BLOCK), (2 * SCALE_BLOCK,)):
        p = optimizer.adopt("p", torch.zeros(shape, device="cuda")).view(-1)
        numbers = optimizer.numbers(p.device)
        for g in (torch.zeros_like(p), torch.zeros_like(p, dtype=torch.float32)):
            compiled(
                p,
                g,
                optimizer.state["p"],
                numbers.coefficients,
                numbers.keys["p"],
                0,
                optimizer.betas,
                optimizer.eps,
            )
