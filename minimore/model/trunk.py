"""The transformer: one decoder trunk whose families differ in config fields, never in classes.

There is no head here: reward.py and policy.py put theirs on top. Parameters have a storage type; `Linear` casts
them to the type of its input (the compute type), and norms, rotations and softmax are fp32 (float64 for float64 input).
What backward needs of a block is kept, or made again: `run_block`.

N tokens, S texts, D width, H heads, G key/value heads, C head width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Stream, attend
from .recompute import cheap, run_block

ACTIVATIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class ModelConfig:
    """All that distinguishes one family from another. Sizes in units, not bytes."""

    vocabulary: int
    width: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    activation: str  # a key of ACTIVATIONS
    gated: bool  # down(act(gate x) * up x) instead of down(act(up x))
    norm: str  # "layer" (with bias) or "rms"
    norm_eps: float
    parallel_residual: bool  # x + attention(norm x) + mlp(norm' x) instead of one after the other
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    rotary_width: int  # leading dimensions of a head that rotate
    rope_base: float
    rope_factor: float = 1.0  # all frequencies divided by this
    rope_llama3: tuple[float, float, float, int] | None = None  # factor, low, high, original length
    windows: tuple[
        int | None, ...
    ] = ()  # per block: how many last positions a token sees; () is everything everywhere
    qk_norm: bool = False  # RMSNorm of every query and key head before rotation
    learned_positions: int = (
        0  # rows of a learned position embedding, added to the tokens'; instead of rotation
    )
    position_offset: int = 0  # the row of position 0


class Linear(nn.Module):
    """y = x W^T + b, computed in the type of x."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor, value: bool = True) -> Tensor:
        """value=False: only the gradient is wanted, and the numbers returned mean nothing."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return (
            F.linear(x, self.weight.to(x.dtype), bias)
            if value
            else LinearGradient.apply(x, self.weight.to(x.dtype), bias)
        )


class LinearGradient(torch.autograd.Function):
    """The gradient of y = x W^T + b without y: a recomputed block need not carry out its last matrix product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return x.new_empty(len(x), len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x, dy.sum(0) if ctx.biased else None


class Norm(nn.Module):
    """LayerNorm, or RMSNorm without bias, over the last dimension; computed in fp32, returned in the type of x."""

    def __init__(self, width: int, kind: str, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        if self.bias is None:
            y = (
                wide
                * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
                * self.weight.to(wide.dtype)
            )
        else:
            y = F.layer_norm(
                wide, x.shape[-1:], self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.eps
            )
        return y.to(x.dtype)


class Attention(nn.Module):
    """Rotary causal attention with H query heads over G key/value heads."""

    def __init__(self, c: ModelConfig, window: int | None):
        super().__init__()
        self.c = c
        self.window = window
        self.query = Linear(c.width, c.heads * c.head_width, c.qkv_bias)
        self.key = Linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.value = Linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.output = Linear(c.heads * c.head_width, c.width, c.attention_output_bias)
        self.query_norm = Norm(c.head_width, "rms", c.norm_eps) if c.qk_norm else nn.Identity()
        self.key_norm = Norm(c.head_width, "rms", c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream) -> Tensor:
        N, C = len(x), self.c.head_width
        q = rotate(cheap(self.query_norm, self.query(x).view(N, -1, C)), rotation)  # (N, H, C)
        k = rotate(cheap(self.key_norm, self.key(x).view(N, -1, C)), rotation)  # (N, G, C)
        v = self.value(x).view(N, -1, C)
        return self.output(attend(q, k, v, stream, self.window).reshape(N, -1))


class MLP(nn.Module):
    """Two layers, or three when gated."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.gate = Linear(c.width, c.mlp_width, c.mlp_bias) if c.gated else None
        self.up = Linear(c.width, c.mlp_width, c.mlp_bias)
        self.down = Linear(c.mlp_width, c.width, c.mlp_bias)

    def forward(self, x: Tensor, value: bool = True) -> Tensor:
        h = (
            cheap(self.act, self.up(x))
            if self.gate is None
            else cheap(lambda gate, up: self.act(gate) * up, self.gate(x), self.up(x))
        )
        return self.down(h, value)


class Block(nn.Module):
    """Attention and MLP around a residual stream, in parallel or one after the other."""

    def __init__(self, c: ModelConfig, window: int | None):
        super().__init__()
        self.parallel = c.parallel_residual
        self.attention_norm = Norm(c.width, c.norm, c.norm_eps)
        self.attention = Attention(c, window)
        self.mlp_norm = Norm(c.width, c.norm, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream, value: bool = True
    ) -> Tensor:
        """value=False: as in `Linear`."""
        attended = self.attention(cheap(self.attention_norm, x), rotation, stream)
        if self.parallel:
            return x + attended + self.mlp(cheap(self.mlp_norm, x), value)
        x = x + attended
        return x + self.mlp(cheap(self.mlp_norm, x), value)


class Trunk(nn.Module):
    """Embedding, blocks, final norm. Built empty on the device in force (`meta` costs no memory); filled by checkpoint.py."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.compute_dtype = torch.float32  # the type of activations
        self.recompute = "none"  # what is made again in backward, one of RECOMPUTE
        self.embedding = nn.Embedding(
            c.vocabulary, c.width, _weight=torch.empty(c.vocabulary, c.width)
        )
        if c.learned_positions:
            self.position_embedding = nn.Embedding(
                c.learned_positions, c.width, _weight=torch.empty(c.learned_positions, c.width)
            )
        self.blocks = nn.ModuleList(Block(c, window) for window in c.windows or (None,) * c.blocks)
        self.final_norm = Norm(c.width, c.norm, c.norm_eps)

    def forward(self, stream: Stream) -> Tensor:
        """The final hidden state at the last token of each text: (S, D), fp32 (float64 if computing in float64)."""
        return self.final_norm(at_least_fp32(self.residual(stream).index_select(0, stream.last)))

    def states(self, stream: Stream) -> Tensor:
        """The final hidden state at every token: (N, D), fp32 (float64 if computing in float64)."""
        return self.final_norm(at_least_fp32(self.residual(stream)))

    def residual(self, stream: Stream) -> Tensor:
        """What the blocks leave at every token, before the final norm: (N, D) in the compute type."""
        x, rotation = self.embed(stream), rotary_angles(self.c, stream.positions)
        for block in self.blocks:
            x = run_block(block, x, rotation, stream, self.recompute)
        return x

    def embed(self, stream: Stream) -> Tensor:
        """What enters the first block: (N, D) in the compute type."""
        x = self.embedding(stream.tokens)
        if self.c.learned_positions:
            x = x + self.position_embedding(stream.positions + self.c.position_offset)
        return x.to(self.compute_dtype)


def rotary_angles(c: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, frequency_j = base^(-2j / R): two (N, 1, R / 2) fp32 tensors.

    Source: RoFormer, arXiv 2104.09864; the llama3 scaling as in the Llama 3.1 release: wavelengths longer than
    original / low are stretched by factor, shorter than original / high kept, smoothly interpolated between.
    """
    exponents = (
        torch.arange(0, c.rotary_width, 2, dtype=torch.float32, device=positions.device)
        / c.rotary_width
    )
    frequency = 1.0 / (c.rope_base**exponents) / c.rope_factor
    if c.rope_llama3 is not None:
        factor, low, high, original = c.rope_llama3
        smooth = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    angles = (positions.float()[:, None] * frequency)[:, None, :]  # (N, 1, R / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of every head: dimension j pairs with j + R / 2. x: (N, H, C)."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = at_least_fp32(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
