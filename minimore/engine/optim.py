"""AdamW by hand, with a choice of how each number is stored: what a parameter costs in memory is decided here.

    parameters   float32    4 bytes   as they are
                 split      2 + 2     bf16 to compute with, and the 16 bits that are missing to the fp32 number: exact
                 bfloat16   2         rounded up or down at random, so that small steps arrive on average
    moments      float32    4 + 4
                 bfloat16   2 + 2     rounded at random
                 int8       2.05      codes of 8 bits with scales for every 256 numbers, rounded at random

Rounding to the nearest bf16 is not offered: at learning rate 1e-6 it drops nearly every step (tutorial 09). Matrices are stored as
asked; vectors (norms, biases, the head), a ten-thousandth of the numbers, always in fp32.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # numbers that share the scales of an 8-bit code
SLICE = {
    "cpu": 1 << 16,
    "cuda": 1 << 24,
}  # numbers updated at a time: few enough for a CPU's cache, and for what lives in passing


class Coefficients(NamedTuple):
    """What the step number and the learning rate enter an update with."""

    keep: float  # 1 - learning rate x weight decay
    rate: float  # learning rate / (1 - beta1^t)
    root: float  # sqrt(1 - beta2^t)


class AdamW:
    """Decoupled weight decay, bias correction, no AMSGrad. Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.

    state: parameter name -> {kind: tensor}, all flat; the low halves of split parameters are state, too. seed: of the random rounding,
    which is a function of seed, step, parameter and place, so no random state needs saving.
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
        self.state: dict[str, dict[str, Tensor]] = {}
        self.known = None, None  # what `numbers` said last

    def adopt(
        self, name: str, value: Tensor, home: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Tensor:
        """Begin a parameter's state, all moments zero, at `home`; returns what the model is to hold of its value."""
        state, flat = {}, value.reshape(-1)
        parameters, moments = (
            (self.parameters, self.moments) if value.ndim > 1 else ("float32", "float32")
        )
        if parameters == "split":
            high, state["low"] = split(flat.float())
            value = high.view(value.shape)
        elif parameters == "bfloat16":
            value = value.bfloat16()
        self.state[name] = {
            kind: home(tensor) for kind, tensor in (state | empty_moments(flat, moments)).items()
        }
        return value

    def adopt_all(self, model: torch.nn.Module):
        """Begin the state of every parameter of a model that is there already."""
        for name, p in model.named_parameters():
            held = self.adopt(name, p.detach())
            if held.dtype != p.dtype:
                replace_parameter(model, name, held)

    @torch.no_grad()
    def update(
        self, name: str, p: Tensor, gradient: Tensor, state: dict[str, Tensor] | None = None
    ):
        """Step `steps + 1` of one parameter, in place. state: its state where it lies now, if not in self.state."""
        state, flat, g = (
            self.state[name] if state is None else state,
            p.view(-1),
            gradient.reshape(-1),
        )
        step = fused(self.parameters, self.moments) if p.is_cuda else None
        c, keys = self.numbers(p.device if step else None)
        size, step = SLICE[p.device.type], step or update_slice
        for start in range(0, len(flat), size):
            part = {
                kind: s[start // BLOCK : (start + size) // BLOCK]
                if kind in PER_BLOCK
                else s[start : start + size]
                for kind, s in state.items()
            }
            step(
                flat[start : start + size],
                g[start : start + size],
                part,
                c,
                keys[name],
                start,
                self.betas,
                self.eps,
            )

    def numbers(
        self, device: torch.device | None = None
    ) -> tuple[Coefficients, dict[str, Sequence]]:
        """Coefficients of this step, and three keys of random bits for each parameter; on a device as tensors, sent there once a step."""
        wanted = self.steps, self.learning_rate, device
        if self.known[0] != wanted:
            t = self.steps + 1
            c = Coefficients(
                1 - self.learning_rate * self.weight_decay,
                self.learning_rate / (1 - self.betas[0] ** t),
                math.sqrt(1 - self.betas[1] ** t),
            )
            keys = {
                name: [key_of(self.seed, t, name, what) for what in ("value", "first", "second")]
                for name in self.state
            }
            if device is not None:
                rows = torch.tensor(list(keys.values()), dtype=torch.int32).to(device)
                c, keys = (
                    Coefficients(*torch.tensor(c).to(device)),
                    {name: row.unbind() for name, row in zip(keys, rows)},
                )
            self.known = wanted, (c, keys)
        return self.known[1]

    def value(self, name: str, p: Tensor) -> Tensor:
        """The number that a parameter stands for, in fp32 (float64 stays): exact."""
        low = self.state[name].get("low")
        return (
            p.detach().to(torch.promote_types(p.dtype, torch.float32))
            if low is None
            else join(p.detach().reshape(-1), low.to(p.device)).view(p.shape)
        )

    def bytes(self, model: torch.nn.Module) -> int:
        """Bytes of all parameters and states, counted from live tensors."""
        return sum(p.nbytes for p in model.parameters()) + sum(
            t.nbytes for state in self.state.values() for t in state.values()
        )


def replace_parameter(model: torch.nn.Module, name: str, value: Tensor):
    """Let a model hold another tensor, of whatever type, as its parameter `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))


# ---- one update --------------------------------------------------------------------------------------------------------


def update_slice(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    c: Coefficients,
    keys,
    start: int,
    betas,
    eps: float,
):
    """Read, step, write: p, g (n,) and state are changed in place; start: place of p[0] in its parameter."""
    bits = lambda i: random_bits(
        keys[i], torch.arange(start, start + len(p), dtype=torch.int32, device=p.device)
    )
    value = (
        join(p, state["low"])
        if "low" in state
        else p.to(torch.promote_types(p.dtype, torch.float32))
    )
    m, v = read_moments(state, len(p))
    value, m, v = adamw(value, m, v, g.to(value.dtype), c, betas, eps)
    write_moments(state, m, v, bits)
    if "low" in state:
        high, low = split(value)
        p.copy_(high), state["low"].copy_(low)
    else:
        p.copy_(round_at_random(value, bits(0)) if p.dtype == torch.bfloat16 else value)


def adamw(
    value: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    c: Coefficients,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; value <- keep value - rate m / (sqrt(v) / root + eps)."""
    value = value * c.keep
    m = torch.lerp(m, g, 1 - betas[0])
    v = torch.addcmul(v * betas[1], g, g, value=1 - betas[1])
    return value - m * c.rate / (v.sqrt() / c.root + eps), m, v


def compile_update(backend) -> Callable:
    """`update_slice` as one graph for every length. A storage and a gradient's type make a graph each: more than the eight that torch allows."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(update_slice, fullgraph=True, dynamic=True, backend=backend)


@cache
def fused(parameters: str, moments: str) -> Callable | None:
    """`update_slice` compiled for CUDA, so that few kernels read and write each number once; None where torch cannot compile it."""
    compiled = compile_update("inductor")
    try:  # with the very storage: what compiles for one need not for another
        for shape in ((2, BLOCK), (2 * BLOCK,)):
            tried = AdamW(parameters, moments)
            p, (c, keys) = (
                tried.adopt("p", torch.zeros(shape, device="cuda")).view(-1),
                tried.numbers(torch.device("cuda")),
            )
            for g in (torch.zeros_like(p), torch.zeros_like(p, dtype=torch.float32)):
                compiled(p, g, tried.state["p"], c, keys["p"], 0, tried.betas, tried.eps)
        return compiled
    except Exception as error:  # whatever a compiler raises
        print(
            f"the optimizer runs unfused, which is slower: torch cannot compile it here ({type(error).__name__})",
            file=sys.stderr,
        )
        return None


# ---- storage: parameters -----------------------------------------------------------------------------------------------


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> its nearest bf16, and the 16 bits that are missing, as int16: together exactly x.

    Adding half of the last place before the cut makes the rest fit an int16; at exact ties, which torch's own cast rounds to even, it
    rounds away from zero.
    """
    bits = x.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return (high << 16).view(torch.float32).bfloat16(), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """What `split` took apart."""
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up or down so that the expectation is x; bits: int32, random."""
    return (
        ((x.contiguous().view(torch.int32) + (bits & 0xFFFF)) & -0x10000)
        .view(torch.float32)
        .bfloat16()
    )


# ---- storage: moments --------------------------------------------------------------------------------------------------

PER_BLOCK = ("m_scale", "v_low", "v_step")


def empty_moments(flat: Tensor, kind: str) -> dict[str, Tensor]:
    """State of zero moments for a flat parameter."""
    if kind != "int8":
        dtype = (
            torch.bfloat16 if kind == "bfloat16" else torch.promote_types(flat.dtype, torch.float32)
        )
        return {
            name: torch.zeros(flat.shape, dtype=dtype, device=flat.device) for name in ("m", "v")
        }
    blocks = -(-flat.numel() // BLOCK)
    return {
        "m_code": torch.zeros(flat.shape, dtype=torch.int8, device=flat.device),
        "v_code": torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device),
        **{name: torch.zeros(blocks, device=flat.device) for name in PER_BLOCK},
    }


def read_moments(state: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Both moments (n,), at least fp32."""
    if "m" in state:
        wide = torch.promote_types(state["m"].dtype, torch.float32)
        return state["m"].to(wide), state["v"].to(wide)
    v = decode_v(in_blocks(state["v_code"]), state["v_low"], state["v_step"])
    m = in_blocks(state["m_code"]) * state["m_scale"][:, None] * v.sqrt()
    return m.view(-1)[:n], v.view(-1)[:n]


def write_moments(state: dict[str, Tensor], m: Tensor, v: Tensor, bits: Callable[[int], Tensor]):
    """Store both moments; what rounds, rounds at random, so that the expectation of what is read again is m and v.

    bits: (1) and (2) are random bits (n,) int32 for m and v.

    int8: v as a code of its logarithm, 0 for zero, the block's smallest at 1 and its largest at 255; m as a code of m / sqrt(v),
    with the v that will be read. Numbers below the smallest normal one count as zero.
    """
    if "m" in state:
        rounds = state["m"].dtype == torch.bfloat16
        (
            state["m"].copy_(round_at_random(m, bits(1)) if rounds else m),
            state["v"].copy_(round_at_random(v, bits(2)) if rounds else v),
        )
        return
    n, v = (
        len(m),
        v.clamp_max(torch.finfo(torch.float32).max),
    )  # one infinite number would spoil its block
    m, v, m_chance, v_chance = (in_blocks(x) for x in (m, v, chance(bits(1)), chance(bits(2))))
    zero = v < torch.finfo(torch.float32).tiny
    log = v.clamp_min(torch.finfo(torch.float32).tiny).log2()
    low = torch.where(zero, torch.inf, log).amin(1).nan_to_num(posinf=0.0)
    step = (torch.where(zero, -torch.inf, log).amax(1) - low).clamp_min(0) / 254
    below = ((log - low[:, None]) / step.clamp_min(1e-30)[:, None]).floor().clamp(0, 253)
    floor, ceiling = ((low[:, None] + code * step[:, None]).exp2() for code in (below, below + 1))
    up = (v - floor) > v_chance * (ceiling - floor)
    v_code = torch.where(zero, 0.0, 1 + below + up).to(torch.uint8)
    root = decode_v(v_code, low, step).sqrt()
    ratio = torch.where(root > 0, m / root.clamp_min(1e-30), 0.0)
    scale = ratio.abs().amax(1) / 127
    m_code = (
        (ratio / scale.clamp_min(1e-30)[:, None] + m_chance).floor().clamp(-127, 127).to(torch.int8)
    )
    for name, x in {
        "m_code": m_code.view(-1)[:n],
        "v_code": v_code.view(-1)[:n],
        "m_scale": scale,
        "v_low": low,
        "v_step": step,
    }.items():
        state[name].copy_(x)


def decode_v(code: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """(blocks, BLOCK) codes -> second moments."""
    return torch.where(code == 0, 0.0, (low[:, None] + (code.float() - 1) * step[:, None]).exp2())


def in_blocks(x: Tensor) -> Tensor:
    """(n,) -> (blocks, BLOCK), zeros behind."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


# ---- random bits that need no state ------------------------------------------------------------------------------------


def key_of(seed: int, step: int, name: str, what: str) -> int:
    """A signed 32-bit key for one kind of number of one parameter in one step."""
    return int.from_bytes(
        hashlib.sha256(f"{seed} {step} {name} {what}".encode()).digest()[:4], "little", signed=True
    )


def random_bits(key, place: Tensor) -> Tensor:
    """32 random bits for every place (n,) int32: a hash of key and place (multiply, xor, shift; products wrap around)."""
    x = (
        (place & 0x7FFFFFFF) * -1640531535
    )  # 2^32 / the golden ratio, odd; the mask keeps compilers from taking this for arithmetic of indices
    x = (x ^ ((x >> 16) & 0xFFFF)) ^ key
    x = x * 2146121005
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def chance(bits: Tensor) -> Tensor:
    """Random bits -> fp32, uniform on [0, 1), in steps of 2^-24."""
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24
