"""How large a model is and what is kept of it, by arithmetic: parameters, gradients, moments.

1 GB is 10^9 bytes throughout. `itemsize` is the bytes of a number; `width` is D, never bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..model.model_config import ModelConfig
from ..model.trunk import Trunk
from .recipe import Recipe
from .storage import SCALE_BLOCK, SCALES
from .trained import ALL, trained_blocks

MATRIX_ITEMSIZE = {"float32": 4, "split": 2, "bfloat16": 2}  # of what the model holds of a matrix

Shape = tuple[int, ...]


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
