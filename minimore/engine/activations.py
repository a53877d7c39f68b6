"""What one block keeps for its backward pass, by arithmetic, in bytes.

`itemsize` is the bytes of an activation: 2 in bf16, 4 in fp32. `width` is D, never bytes.
"""

from collections.abc import Iterable
from functools import lru_cache

from ..model.attention import Segment, tile_shapes
from ..model.model_config import ModelConfig
from .workload import Items, ItemShape, tokens_of


def segments_of(items: Iterable[ItemShape]) -> list[Segment]:
    """The attention segments of a packed batch, as attention.pack lays them out."""
    segments, start = [], 0
    for shared, first_rest, *rests in items:
        end = start + shared + first_rest
        segments.append(Segment(start, end, start, start))
        for rest in rests:
            segments.append(Segment(end, end + rest, start, start + shared))
            end += rest
        start = end
    return segments


@lru_cache(maxsize=4096)
def block_activations(
    config: ModelConfig, items: Items, itemsize: int, recompute: str, flash: bool
) -> int:
    """Bytes that autograd saves of one block's forward pass, its input included.

    Parameters and their casts are not counted. flash: attention over one stream, as on CUDA in
    bf16.
    """
    tokens = tokens_of(items)
    if recompute == "full":
        return tokens * config.width * itemsize  # the block's input alone
    attention = attention_activations(config, items, itemsize, flash)
    if recompute == "selective":
        return attention + tokens * bytes_saved_selectively(config, itemsize)
    return attention + tokens * bytes_saved_entirely(config, itemsize)


def normed_queries_and_keys(config: ModelConfig) -> int:
    """Numbers a token in the queries and keys, if a family normalises them."""
    has_norms = config.qk_norm != "none"
    return (config.heads + config.kv_heads) * config.head_width if has_norms else 0


def bytes_saved_selectively(config: ModelConfig, itemsize: int) -> int:
    """Bytes a token, without attention, from which backward recomputes norms and activation.

    These are the results of matrix products and the residual stream.
    """
    residual = (1 if config.parallel_residual else 2) * config.width
    into_norms_behind = 2 * config.width if config.norm_after else 0
    into_activation = (2 if config.gated else 1) * config.mlp_width
    into_norms = residual + normed_queries_and_keys(config) + into_norms_behind
    return itemsize * (into_norms + into_activation)


def bytes_saved_entirely(config: ModelConfig, itemsize: int) -> int:
    """Bytes a token, without attention, if nothing is recomputed."""
    wide = max(4, itemsize)  # norms compute in fp32 or float64
    mlp = mlp_tensors(config) * config.mlp_width * itemsize
    around = residual_bytes(config, itemsize, wide) + norms_behind_bytes(config, wide)
    return around + head_norm_bytes(config, wide) + mlp


def residual_bytes(config: ModelConfig, itemsize: int, wide: int) -> int:
    """Bytes a token of the residual stream and of the norms before attention and MLP."""
    streams = 1 if config.parallel_residual else 2  # both norms may share one tensor
    if not config.norm_before:
        return streams * config.width * itemsize  # the products take in the stream itself
    # In another type than theirs, each norm has cast the stream.
    into_norms = (streams if itemsize == wide else 2) * config.width * wide
    inside_norms = 2 * numbers_inside_norm(config) * wide
    out_of_norms = 2 * config.width * itemsize
    return into_norms + inside_norms + out_of_norms


def norms_behind_bytes(config: ModelConfig, wide: int) -> int:
    """Bytes a token of the norms behind attention and MLP, whose results are added and not kept."""
    if not config.norm_after:
        return 0
    return 2 * (config.width + numbers_inside_norm(config)) * wide


def numbers_inside_norm(config: ModelConfig) -> int:
    """Numbers a token that a norm of the residual stream saves beside its input."""
    if config.norm == "layer":
        return 2  # mean and deviation
    return config.width + 1  # the normalised input and its scale


def head_norm_bytes(config: ModelConfig, wide: int) -> int:
    """Bytes a token that the norms of queries and keys save, if a family has them."""
    input_and_normalised = 2 * normed_queries_and_keys(config)
    scales = {"none": 0, "each head": config.heads + config.kv_heads, "all heads": 2}
    return wide * (input_and_normalised + scales[config.qk_norm])


def mlp_tensors(config: ModelConfig) -> int:
    """How many tensors of the MLP's width are saved."""
    if config.gated:
        return 4  # gate, activation of the gate, up, and their product
    if config.activation == "relu":
        return 1  # the result, which tells where the input was positive
    return 2  # input and result of the activation


def attention_activations(config: ModelConfig, items: Items, itemsize: int, flash: bool) -> int:
    """Bytes of queries, keys, values, results, and what the softmax saves, of one block."""
    if flash:
        return flash_activations(config, items, itemsize)
    return tile_activations(config, items, itemsize)


def flash_activations(config: ModelConfig, items: Items, itemsize: int) -> int:
    """As one stream, with the keys of a shared prompt gathered for both of its responses."""
    tokens = tokens_of(items)
    keys = sum(segment.keys for segment in segments_of(items))
    width = config.heads * config.head_width  # keys of grouped heads are repeated
    queries_and_results = 2 * tokens * width * itemsize
    keys_and_values = 2 * keys * width * itemsize
    logsumexp = tokens * config.heads * 4
    return queries_and_results + keys_and_values + logsumexp


def tile_activations(config: ModelConfig, items: Items, itemsize: int) -> int:
    """As padded tiles of T segments with Q queries and L keys.

    Their masks are made once a stream, for all blocks.
    """
    query_width = config.heads * config.head_width
    key_width = config.kv_heads * config.head_width
    total = tokens_of(items) * query_width * itemsize  # the results in the order of the stream
    for T, Q, L in tile_shapes(segments_of(items)):
        queries_and_results = 2 * Q * query_width * itemsize
        keys_and_values = 2 * L * key_width * itemsize
        logsumexp = Q * config.heads * max(4, itemsize)
        total += T * (queries_and_results + keys_and_values + logsumexp)
    return total
