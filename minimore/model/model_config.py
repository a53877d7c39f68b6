"""What distinguishes one family of models from another: a set of numbers and switches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """All that distinguishes one family from another. Sizes are in units, not bytes.

    activation: a key of trunk.ACTIVATIONS. gated: the MLP is down(act(gate x) * up x) instead of
    down(act(up x)). norm: "layer", with a bias, or "rms". norm_before, norm_after: whether what
    enters attention and MLP is normed, and whether what leaves them is, before it is added.
    norm_offset: what is added to the stored weight of a norm. parallel_residual: a block is
    x + attention(norm x) + mlp(norm' x) instead of one after the other. rotary_width: how many
    leading dimensions of a head rotate. rope_factor: all frequencies are divided by it.
    rope_llama3: factor, low, high and original length. rope_positions: how many positions a text
    may have at most, since a scaling would change all frequencies of a longer one; 0 is any number.
    named_positions: the max_position_embeddings of a model that rotates; 0 is none.
    windows: how many last positions a token sees, for every block; () is everything in every block.
    window_rope_base: the base in blocks with a window, where no scaling applies; None is rope_base,
    scaled. qk_norm: RMSNorm of queries and keys before rotation, of "each head" on its own, of "all
    heads" together, or "none". query_scale: queries are multiplied by it. embedding_scale: so is
    what enters the first block. learned_positions: rows of a position embedding that is added to
    the tokens', instead of rotation. position_offset: its row of position 0.
    """

    vocabulary: int
    width: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    activation: str
    gated: bool
    norm: str
    norm_eps: float
    parallel_residual: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    rotary_width: int
    rope_base: float
    rope_factor: float = 1.0
    rope_llama3: tuple[float, float, float, int] | None = None
    rope_positions: int = 0
    named_positions: int = 0
    windows: tuple[int | None, ...] = ()
    window_rope_base: float | None = None
    qk_norm: str = "none"
    query_scale: float = 1.0
    norm_before: bool = True
    norm_after: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0

    @property
    def longest(self) -> int | None:
        """How many tokens a text may have; None is any number."""
        return (self.learned_positions - self.position_offset) or self.rope_positions or None
