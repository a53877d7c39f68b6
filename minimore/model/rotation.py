"""Rotary positions: every query and key is turned by angles that grow with its position.

N tokens, H heads, C head width, R rotating dimensions of a head.
"""

import math

import torch
from torch import Tensor

from .model_config import ModelConfig


def rotations(c: ModelConfig, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The angles of every block, as `rotary_angles`; blocks that rotate alike share theirs."""
    windows = c.windows or (None,) * c.blocks
    own_bases = [None if window is None else c.window_rope_base for window in windows]
    angles = {base: rotary_angles(c, positions, base) for base in set(own_bases)}
    return [angles[base] for base in own_bases]


def rotary_angles(
    c: ModelConfig, positions: Tensor, own_base: float | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position · frequency_j: two (N, 1, R / 2) fp32 tensors.

        frequency_j = base^(-2j / R) / factor       for j = 0 .. R / 2 - 1

    own_base: of a block that has another base than the model, and no scaling. Source: RoFormer,
    arXiv 2104.09864.
    """
    places = torch.arange(0, c.rotary_width, 2, dtype=torch.float32, device=positions.device)
    base = c.rope_base if own_base is None else own_base
    frequency = 1.0 / (base ** (places / c.rotary_width))
    if own_base is None:
        frequency = scaled(frequency, c)
    angles = (positions.float()[:, None] * frequency)[:, None, :]  # (N, 1, R / 2)
    return angles.cos(), angles.sin()


def scaled(frequency: Tensor, c: ModelConfig) -> Tensor:
    """Frequencies (R / 2,), changed for longer texts as a checkpoint says.

    The llama3 scaling is that of the Llama 3.1 release: wavelengths longer than original / low are
    stretched by the factor, those shorter than original / high stay, and it is smooth in between.
    """
    frequency = frequency / c.rope_factor
    if c.rope_llama3 is None:
        return frequency
    factor, low, high, original = c.rope_llama3
    smooth = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of every head; x: (N, H, C).

    Dimensions j and j + R / 2 are the two coordinates (a, b) of a point in a plane:

        (a, b)  ->  (a cos - b sin,  b cos + a sin)
    """
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = at_least_fp32(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
