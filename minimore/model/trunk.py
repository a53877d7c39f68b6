"""The transformer: one decoder trunk whose families differ in config fields, never in classes.

There is no head here: reward.py and policy.py put theirs on top. Parameters have a storage type.
`Linear` casts them to the type of its input, the compute type; norms, rotations and softmax are
fp32, or float64 for float64 input. recompute.py says what backward keeps of a block.

N tokens, S texts, D width, H heads, G key/value heads, C head width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Stream, attend
from .fused import fused
from .model_config import ModelConfig
from .recompute import cheap, run_block
from .rotation import at_least_fp32, rotate, rotations


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": gelu_tanh,
}


# ---- a block -------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x Wᵀ + b, computed in the type of x."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, inputs) -> (N, outputs)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm without bias, over the last dimension.

        layer    y = (x - mean x) / sqrt(var x + eps) · weight + bias
        rms      y = x / sqrt(mean x² + eps) · weight

    where the weight is the stored one plus an offset. It is computed in fp32 and returned in the
    type of x.
    """

    def __init__(self, width: int, kind: str, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape."""
        wide = at_least_fp32(x)
        weight = self.weight.to(wide.dtype)
        if self.offset:
            weight = weight + self.offset
        if self.bias is None:
            mean_square = wide.square().mean(-1, keepdim=True)
            y = wide * torch.rsqrt(mean_square + self.eps) * weight
        else:
            bias = self.bias.to(wide.dtype)
            y = F.layer_norm(wide, x.shape[-1:], weight, bias, self.eps)
        return y.to(x.dtype)


def residual_norm(c: ModelConfig, is_there: bool = True) -> nn.Module:
    """A norm of the residual stream, or of what is added to it; the identity if there is none."""
    return Norm(c.width, c.norm, c.norm_eps, c.norm_offset) if is_there else nn.Identity()


def norm_of_heads(c: ModelConfig, heads: int) -> nn.Module:
    """The norm of so many query or key heads; the identity if this family has none."""
    if c.qk_norm == "none":
        return nn.Identity()
    together = heads if c.qk_norm == "all heads" else 1
    return Norm(together * c.head_width, "rms", c.norm_eps, c.norm_offset)


class Attention(nn.Module):
    """The matrices around rotary causal attention, of H query heads and G key/value heads."""

    def __init__(self, c: ModelConfig, window: int | None):
        super().__init__()
        self.head_width = c.head_width
        self.window = window
        self.query = Linear(c.width, c.heads * c.head_width, c.qkv_bias)
        self.key = Linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.value = Linear(c.width, c.kv_heads * c.head_width, c.qkv_bias)
        self.output = Linear(c.heads * c.head_width, c.width, c.attention_output_bias)
        self.norms_heads_together = c.qk_norm == "all heads"
        self.query_norm = norm_of_heads(c, c.heads)
        self.key_norm = norm_of_heads(c, c.kv_heads)
        self.query_scale = c.query_scale

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, D) -> queries (N, H, C), keys and values (N, G, C); all but values are rotated."""
        q = rotate(self._normed(self.query_norm, self.query(x)), rotation)
        k = rotate(self._normed(self.key_norm, self.key(x)), rotation)
        v = self._in_heads(self.value(x))
        if self.query_scale != 1:
            q = q * self.query_scale
        return q, k, v

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Queries or keys (N, H C), normed all together or head by head: (N, H, C)."""
        # `cheap`: the norm may be computed again in backward, instead of being kept.
        if self.norms_heads_together:
            return self._in_heads(cheap(norm, x))
        return cheap(norm, self._in_heads(x))

    def _in_heads(self, x: Tensor) -> Tensor:
        """(N, H C) -> (N, H, C)."""
        return x.view(len(x), -1, self.head_width)


class MLP(nn.Module):
    """Two layers, or three when gated."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.gate = Linear(c.width, c.mlp_width, c.mlp_bias) if c.gated else None
        self.up = Linear(c.width, c.mlp_width, c.mlp_bias)
        self.down = Linear(c.mlp_width, c.width, c.mlp_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """What the last product takes in: (N, D) -> (N, width of the MLP)."""
        if self.gate is None:
            return cheap(self.act, self.up(x))
        return cheap(self._gated, self.gate(x), self.up(x))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class Block(nn.Module):
    """Attention and MLP around a residual stream, in parallel or one after the other.

    In parallel   y = x + attention(norm x) + mlp(norm' x)
    in sequence   y = x' + mlp(norm' x')  with  x' = x + attention(norm x)

    A family may have these norms behind attention and MLP instead, or on both sides of them:

    behind        y = x' + norm'(mlp x')  with  x' = x + norm(attention x)
    """

    def __init__(self, c: ModelConfig, window: int | None):
        super().__init__()
        self.parallel, self.norm_after = c.parallel_residual, c.norm_after
        self.attention_norm = residual_norm(c, c.norm_before)
        self.attention = Attention(c, window)
        self.attention_output_norm = residual_norm(c, c.norm_after)
        self.mlp_norm = residual_norm(c, c.norm_before)
        self.mlp = MLP(c)
        self.mlp_output_norm = residual_norm(c, c.norm_after)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream) -> Tensor:
        """x: (N, D) -> (N, D), or (Q, D) if not every token of the stream asks."""
        return self.last_product(*self.before_last_product(x, rotation, stream))

    def before_last_product(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], stream: Stream
    ) -> tuple[Tensor, Tensor]:
        """The residual (N, D), and the hidden layer of the MLP that is still to be added to it.

        Where not every token asks, keys and values are those of all, and the rest of those that do.

        Whoever wants gradients alone may stop here, since they do not need the block's output,
        unless a norm stands behind the MLP.
        """
        q, k, v = self.before_attention(x, *rotation)
        if stream.asked is not None:
            x, q = x.index_select(0, stream.asked), q.index_select(0, stream.asked)
        attended = attend(q, k, v, stream, self.attention.window)
        return self.after_attention(x, attended)

    @fused
    def before_attention(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, C), keys and values (N, G, C) of the block's input (N, D)."""
        return self.attention.heads(cheap(self.attention_norm, x), (cos, sin))

    @fused
    def after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and the hidden layer, from the input and what attention (N, H, C) found."""
        output = self.attention.output(attended.flatten(1))
        residual = x + cheap(self.attention_output_norm, output)
        hidden = self.mlp.hidden(cheap(self.mlp_norm, x if self.parallel else residual))
        return residual, hidden

    def last_product(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """The block's output (N, D), from what `before_last_product` returns."""
        output = self.mlp.down(hidden)
        return self.add_normed(residual, output) if self.norm_after else residual + output

    @fused
    def add_normed(self, residual: Tensor, output: Tensor) -> Tensor:
        """The residual plus the normed output of the MLP, both (N, D)."""
        return residual + cheap(self.mlp_output_norm, output)


# ---- the trunk -----------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Embedding, blocks, final norm.

    It is built empty on the device in force (`meta` costs no memory), and checkpoint.py fills it.
    compute_dtype: the type of activations. recompute: what backward computes again, one of
    RECOMPUTE.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.compute_dtype = torch.float32
        self.recompute = "none"
        self.embedding = empty_embedding(c.vocabulary, c.width)
        if c.learned_positions:
            self.position_embedding = empty_embedding(c.learned_positions, c.width)
        windows = c.windows or (None,) * c.blocks
        self.blocks = nn.ModuleList(Block(c, window) for window in windows)
        self.final_norm = residual_norm(c)

    def forward(self, stream: Stream) -> Tensor:
        """The final hidden state at the last token of each text: (S, D).

        fp32, or float64 if computing in float64.
        """
        return self.final_norm(at_least_fp32(self._through_blocks(stream, stream.at_ends)))

    def states_at(self, stream: Stream, places: Tensor) -> Tensor:
        """The final hidden state at some tokens (M,) of a stream: (M, D), in the same type."""
        return self.final_norm(at_least_fp32(self.residual(stream).index_select(0, places)))

    def states(self, stream: Stream) -> Tensor:
        """The final hidden state at every token: (N, D), fp32 (float64 if computing in float64)."""
        return self.final_norm(at_least_fp32(self.residual(stream)))

    def residual(self, stream: Stream) -> Tensor:
        """What the blocks leave at every token, before the final norm.

        (N, D) in the compute type.
        """
        return self._through_blocks(stream, stream)

    def _through_blocks(self, stream: Stream, last_stream: Stream) -> Tensor:
        """The residual after all blocks, at the tokens that are queries ("ask") in last_stream.

        Only the last block runs on last_stream. Of the other tokens it needs keys and values alone.
        """
        x = self.embed(stream)
        streams = [stream] * (len(self.blocks) - 1) + [last_stream]
        for block, rotation, own in zip(self.blocks, rotations(self.c, stream.positions), streams):
            x = run_block(block, x, rotation, own, self.recompute)
        return x

    def embed(self, stream: Stream) -> Tensor:
        """What enters the first block: (N, D) in the compute type."""
        return self.embed_tokens(stream.tokens, stream.positions)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The same for tokens (N,) at these positions (N,)."""
        x = self.embedding(tokens)
        if self.c.learned_positions:
            x = x + self.position_embedding(positions + self.c.position_offset)
        x = x.to(self.compute_dtype)
        return x if self.c.embedding_scale == 1 else x * self.embedding_scale

    @property
    def embedding_scale(self) -> float:
        """What the embedded tokens are multiplied by, rounded to the compute type.

        Gemma was trained so: in bf16 sqrt(3072) = 55.43 becomes 55.5.
        """
        return torch.tensor(self.c.embedding_scale, dtype=self.compute_dtype).item()


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding whose numbers are not drawn at random, since a checkpoint will set them."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Let a module hold a tensor, of whatever type, as its parameter `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value))
