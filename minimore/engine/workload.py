"""What a training has to compute: the shapes of its largest step, and how many steps there are.

An item of a step is a pair, or a prompt with responses that a policy learns. Its shape is

    (tokens that its texts share, the rest of the first text, the rest of the second, ...)

B pairs in a step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..data.pairs import Source, TokenPair
from ..data.sampling import DataOptions, Mix, epoch_steps
from ..reward import ModelOptions, PositionOptions
from .recipe import RecipeOptions

EPOCHS = 20  # that are looked at before a training; later ones are taken to be like them
SHARED = 0.41  # share of a pair's unique tokens that both texts share, a mean of five public sets


@dataclass(frozen=True, kw_only=True)
class RunOptions(RecipeOptions, DataOptions, PositionOptions, ModelOptions):
    """What `train` and `plan` both take: a model, the data of a run, and its recipe."""


class PairShape(NamedTuple):
    """Tokens of a pair: what both texts share, and the rest of each."""

    shared: int
    chosen: int
    rejected: int


ItemShape = tuple[int, ...]
Items = tuple[ItemShape, ...]


def tokens_of(items: Iterable[ItemShape]) -> int:
    """Unique tokens of these items."""
    return sum(sum(item) for item in items)


def texts_of(items: Items) -> int:
    """How many texts the items hold."""
    return sum(len(rests) for _, *rests in items)


@dataclass(frozen=True)
class Workload:
    """The items of the largest step, and how many steps and unique tokens there are in all.

    top: what stands on the trunk: the reward "head", or the unembedding of a language model, which
    is "tied" to the embedding or "untied". A language model learns every token that is not shared.
    """

    largest: Items
    steps: int
    tokens: int
    top: str = "head"

    @property
    def largest_tokens(self) -> int:
        """Unique tokens of the largest step."""
        return tokens_of(self.largest)

    @property
    def unit(self) -> str:
        """What an item is, in a word."""
        return "pairs" if self.top == "head" else "prompts"

    def of_language_model(self, top: str) -> "Workload":
        """The work of learning the same tokens as one response to each prompt."""
        items = tuple((shared, sum(rests)) for shared, *rests in self.largest)
        return replace(self, largest=items, top=top)

    @property
    def largest_targets(self) -> int:
        """Tokens of the largest step that a language model learns."""
        return 0 if self.top == "head" else sum(sum(item[1:]) for item in self.largest)


def shape_of(pair: TokenPair) -> PairShape:
    """How many tokens a pair has, and where."""
    return PairShape(pair.shared, len(pair.chosen) - pair.shared, len(pair.rejected) - pair.shared)


def workload(sources: Sequence[Source], epochs: Iterable[list[np.ndarray]]) -> Workload:
    """The workload of the steps that `epoch_steps` made: each is (B, 2), of source and pair."""
    tokens = np.array([pair.tokens for source in sources for pair in source.pairs])
    first_of_source = np.cumsum([0, *(len(source.pairs) for source in sources)])
    largest, most, steps, total = np.empty((0, 2), int), 0, 0, 0
    for epoch in epochs:
        for sampled in epoch:
            places = first_of_source[sampled[:, 0]] + sampled[:, 1]
            step_tokens = int(tokens[places].sum())
            steps += 1
            total += step_tokens
            if step_tokens > most:
                largest, most = sampled, step_tokens
    shapes = tuple(shape_of(sources[k].pairs[i]) for k, i in largest)
    return Workload(shapes, steps, total)


def workload_of(options: RunOptions, sources: Sequence[Source], mix: Mix) -> Workload:
    """The workload of a training with these options; mix: of the sources.

    At most EPOCHS epochs are counted; each later one is taken to be like their mean.
    """
    counted = min(options.epochs, EPOCHS)
    pairs_of_sources = [len(source.pairs) for source in sources]
    epochs = (
        epoch_steps(
            pairs_of_sources,
            mix.sampling,
            mix.per_source,
            mix.batch_size,
            options.seed,
            epoch,
            mix.per_step,
        )
        for epoch in range(counted)
    )
    of_counted = workload(sources, epochs)
    return Workload(
        of_counted.largest,
        steps=of_counted.steps * options.epochs // counted,
        tokens=of_counted.tokens * options.epochs // counted,
    )


def assumed_workload(tokens: int, pairs: int, batch_size: int, epochs: int) -> Workload:
    """The workload of equal pairs of so many unique tokens each, as long as no data is there."""
    shared = int(SHARED * tokens) if tokens > 3 else 0
    rest = tokens - shared
    pair = PairShape(shared, rest - rest // 2, rest // 2)
    steps = -(-pairs // batch_size) * epochs
    return Workload((pair,) * min(batch_size, pairs), steps, pairs * epochs * tokens)
