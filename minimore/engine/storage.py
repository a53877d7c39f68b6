"""How a number is stored: what a parameter costs in memory is decided here.

    parameters   float32    4 bytes   as they are
                 split      2 + 2     bf16 to compute with, and beside it the 16 bits that are
                                      missing to the fp32 number: exact
                 bfloat16   2         rounded up or down at random, so that small steps arrive
                                      on average
    moments      float32    4 + 4
                 bfloat16   2 + 2     rounded at random
                 int8       2.05      codes of 8 bits with scales for every 256 numbers, rounded
                                      at random

Rounding is random and unbiased: the expected value of a stored number is the number itself.
Rounding to the nearest bf16 is not offered. At learning rate 1e-6 it drops nearly every step
(tutorial 15).

n numbers of a flat tensor. "Blocks" are runs of SCALE_BLOCK numbers that share their scales.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

SCALE_BLOCK = 256  # numbers that share the scales of an 8-bit code
SCALES = ("m_scale", "v_low", "v_step")  # the state that has one number a block
ROUNDED = ("value", "first", "second")  # what is rounded at random: a parameter, its two moments

TINY = torch.finfo(torch.float32).tiny  # the smallest normal number
LARGEST = torch.finfo(torch.float32).max
NOT_ZERO = 1e-30  # what replaces a divisor that is zero; the quotient is not used then


# ---- parameters ----------------------------------------------------------------------------------


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> its nearest bf16, and the 16 bits that are missing, as int16: together exactly x.

    Adding half of the last place before the cut makes the rest fit an int16. At exact ties this
    rounds away from zero, where torch's own cast rounds to even.
    """
    bits = x.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return (high << 16).view(torch.float32).bfloat16(), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """What `split` took apart."""
    return (high.float().view(torch.int32) + low.int()).view(torch.float32)


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up or down so that the expectation is x; bits: int32, random."""
    raised = x.contiguous().view(torch.int32) + (bits & 0xFFFF)
    return (raised & -0x10000).view(torch.float32).bfloat16()


# ---- moments -------------------------------------------------------------------------------------


def empty_moments(flat: Tensor, kind: str) -> dict[str, Tensor]:
    """State of zero moments for a flat parameter (n,); kind: a storage of moments."""

    def zeros(count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=flat.device)

    n = flat.numel()
    if kind == "int8":
        blocks = -(-n // SCALE_BLOCK)
        codes = {"m_code": zeros(n, torch.int8), "v_code": zeros(n, torch.uint8)}
        return codes | {name: zeros(blocks, torch.float32) for name in SCALES}
    wide = torch.promote_types(flat.dtype, torch.float32)
    dtype = torch.bfloat16 if kind == "bfloat16" else wide
    return {"m": zeros(n, dtype), "v": zeros(n, dtype)}


def read_moments(state: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Both moments (n,), at least fp32."""
    if "m" in state:
        wide = torch.promote_types(state["m"].dtype, torch.float32)
        return state["m"].to(wide), state["v"].to(wide)
    v = decode_v(in_blocks(state["v_code"]), state["v_low"], state["v_step"])
    m = decode_m(in_blocks(state["m_code"]), state["m_scale"], v.sqrt())
    return m.view(-1)[:n], v.view(-1)[:n]


def write_moments(
    state: dict[str, Tensor], m: Tensor, v: Tensor, bits: Callable[[str], Tensor]
) -> None:
    """Store both moments (n,). Rounding is unbiased: on average, m and v are what is read again.

    bits: the name of a moment, "first" or "second" -> random bits (n,) int32 to round it with.
    """
    if "m_code" in state:
        write_codes(state, m, v, chance(bits("first")), chance(bits("second")))
    elif state["m"].dtype == torch.bfloat16:
        state["m"].copy_(round_at_random(m, bits("first")))
        state["v"].copy_(round_at_random(v, bits("second")))
    else:
        state["m"].copy_(m)
        state["v"].copy_(v)


# ---- moments of 8 bits ---------------------------------------------------------------------------


def write_codes(
    state: dict[str, Tensor], m: Tensor, v: Tensor, m_chance: Tensor, v_chance: Tensor
) -> None:
    """Store both moments (n,) as codes; the chances (n,) are uniform on [0, 1).

    The first moment is coded as m / sqrt(v), with the v that will be read.
    """
    n = len(m)
    v = v.clamp_max(LARGEST)  # one infinite number would spoil its block
    v_code, v_low, v_step = encode_v(in_blocks(v), in_blocks(v_chance))
    root = decode_v(v_code, v_low, v_step).sqrt()
    m_code, m_scale = encode_m(in_blocks(m), root, in_blocks(m_chance))
    state["m_code"].copy_(m_code.view(-1)[:n])
    state["v_code"].copy_(v_code.view(-1)[:n])
    state["m_scale"].copy_(m_scale)
    state["v_low"].copy_(v_low)
    state["v_step"].copy_(v_step)


def encode_v(v: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments (blocks, SCALE_BLOCK) -> their codes, and low and step (blocks,).

    Code 0 is zero, and so are numbers below the smallest normal one. Code q from 1 to 255 is

        v = 2^(low + (q - 1) step)

    so that 1 is the smallest number of a block and 255 its largest. A number between two codes,
    floor < v < ceiling, takes the upper one with probability (v - floor) / (ceiling - floor).
    """
    is_zero = v < TINY
    log = v.clamp_min(TINY).log2()
    low = torch.where(is_zero, torch.inf, log).amin(1).nan_to_num(posinf=0.0)
    high = torch.where(is_zero, -torch.inf, log).amax(1)
    step = (high - low).clamp_min(0) / 254
    steps_above_low = (log - low[:, None]) / step.clamp_min(NOT_ZERO)[:, None]
    code = 1 + steps_above_low.floor().clamp(0, 253)
    floor, ceiling = decode_v(code, low, step), decode_v(code + 1, low, step)
    goes_up = (v - floor) > chance * (ceiling - floor)
    return torch.where(is_zero, 0.0, code + goes_up).to(torch.uint8), low, step


def decode_v(code: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Codes (blocks, SCALE_BLOCK), with low and step (blocks,) -> second moments."""
    v = (low[:, None] + (code.float() - 1) * step[:, None]).exp2()
    return torch.where(code == 0, 0.0, v)


def encode_m(m: Tensor, root: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """First moments (blocks, SCALE_BLOCK) -> codes from -127 to 127, and their scale (blocks,).

    root: sqrt(v). The number is m = code scale root. The code is rounded down after adding a chance
    from [0, 1), so its expectation is m / (scale root).
    """
    ratio = torch.where(root > 0, m / root.clamp_min(NOT_ZERO), 0.0)
    scale = ratio.abs().amax(1) / 127
    code = (ratio / scale.clamp_min(NOT_ZERO)[:, None] + chance).floor()
    return code.clamp(-127, 127).to(torch.int8), scale


def decode_m(code: Tensor, scale: Tensor, root: Tensor) -> Tensor:
    """Codes (blocks, SCALE_BLOCK), with their scale (blocks,) and sqrt(v) -> first moments."""
    return code * scale[:, None] * root


def in_blocks(x: Tensor) -> Tensor:
    """(n,) -> (blocks, SCALE_BLOCK), with zeros at the end."""
    return torch.nn.functional.pad(x, (0, -len(x) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)


# ---- random bits that need no state --------------------------------------------------------------


def key_of(seed: int, step: int, name: str, rounded: str) -> int:
    """A signed 32-bit key for one kind of number, of ROUNDED, of one parameter in one step."""
    digest = hashlib.sha256(f"{seed} {step} {name} {rounded}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


def places(n: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """The places (n,) int32 from `start` on.

    A compiler takes them for indices. These it computes in 64 bits, whatever type they are asked
    for, and it drops casts of them (torch 2.11). So they are of 64 bits where it reads this. Behind
    the mask they are numbers like any others, and there the cast to 32 bits holds.
    """
    dtype = torch.int64 if torch.compiler.is_compiling() else torch.int32
    place = torch.arange(start, start + n, dtype=dtype, device=device)
    return (place & 0x7FFFFFFF).int()


def random_bits(key: int | Tensor, place: Tensor) -> Tensor:
    """32 random bits for every place (n,) int32: a hash of key and place.

    It multiplies, xors and shifts; products wrap around.
    """
    x = place * -1640531535  # 2^32 / the golden ratio, odd
    x = (x ^ ((x >> 16) & 0xFFFF)) ^ key
    x = x * 2146121005
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def chance(bits: Tensor) -> Tensor:
    """Random bits -> fp32, uniform on [0, 1), in steps of 2^-24."""
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24
