"""What a training step costs, by arithmetic: bytes of each kind, FLOPs, seconds.

Nothing is allocated. 1 GB is 10^9 bytes throughout, and a GPU of "24 GB" is taken to have no more.
What it has beyond that, 7% of 24 GiB, is left to CUDA itself and to gaps between allocations.

`itemsize` is the bytes of an activation: 2 in bf16, 4 in fp32. `width` is D, never bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from ..data.pairs import split_by_tokens
from ..model.attention import Segment, tile_shapes
from ..model.model_config import ModelConfig
from ..model.trunk import Trunk
from .recipe import Recipe
from .storage import SCALE_BLOCK, SCALES
from .trained import ALL, trained_blocks
from .workload import Items, ItemShape, Workload, tokens_of

MATRIX_ITEMSIZE = {"float32": 4, "split": 2, "bfloat16": 2}  # of what the model holds of a matrix
EFFICIENCY = 0.5  # share of its peak that a GPU is taken to reach
LOGITS_AT_ONCE = 1024  # targets whose logits a language model has at a time; policy.py's CHUNK

Shape = tuple[int, ...]


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


# ---- parameters and states -----------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterShapes:
    """Shapes of every parameter of one block, of the embeddings, of the final norm, and of a head.

    The head is that of a reward model, or an unembedding that is not tied to the embedding.
    """

    block: tuple[Shape, ...]
    embeddings: tuple[Shape, ...]
    final_norm: tuple[Shape, ...]
    head: tuple[Shape, ...]
    blocks: int

    @property
    def parts(self) -> list[tuple[Shape, ...]]:
        """The parts of the model in the order in which a streamed step goes back through them."""
        return self.trained_parts(ALL)

    def trained_parts(self, train: str) -> list[tuple[Shape, ...]]:
        """Those of which a step changes the parameters, in the same order; train: see trained.py.

        Raises InputError if the model has fewer blocks.
        """
        blocks = trained_blocks(train, self.blocks)
        top = self.head + (self.final_norm if blocks else ())
        return [top, *[self.block] * blocks] + ([self.embeddings] if train == ALL else [])

    def frozen_parts(self, train: str) -> list[tuple[Shape, ...]]:
        """All others."""
        if train == ALL:
            return []
        blocks = trained_blocks(train, self.blocks)
        norm = [] if blocks else [self.final_norm]
        return [*norm, *[self.block] * (self.blocks - blocks), self.embeddings]

    @property
    def parameters(self) -> int:
        """How many numbers all parameters have."""
        return sum(count(part) for part in self.parts)


@lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig, top: str = "head") -> ParameterShapes:
    """The shapes of a model, read from a trunk that has no memory; top: see `Workload`."""
    with torch.device("meta"):
        trunk = Trunk(replace(config, blocks=1, windows=config.windows[:1]))
    block, embeddings, final_norm = [], [], []
    for name, parameter in trunk.named_parameters():
        if name.startswith("blocks."):
            block.append(tuple(parameter.shape))
        elif "embedding" in name:
            embeddings.append(tuple(parameter.shape))
        else:
            final_norm.append(tuple(parameter.shape))
    heads: dict[str, tuple[Shape, ...]] = {
        "head": ((config.width,),),
        "untied": ((config.vocabulary, config.width),),
        "tied": (),
    }
    return ParameterShapes(
        tuple(block), tuple(embeddings), tuple(final_norm), heads[top], config.blocks
    )


def count(shapes: Iterable[Shape]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


def matrices(shapes: Iterable[Shape]) -> list[Shape]:
    """The shapes of more than one dimension: those whose storage a recipe chooses."""
    return [shape for shape in shapes if len(shape) > 1]


def vectors(shapes: Iterable[Shape]) -> list[Shape]:
    """The shapes of one dimension, which are always stored in fp32."""
    return [shape for shape in shapes if len(shape) == 1]


def parameter_bytes(shapes: Iterable[Shape], recipe: Recipe) -> int:
    """Bytes of what the model holds."""
    shapes = tuple(shapes)
    itemsize = MATRIX_ITEMSIZE[recipe.parameters]
    return itemsize * count(matrices(shapes)) + 4 * count(vectors(shapes))


def state_bytes(shapes: Iterable[Shape], recipe: Recipe) -> int:
    """Bytes of the optimizer's state: both moments, and the low halves of split parameters."""
    shapes = tuple(shapes)
    vector_moments = 2 * 4 * count(vectors(shapes))
    moments = matrix_moment_bytes(shapes, recipe.moments) + vector_moments
    return low_half_bytes(shapes, recipe) + moments


def low_half_bytes(shapes: Iterable[Shape], recipe: Recipe) -> int:
    """Bytes of the 16 bits that split parameters lack; of frozen ones they are all of the state."""
    return 2 * count(matrices(shapes)) if recipe.parameters == "split" else 0


def states_of_parts(shapes: ParameterShapes, recipe: Recipe) -> list[int]:
    """Bytes of the state of every part: of those that are trained, then of those that are not."""
    trained = [state_bytes(part, recipe) for part in shapes.trained_parts(recipe.train)]
    return trained + [low_half_bytes(part, recipe) for part in shapes.frozen_parts(recipe.train)]


def checkpoint_bytes(shapes: ParameterShapes, recipe: Recipe) -> int:
    """Bytes of the tensors of a saved state: fp32 parameters, and moments as they are stored."""
    trained = shapes.trained_parts(recipe.train)
    moments = sum(state_bytes(part, recipe) - low_half_bytes(part, recipe) for part in trained)
    return 4 * shapes.parameters + moments


def trained_parameters(shapes: ParameterShapes, recipe: Recipe) -> int:
    """How many numbers a step changes."""
    return sum(count(part) for part in shapes.trained_parts(recipe.train))


def matrix_moment_bytes(shapes: Iterable[Shape], moments: str) -> int:
    """Bytes of both moments of the matrices among these shapes."""
    shapes = matrices(shapes)
    if moments != "int8":
        return 2 * count(shapes) * (2 if moments == "bfloat16" else 4)
    codes = 2 * count(shapes)
    blocks = sum(-(-math.prod(shape) // SCALE_BLOCK) for shape in shapes)
    return codes + 4 * len(SCALES) * blocks


def bytes_held(shapes: ParameterShapes, recipe: Recipe) -> int:
    """Bytes that lie on the device throughout, and the whole gradient of the plain engine."""
    held = sum(parameter_bytes(part, recipe) for part in shapes.parts)
    if "states" not in recipe.offload:
        held += sum(states_of_parts(shapes, recipe))
    if recipe.engine == "plain":
        held += 4 * trained_parameters(shapes, recipe)  # gradients
    return held


# ---- activations of one block --------------------------------------------------------------------


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


# ---- the peak of a step --------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes by kind in the fullest phase of a step, on the device and on the host."""

    phase: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def offloaded(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())


@dataclass(frozen=True)
class StepShape:
    """All that the bytes of a step depend on; top: see `Workload`."""

    config: ModelConfig
    micro_batches: tuple[Items, ...]
    recipe: Recipe
    itemsize: int
    flash: bool
    top: str = "head"

    @property
    def shapes(self) -> ParameterShapes:
        """Shapes of the parameters."""
        return parameter_shapes(self.config, self.top)

    @property
    def blocks(self) -> int:
        """How many blocks are trained."""
        return trained_blocks(self.recipe.train, self.config.blocks)

    @property
    def trained(self) -> int:
        """How many numbers the step changes."""
        return trained_parameters(self.shapes, self.recipe)

    @property
    def several(self) -> bool:
        """Whether gradients are summed over micro-batches."""
        return len(self.micro_batches) > 1

    @cached_property
    def tokens(self) -> int:
        """Unique tokens of the step."""
        return sum(tokens_of(items) for items in self.micro_batches)

    @cached_property
    def most_tokens(self) -> int:
        """Unique tokens of the largest micro-batch."""
        return max(tokens_of(items) for items in self.micro_batches)

    @cached_property
    def saved(self) -> list[int]:
        """Of each micro-batch, the bytes of activations that are saved of one block."""
        return [self._activations(items, self.recipe.recompute) for items in self.micro_batches]

    @cached_property
    def recomputed(self) -> int:
        """Bytes of one block's activations that backward computes again, of the fullest one."""
        if self.recipe.recompute == "none":
            return 0
        entire = [self._activations(items, "none") for items in self.micro_batches]
        return max(total - saved for total, saved in zip(entire, self.saved))

    @property
    def casts(self) -> int:
        """Bytes of one block's matrices in the compute type, if they are held in another one."""
        if MATRIX_ITEMSIZE[self.recipe.parameters] == self.itemsize:
            return 0
        return self.itemsize * count(matrices(self.shapes.block))

    def residual(self, tokens: int) -> int:
        """Bytes of the residual stream, or of its gradient."""
        return tokens * self.config.width * self.itemsize

    @property
    def block_gradients(self) -> int:
        """Bytes of gradients inside one block: in the MLP, and of residual stream and attention."""
        mlp = (3 if self.config.gated else 2) * self.config.mlp_width
        residual_and_attention = 2 * self.config.width
        return self.most_tokens * self.itemsize * (mlp + residual_and_attention)

    @property
    def frozen_forward(self) -> dict[str, int]:
        """Bytes inside of a frozen block, by kind; {} if none is.

        No graph holds anything of it, so it has at most what a graph would hold of one block.
        """
        if self.blocks == self.config.blocks:
            return {}
        inside = max(self._activations(items, "none") for items in self.micro_batches)
        return {"casts": self.casts, "scratch": inside}

    def _activations(self, items: Items, recompute: str) -> int:
        return block_activations(self.config, items, self.itemsize, recompute, self.flash)

    # ---- the top of a language model ----

    @property
    def unembedding(self) -> int:
        """Numbers of the unembedding; 0 for a reward model."""
        return 0 if self.top == "head" else self.config.vocabulary * self.config.width

    @property
    def tied_gradient(self) -> int:
        """Bytes of the unembedding's gradient, which waits for that of the embedding."""
        is_there = self.top == "tied" and self.is_unembedding_trained
        return self.itemsize * self.unembedding if is_there else 0

    @property
    def is_unembedding_trained(self) -> bool:
        """Whether a language model's unembedding changes; a tied one does with the embedding."""
        return self.top == "untied" or self.recipe.train == ALL

    def language_loss(self, micro_batches: Sequence[Items]) -> dict[str, int]:
        """Bytes of the loss of these micro-batches and of its gradients, as TokenLoss makes them.

        The logits exist for a chunk of targets at a time, the states for all of them.
        """
        narrow, wide = self.itemsize, max(4, self.itemsize)  # the compute type, and at least fp32
        targets = sum(sum(item[1:]) for items in micro_batches for item in items)
        logits = min(targets, LOGITS_AT_ONCE) * self.config.vocabulary
        states = targets * self.config.width
        is_cast = MATRIX_ITEMSIZE[self.recipe.parameters] != self.itemsize
        # The logits, their softmax, and its gradient before and after it is cast.
        of_logits = 3 * wide + (narrow if narrow < wide else 0)
        # What the last block left; that in fp32, normalised, and weighted; the gradients of the
        # last and of the first of these three.
        of_states = narrow + 3 * wide + 2 * wide
        of_gradient = wide + narrow  # the sum over chunks, and one term of it, or its cast
        return {
            "gradients": of_gradient * self.unembedding if self.is_unembedding_trained else 0,
            "casts": narrow * self.unembedding if is_cast else 0,
            "logits": of_logits * logits,
            "scratch": of_states * states,
        }


Phases = dict[str, dict[str, int]]  # name -> bytes by kind, beside parameters and states


def plain_phases(step: StepShape) -> Phases:
    """The last micro-batch's backward pass of the plain engine.

    At its start all activations are there, at its end all gradients are. With frozen blocks it ends
    at the first one that is not, and what goes forward through them may take more.
    """
    shapes, blocks = step.shapes, step.blocks
    all_gradients = 4 * step.trained
    phases = frozen_phases(step, {"gradients": all_gradients if step.several else 0})
    if blocks == 0:
        return phases
    saved = max(step.saved)
    casts = step.casts * (1 if step.recipe.recompute == "full" else blocks)
    start = {
        # The sums of the micro-batches before, or the last block's gradient.
        "gradients": all_gradients if step.several else 4 * count(shapes.block),
        "saved activations": blocks * saved,
        "recomputed": step.recomputed,  # of the last block
        "casts": casts,  # a graph that was not dropped holds those of its block
        "scratch": step.block_gradients + step.residual(step.most_tokens),
    }
    # The embedding tables' dense gradient of one micro-batch, before it is added to the sum.
    table_gradients = 4 * count(shapes.embeddings) if step.several else 0
    # The gradient of the embedded tokens, and a copy of it, at least fp32.
    residual_gradients = 2 * step.most_tokens * step.config.width * max(4, step.itemsize)
    end = {
        "gradients": all_gradients,
        "saved activations": saved,  # of the first block
        "recomputed": step.recomputed,
        "scratch": table_gradients + residual_gradients,
    }
    phases["backward, last block"] = start
    if step.recipe.train == ALL:
        phases["backward, embedding"] = end
    else:
        inside = {"casts": step.casts, "scratch": start["scratch"]}
        phases["backward, first trained block"] = end | inside
    if step.top != "head":
        # Every micro-batch has a loss of its own. The casts of its graph are there already.
        top = max((step.language_loss([items]) for items in step.micro_batches), key=total_of)
        phases["loss"] = {
            "gradients": (all_gradients if step.several else 0) + top["gradients"],
            "saved activations": blocks * saved,
            "casts": casts + top["casts"],
            "logits": top["logits"],
            "scratch": top["scratch"] + step.residual(step.most_tokens),
        }
    return phases


def frozen_phases(step: StepShape, others: dict[str, int]) -> Phases:
    """What goes forward through frozen blocks, of either engine; others: bytes that are there, too.

    Where only the head is trained, its gradient comes last, and takes next to nothing.
    """
    phases = {}
    if step.frozen_forward:
        scratch = others.get("scratch", 0) + step.frozen_forward["scratch"]
        phases["forward, frozen blocks"] = others | step.frozen_forward | {"scratch": scratch}
    if step.blocks == 0:
        texts = sum(texts_of(items) for items in step.micro_batches)
        states = 4 * texts * step.config.width
        phases["head"] = {"gradients": 4 * step.trained, "scratch": 2 * states}
    return phases


def sharded_phases(step: StepShape, gpus: int) -> Phases:
    """The phases of the plain engine on one of several GPUs; step: of its share of the pairs.

    Gathered are the embeddings, the block in use, and the one that comes next. The gradients of a
    block or of the embeddings are there twice, while they are added up over the GPUs.
    """
    block, embeddings = 4 * count(step.shapes.block), 4 * count(step.shapes.embeddings)
    rows = 4 * step.shapes.parameters // gpus
    start, end = plain_phases(step).values()
    gathered = {"gathered": embeddings + 2 * block}
    return {
        "backward, last block": start
        | gathered
        | {"gradients": (rows if step.several else 0) + 2 * block},
        "backward, embedding": end | gathered | {"gradients": rows + 2 * embeddings},
    }


def streamed_phases(step: StepShape) -> Phases:
    """The end of the way forward, the first block of the way back, and the embedding."""
    shapes, blocks, itemsize = step.shapes, step.blocks, step.itemsize
    phases = frozen_phases(step, {"scratch": step.residual(step.tokens)})
    if blocks == 0:
        return phases
    saved = blocks * sum(step.saved)
    if "inputs" in step.recipe.offload:
        saved = 3 * step.residual(step.most_tokens)  # one in use, one on its way each way
    casts = step.casts * (1 if step.recipe.recompute == "full" else blocks)
    # The residual stream of all micro-batches (on the way back its gradient), inside of one block.
    scratch = step.residual(step.tokens) + step.block_gradients
    forward = {"saved activations": saved, "casts": casts, "scratch": scratch}
    # Over several micro-batches: the gradient of one, beside the sum, which is at least fp32.
    gradient_itemsize = max(4, itemsize) + itemsize if step.several else itemsize
    backward = {
        # Of the last block alone, and a tied unembedding's.
        "gradients": gradient_itemsize * count(shapes.block) + step.tied_gradient,
        "saved activations": saved,
        "recomputed": step.recomputed,
        "casts": casts,
        "scratch": scratch,
    }
    # The gradient of the embedded tokens by micro-batch, joined, and as fp32 if it is not.
    as_fp32 = 4 * step.tokens * step.config.width if itemsize < 4 else 0
    embedding = {
        "gradients": 4 * count(shapes.embeddings) + step.tied_gradient,
        "scratch": 2 * step.residual(step.tokens) + as_fp32,
    }
    phases |= {"forward, last block": forward, "backward, last block": backward}
    if step.recipe.train == ALL:
        phases["backward, embedding"] = embedding
    if step.top != "head":
        top = step.language_loss(step.micro_batches)
        phases["loss"] = {
            "gradients": top["gradients"],
            "saved activations": saved,
            "casts": casts + top["casts"],
            "logits": top["logits"],
            "scratch": top["scratch"] + step.residual(step.tokens),
        }
    return phases


def total_of(kinds: dict[str, int]) -> int:
    """Bytes of all kinds."""
    return sum(kinds.values())


def memory_of(
    config: ModelConfig, work: Workload, recipe: Recipe, itemsize: int, flash: bool, gpus: int = 1
) -> Memory:
    """The memory of the largest step in its fullest phase.

    flash: attention over one stream, as on CUDA in bf16. A window that is shorter than the longest
    text takes the other route. gpus: over which the model is sharded; work is then one's share.
    """
    longest = max(shared + max(rests) for shared, *rests in work.largest)
    is_cut = any(window is not None and window < longest for window in config.windows)
    ranges = split_by_tokens([sum(item) for item in work.largest], recipe.micro_tokens)
    micro_batches = tuple(work.largest[part.start : part.stop] for part in ranges)
    step = StepShape(config, micro_batches, recipe, itemsize, flash and not is_cut, work.top)
    phases = plain_phases(step) if recipe.engine == "plain" else streamed_phases(step)
    if gpus > 1:
        phases = sharded_phases(step, gpus)
    phase = max(phases, key=lambda name: total_of(phases[name]))
    always = always_on_device(step.shapes, recipe)
    device = {kind: n // gpus for kind, n in always.items()} | phases[phase]
    return Memory(phase, {kind: n for kind, n in device.items() if n}, always_on_host(step))


def always_on_device(shapes: ParameterShapes, recipe: Recipe) -> dict[str, int]:
    """Bytes that are on the device in every phase."""
    states = states_of_parts(shapes, recipe)
    if "states" in recipe.offload:  # of a part that is updated, one that comes, one that leaves
        trained = len(shapes.trained_parts(recipe.train))
        states = sorted(states[:trained])[-3:]
    return {
        "parameters": sum(parameter_bytes(part, recipe) for part in shapes.parts),
        "optimizer states": sum(states),
    }


def always_on_host(step: StepShape) -> dict[str, int]:
    """Bytes that the host holds."""
    host = {}
    if "states" in step.recipe.offload:
        host["optimizer states"] = sum(states_of_parts(step.shapes, step.recipe))
    if "inputs" in step.recipe.offload:
        inputs = [step.residual(tokens_of(items)) for items in step.micro_batches]
        # torch's pinned memory comes in powers of two.
        host["block inputs"] = step.blocks * sum(next_power_of_two(n) for n in inputs)
    return host


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least a number.

    >>> next_power_of_two(8), next_power_of_two(9)
    (8, 16)
    """
    return 1 << (number - 1).bit_length()


# ---- FLOPs and time ------------------------------------------------------------------------------


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


def texts_of(items: Items) -> int:
    """How many texts the items hold."""
    return sum(len(rests) for _, *rests in items)


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


# ---- numbers with their units --------------------------------------------------------------------


def in_bytes(number: float) -> str:
    """A number of bytes with its unit: 1 GB is 10^9.

    >>> in_bytes(2.4e10), in_bytes(500)
    ('24.0 GB', '0.5 kB')
    """
    return _with_unit(number, {"GB": 1e9, "MB": 1e6, "kB": 1e3})


def in_time(seconds: float) -> str:
    """A duration in hours, minutes, seconds or milliseconds.

    >>> in_time(5400), in_time(90), in_time(2), in_time(0.0003)
    ('1.5 h', '1.5 min', '2.0 s', '0.3 ms')
    """
    return _with_unit(seconds, {"h": 3600, "min": 60, "s": 1, "ms": 1e-3})


def in_whole_time(seconds: float) -> str:
    """A duration that is only guessed: whole seconds, at least one, or minutes, or hours.

    >>> in_whole_time(0.3), in_whole_time(90), in_whole_time(200), in_whole_time(9000)
    ('1 s', '90 s', '3 min', '2.5 h')
    """
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else in_time(seconds)


def in_flops(number: float) -> str:
    """A number of FLOPs with its unit.

    >>> in_flops(1.0637e15), in_flops(5.67e9)
    ('1,063.7 TFLOPs', '5.67 GFLOPs')
    """
    if number >= 1e11:
        return f"{number / 1e12:,.1f} TFLOPs"
    return f"{number / 1e9:,.2f} GFLOPs"


def _with_unit(number: float, units: dict[str, float]) -> str:
    """A number in the first, largest, unit of which it is at least one, or else in the last."""
    fitting = [(unit, size) for unit, size in units.items() if number >= size]
    unit, size = fitting[0] if fitting else list(units.items())[-1]
    return f"{number / size:.1f} {unit}"
