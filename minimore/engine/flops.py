"""What a training step computes, and how long that takes on a GPU, by arithmetic."""

from functools import lru_cache
from typing import NamedTuple

from ..model.model_config import ModelConfig
from .recipe import Recipe
from .sizes import (
    count,
    matrices,
    parameter_bytes,
    parameter_shapes,
    state_bytes,
    trained_parameters,
)
from .trained import ALL, trained_blocks
from .workload import Items, Workload, texts_of, tokens_of

EFFICIENCY = 0.5  # share of its peak that a GPU is taken to reach


class Gpu(NamedTuple):
    """Peak of bf16 products (FLOP/s); bytes a second of its memory, to the host, to other GPUs."""

    flops: float
    bandwidth: float
    link: float
    peers: float


GPUS = {
    "H200": Gpu(989e12, 4.8e12, 50e9, 450e9),
    "A100": Gpu(312e12, 2.0e12, 25e9, 300e9),
    "RTX 4090": Gpu(165e12, 1.0e12, 25e9, 25e9),
}


@lru_cache(maxsize=64)
def forward_flops(
    config: ModelConfig, items: Items, at_ends: bool, blocks: int | None = None
) -> float:
    """FLOPs of the blocks' matrices and attention: 2 for a multiplication with its addition.

    Each token meets every matrix, and each query the keys that it sees. at_ends: in the last block
    all tokens have queries, keys and values, and the rest is computed where texts end. Embeddings
    are not counted. blocks: so many last ones are; None is all.
    """
    if blocks is None:
        blocks = config.blocks
    if blocks == 0:
        return 0.0
    weights = count(matrices(parameter_shapes(config).block))
    per_pair = 4.0 * config.heads * config.head_width  # FLOPs of a query and a key that it sees
    seen = seen_at_ends = 0.0  # pairs of a query and a key
    for shared, *rests in items:
        within = sum(n * (n + 1) / 2 for n in (shared, *rests))  # each text's own, causally
        seen += within + shared * sum(rests)
        seen_at_ends += sum(shared + rest for rest in rests)
    total = blocks * (2.0 * weights * tokens_of(items) + per_pair * seen)
    if at_ends:
        others = weights - weights_of_heads(config)
        total -= 2.0 * others * (tokens_of(items) - texts_of(items))
        total -= per_pair * (seen - seen_at_ends)
    return total


def weights_of_heads(config: ModelConfig) -> int:
    """Numbers of a block's matrices of queries, keys and values."""
    return config.width * (config.heads + 2 * config.kv_heads) * config.head_width


def step_flops(config: ModelConfig, work: Workload, recipe: Recipe) -> tuple[float, float]:
    """Useful and executed FLOPs of the largest step.

    One forward pass is useful, and a backward pass through what is trained, which costs two. Full
    recomputation adds a forward pass of that, less the last product of each block's MLP, whose
    value backward does not need but for a norm behind it. The logits of a language model are
    computed once, and their gradients: that of the states, and of an unembedding that is trained.
    """
    at_ends = work.top == "head"
    blocks = trained_blocks(recipe.train, config.blocks)
    forward = forward_flops(config, work.largest, at_ends)
    trained_forward = forward_flops(config, work.largest, at_ends, blocks)
    is_frozen_tied = work.top == "tied" and recipe.train != ALL
    products = 2.0 * work.largest_targets * config.vocabulary * config.width
    logits = (2 if is_frozen_tied else 3) * products
    useful = executed = (
        forward + 2 * trained_forward + logits - unneeded_flops(config, work, recipe)
    )
    if recipe.recompute == "full" and blocks:
        in_last_block = texts_of(work.largest) if at_ends else work.largest_tokens
        rows = (blocks - 1) * work.largest_tokens + in_last_block
        last_products = 2.0 * config.width * config.mlp_width * rows
        executed += trained_forward - (0 if config.norm_after else last_products)
    is_cut = work.largest_tokens > recipe.micro_tokens
    if recipe.engine == "plain" and is_cut and at_ends and blocks:
        executed += forward  # whole-step weights over several micro-batches
    return useful, executed


def unneeded_flops(config: ModelConfig, work: Workload, recipe: Recipe) -> float:
    """FLOPs that the plain engine's backward leaves out where the embedding is frozen.

    Nothing needs the gradient of the first trained block's input, which the streamed engine takes
    all the same. A norm before attention needs that of its output; without such a norm autograd
    leaves out the three products behind it.
    """
    blocks = trained_blocks(recipe.train, config.blocks)
    if recipe.engine != "plain" or recipe.train == ALL or not blocks or config.norm_before:
        return 0.0
    return 2.0 * work.largest_tokens * weights_of_heads(config)


def step_seconds(
    config: ModelConfig, work: Workload, recipe: Recipe, gpu: Gpu, gpus: int = 1
) -> float:
    """Seconds of the largest step: its FLOPs at EFFICIENCY, then one pass of the optimizer.

    Copies to the host and back run beside the computation, except those of the first and last part.
    gpus: over which the model is sharded; work is then one's share. What they send each other runs
    beside the computation, too.
    """
    shapes = parameter_shapes(config, work.top)
    parts = shapes.trained_parts(recipe.train)
    parameters = sum(parameter_bytes(part, recipe) for part in parts)
    states = sum(state_bytes(part, recipe) for part in parts)
    gradients = 4 * trained_parameters(shapes, recipe)
    touched = 2 * (states + parameters + gradients)  # each is read once and written once
    each_way = 0
    if "states" in recipe.offload:
        each_way += states
    if "inputs" in recipe.offload:
        each_way += (
            trained_blocks(recipe.train, config.blocks) * work.largest_tokens * config.width * 2
        )
    _, executed = step_flops(config, work, recipe)
    computing = executed / (EFFICIENCY * gpu.flops) + touched / gpus / gpu.bandwidth
    copying = each_way / gpu.link
    if gpus > 1:
        micro_batches = -(-work.largest_tokens // recipe.micro_tokens)
        passes = 3 if micro_batches == 1 else 4  # gathered forward and backward, added up; weights
        others = (gpus - 1) / gpus * parameters  # bytes of the rows that a GPU does not hold
        return max(computing, micro_batches * passes * others / gpu.peers)
    return max(computing + 2 * copying / len(parts), copying)
