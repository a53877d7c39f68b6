"""The memory of a training step in its fullest phase, by arithmetic.

Nothing is allocated. 1 GB is 10^9 bytes throughout, and a GPU of "24 GB" is taken to have no more.
What it has beyond that, 7% of 24 GiB, is left to CUDA itself and to gaps between allocations.

`itemsize` is the bytes of an activation: 2 in bf16, 4 in fp32. `width` is D, never bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..data.pairs import split_by_tokens
from ..model.model_config import ModelConfig
from .activations import block_activations
from .recipe import Recipe
from .sizes import (
    MATRIX_ITEMSIZE,
    ParameterShapes,
    count,
    matrices,
    parameter_bytes,
    parameter_shapes,
    states_of_parts,
    trained_parameters,
)
from .trained import ALL, trained_blocks
from .workload import Items, Workload, texts_of, tokens_of

LOGITS_AT_ONCE = 1024  # targets whose logits a language model has at a time; policy.py's CHUNK


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
