"""What a training step costs, by arithmetic: bytes of each kind, FLOPs, seconds. Nothing is allocated.

1 GB is 10^9 bytes throughout, and a GPU of "24 GB" is taken to have 24 x 10^9: what it has more, 7% where it is 24 GiB, is left to
CUDA itself and to the gaps between allocations. N tokens, D width, F width of the MLP, H heads of width C, G key/value heads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ..data.pairs import Source, split_by_tokens
from ..model.attention import Segment, tile_shapes
from ..model.trunk import ModelConfig, Trunk
from .optim import BLOCK
from .recipe import Recipe

BYTES = {
    "float32": 4,
    "split": 2,
    "bfloat16": 2,
}  # of a parameter of a matrix, where it is computed with
EFFICIENCY = 0.5  # share of its peak that a GPU is taken to reach


class Gpu(NamedTuple):
    """Peak of bf16 matrix products (FLOP/s), bytes a second of its memory and of its way to the host."""

    flops: float
    bandwidth: float
    link: float


GPUS = {
    "H200": Gpu(989e12, 4.8e12, 50e9),
    "A100": Gpu(312e12, 2.0e12, 25e9),
    "RTX 4090": Gpu(165e12, 1.0e12, 25e9),
}


class PairShape(NamedTuple):
    """Tokens of a pair: what both texts share, and the rest of each."""

    shared: int
    chosen: int
    rejected: int

    @property
    def tokens(self):
        return sum(self)


@dataclass(frozen=True)
class Workload:
    """What is to be computed: the pairs of the largest step, and how many steps and unique tokens there are in all."""

    largest: tuple[PairShape, ...]
    steps: int
    tokens: int


def workload(sources: Sequence[Source], epochs: Iterable[list[np.ndarray]]) -> Workload:
    """Of real pairs: the steps that `epoch_steps` makes of them."""
    tokens, starts = (
        np.array([p.tokens for s in sources for p in s.pairs]),
        np.cumsum([0, *(len(s.pairs) for s in sources)]),
    )
    largest, most, steps, total = None, 0, 0, 0
    for epoch in epochs:
        for chosen in epoch:
            size = int(tokens[starts[chosen[:, 0]] + chosen[:, 1]].sum())
            steps, total = steps + 1, total + size
            largest, most = (chosen, size) if size > most else (largest, most)
    pairs = [sources[k].pairs[i] for k, i in largest]
    return Workload(
        tuple(
            PairShape(p.shared, len(p.chosen) - p.shared, len(p.rejected) - p.shared) for p in pairs
        ),
        steps,
        total,
    )


# ---- counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Shapes of every parameter: matrices and vectors of one block, of the embeddings, of the top (final norm and head)."""

    block: tuple[tuple[int, ...], ...]
    embeddings: tuple[tuple[int, ...], ...]
    top: tuple[tuple[int, ...], ...]
    blocks: int

    @property
    def parts(self) -> list[tuple[tuple[int, ...], ...]]:
        return [self.top, *[self.block] * self.blocks, self.embeddings]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for part in self.parts for shape in part)


@lru_cache(maxsize=8)
def sizes_of(c: ModelConfig) -> Sizes:
    """Counted on a trunk without memory."""
    with torch.device("meta"):
        trunk = Trunk(replace(c, blocks=1, windows=c.windows[:1]))
    shapes = {name: tuple(p.shape) for name, p in trunk.named_parameters()}
    of = lambda wanted: tuple(shape for name, shape in shapes.items() if wanted(name))
    return Sizes(
        of(lambda n: n.startswith("blocks.")),
        of(lambda n: "embedding" in n),
        (*of(lambda n: n.startswith("final_norm")), (c.width,)),
        c.blocks,
    )


def parameter_bytes(shapes, recipe: Recipe) -> int:
    """Bytes of what the model holds."""
    return sum(math.prod(s) * (BYTES[recipe.parameters] if len(s) > 1 else 4) for s in shapes)


def state_bytes(shapes, recipe: Recipe) -> int:
    """Bytes of the optimizer's state: both moments, and the low halves of split parameters."""
    total = 0
    for shape in shapes:
        n, matrix = math.prod(shape), len(shape) > 1
        total += 2 * n if matrix and recipe.parameters == "split" else 0
        if matrix and recipe.moments == "int8":
            total += 2 * n + 3 * 4 * -(-n // BLOCK)
        else:
            total += 2 * n * (2 if matrix and recipe.moments == "bfloat16" else 4)
    return total


# ---- what backward keeps -----------------------------------------------------------------------------------------------


def segments_of(pairs: Sequence[PairShape]) -> list[Segment]:
    """The attention segments of a packed batch, as attention.pack lays them out."""
    segments, at = [], 0
    for shared, chosen, rejected in pairs:
        first = at + shared + chosen
        segments += [Segment(at, first, at, at), Segment(first, first + rejected, at, at + shared)]
        at = first + rejected
    return segments


@lru_cache(maxsize=4096)
def kept_of_block(
    c: ModelConfig, pairs: tuple[PairShape, ...], width: int, recompute: str, flash: bool
) -> int:
    """Bytes that autograd keeps of one block's forward pass, its input included, parameters and their copies not.

    width: bytes of an activation. none: what enters each norm (as a new fp32 tensor unless it is one), for RMSNorm also its normalised fp32
    form, what leaves each norm, q, k, v and the result of attention, what enters and leaves the MLP's activation. selective: what leaves
    norms and activation, and the insides of norms, are not kept. full: the block's input alone.
    """
    N, D, wide = sum(p.tokens for p in pairs), c.width, max(4, width)
    if recompute == "full":
        return N * D * width
    attention = kept_of_attention(c, pairs, width, flash)
    inputs, heads = (
        (1 if c.parallel_residual else 2) * D * width,
        (c.heads + c.kv_heads) * c.head_width if c.qk_norm else 0,
    )
    if recompute == "selective":
        return attention + N * (
            inputs + heads * width + c.mlp_width * width * (2 if c.gated else 1)
        )
    norms = (inputs if width == wide else 2 * D * wide) + 2 * D * width  # what enters, what leaves
    norms += (
        2 * 2 * wide if c.norm == "layer" else 2 * (D + 1) * wide
    )  # mean and deviation, or the normalised input
    norms += 2 * heads * wide + (c.heads + c.kv_heads) * wide if c.qk_norm else 0
    return attention + N * (
        norms + c.mlp_width * width * (4 if c.gated else 1 if c.activation == "relu" else 2)
    )


def kept_of_attention(c: ModelConfig, pairs: Sequence[PairShape], width: int, flash: bool) -> int:
    """Queries, keys, values, results, and the logarithms of the softmax's sums; as one stream (flash) or in padded tiles with their masks."""
    heads, groups, segments = c.heads * c.head_width, c.kv_heads * c.head_width, segments_of(pairs)
    N = sum(p.tokens for p in pairs)
    if flash:
        keys = sum(s.keys for s in segments) * (
            groups if c.kv_heads == c.heads else heads
        )  # repeated for grouped heads
        return width * (2 * N * heads + 2 * keys) + 4 * N * c.heads
    tiles = sum(
        T * (width * (2 * Q * heads + 2 * L * groups + Q * L) + max(4, width) * Q * c.heads)
        for T, Q, L in tile_shapes(segments)
    )
    return tiles + N * heads * width  # put in order again


# ---- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at the fullest moment of a step on the device, and on the host."""

    moment: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.device.values())


def memory_of(c: ModelConfig, work: Workload, recipe: Recipe, width: int, flash: bool) -> Memory:
    """The peak of the largest step. width: bytes of an activation; flash: attention over one stream, as on CUDA in bf16."""
    s = sizes_of(c)
    chunks = [
        work.largest[part.start : part.stop]
        for part in split_by_tokens([p.tokens for p in work.largest], recipe.micro_tokens)
    ]
    longest = max(p.shared + max(p.chosen, p.rejected) for p in work.largest)
    flash = flash and not any(window is not None and window < longest for window in c.windows)
    moments = (plain_moments if recipe.engine == "plain" else streamed_moments)(
        c, s, chunks, recipe, width, flash
    )
    states = [state_bytes(part, recipe) for part in s.parts]
    away = "states" in recipe.offload
    device = {
        "parameters": sum(parameter_bytes(part, recipe) for part in s.parts),
        "optimizer states": sum(states) if not away else sum(sorted(states)[-3:]),
    }
    moment, items = max(
        ((name, device | items) for name, items in moments.items()),
        key=lambda pair: sum(pair[1].values()),
    )
    host = {"optimizer states": sum(states)} if away else {}
    if "inputs" in recipe.offload:
        host["block inputs"] = s.blocks * sum(
            1 << (sum(p.tokens for p in chunk) * c.width * width - 1).bit_length()
            for chunk in chunks
        )  # torch's pinned memory comes in powers of 2
    return Memory(moment, {name: n for name, n in items.items() if n}, host)


def copies(shapes, recipe: Recipe, width: int) -> int:
    """Bytes of matrices in the type in which they are computed with, where that is not the one in which they are held."""
    return (
        sum(math.prod(shape) * width for shape in shapes if len(shape) > 1)
        if BYTES[recipe.parameters] != width
        else 0
    )


def working(c: ModelConfig, tokens: int, width: int) -> int:
    """Bytes of what lives for a moment in a block's backward: gradients in the MLP's width, of the residual stream, of q, k and v."""
    return tokens * width * ((3 if c.gated else 2) * c.mlp_width + 2 * c.width)


def made_again(c, pairs, width, recompute, flash) -> int:
    """Bytes of one block's activations that backward computes again."""
    return (
        0
        if recompute == "none"
        else kept_of_block(c, pairs, width, "none", flash)
        - kept_of_block(c, pairs, width, recompute, flash)
    )


def plain_moments(c, s: Sizes, chunks, recipe, width, flash) -> dict[str, dict[str, int]]:
    """The last micro-batch's backward: early, when all activations are there, and late, when all gradients are."""
    numel = lambda shapes: sum(map(math.prod, shapes))
    kept = max(
        c.blocks * kept_of_block(c, chunk, width, recipe.recompute, flash) for chunk in chunks
    )
    inside = max(made_again(c, chunk, width, recipe.recompute, flash) for chunk in chunks)
    largest = max(sum(p.tokens for p in chunk) for chunk in chunks)
    all_copies = (
        copies([shape for part in s.parts[1:-1] for shape in part], recipe, width)
        if recipe.recompute != "full"
        else copies(s.block, recipe, width)
    )
    tables = 4 * numel(s.embeddings)
    early = {
        "gradients": 4 * s.parameters if len(chunks) > 1 else 4 * numel(s.block),
        "kept for backward": kept,
        "made again": inside,
        "copies to compute with": all_copies,
        "in passing": working(c, largest, width) + largest * c.width * width,
    }
    late = {
        "gradients": 4 * s.parameters,
        "kept for backward": kept // c.blocks,
        "made again": inside,
        "in passing": (tables if len(chunks) > 1 else 0) + 2 * largest * c.width * max(4, width),
    }
    return {"backward, last block": early, "backward, embedding": late}


def streamed_moments(c, s: Sizes, chunks, recipe, width, flash) -> dict[str, dict[str, int]]:
    """The end of the way forward, the walk's first block, the embedding."""
    numel, N = (
        lambda shapes: sum(map(math.prod, shapes)),
        sum(p.tokens for chunk in chunks for p in chunk),
    )
    tokens, recompute = [sum(p.tokens for p in chunk) for chunk in chunks], recipe.recompute
    largest, here = (
        max(tokens),
        c.blocks * sum(kept_of_block(c, chunk, width, recompute, flash) for chunk in chunks),
    )
    if "inputs" in recipe.offload:
        here = 3 * largest * c.width * width  # one computed with, one on its way each way
    inside = max(made_again(c, chunk, width, recompute, flash) for chunk in chunks)
    block_copies = copies(s.block, recipe, width) * (c.blocks if recompute != "full" else 1)
    gradient = numel(s.block) * (width if len(chunks) == 1 else max(4, width) + width)
    always = {"kept for backward": here, "copies to compute with": block_copies}
    return {
        "forward, last block": always
        | {"in passing": N * c.width * width + working(c, largest, width)},
        "backward, last block": always
        | {
            "gradients": gradient,
            "made again": inside,
            "in passing": N * c.width * width + working(c, largest, width),
        },
        "backward, embedding": {
            "gradients": 4 * numel(s.embeddings),
            "in passing": N * c.width * (2 * width + (4 if width < 4 else 0)),
        },
    }


# ---- time --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def forward_flops(c: ModelConfig, pairs: tuple[PairShape, ...]) -> float:
    """2 for every multiplication with an addition: matrices by token, attention by visible pair of tokens; embeddings not counted."""
    matrices = sum(math.prod(shape) for shape in sizes_of(c).block if len(shape) > 1)
    linear = attention = 0
    for p in pairs:
        linear += p.tokens
        attention += sum(n * (n + 1) / 2 for n in (p.shared, p.chosen, p.rejected)) + p.shared * (
            p.chosen + p.rejected
        )
    return c.blocks * (2.0 * matrices * linear + 4.0 * c.heads * c.head_width * attention)


def step_flops(c: ModelConfig, work: Workload, recipe: Recipe) -> tuple[float, float]:
    """Useful and executed FLOPs of the largest step: 3 forwards are useful; recomputation adds one, less the last product of each block."""
    forward = forward_flops(c, work.largest)
    saved = (
        2.0 * c.blocks * c.width * c.mlp_width * sum(p.tokens for p in work.largest)
    )  # the MLP's last product is not made again
    executed = 3 * forward + (forward - saved if recipe.recompute == "full" else 0)
    if recipe.engine == "plain" and sum(p.tokens for p in work.largest) > recipe.micro_tokens:
        executed += forward  # whole-step weights over several micro-batches
    return 3 * forward, executed


def step_seconds(c: ModelConfig, work: Workload, recipe: Recipe, gpu: Gpu) -> float:
    """At EFFICIENCY of the GPU's peak, then one pass of the optimizer over its numbers; the way to the host runs beside, but for a walk's first and last part."""
    s = sizes_of(c)
    states = sum(state_bytes(part, recipe) for part in s.parts)
    touched = (
        2 * (states + sum(parameter_bytes(part, recipe) for part in s.parts)) + 8 * s.parameters
    )
    inputs = (
        c.blocks * sum(p.tokens for p in work.largest) * c.width * 2
        if "inputs" in recipe.offload
        else 0
    )
    link = (states if "states" in recipe.offload else 0) + inputs  # each way
    computing = step_flops(c, work, recipe)[1] / (EFFICIENCY * gpu.flops) + touched / gpu.bandwidth
    return max(computing + 2 * link / gpu.link / len(s.parts), link / gpu.link)


def in_bytes(count: float) -> str:
    """A number of bytes with its unit: 1 GB is 10^9."""
    unit, size = next(
        (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s or u == "kB"
    )
    return f"{count / size:.1f} {unit}"
