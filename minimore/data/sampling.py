"""Which pairs a training step sees.

K sources, B pairs in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..options import COUNT, Range, option, require
from .labels import LabelOptions
from .pairs import TRUNCATE, TextRules

PAIRS_PER_SOURCE = Range(least=1, most=10**7)  # their order is made at once


@dataclass(frozen=True, kw_only=True)
class DataOptions(LabelOptions):
    """The options of a command that name sources and say how pairs are drawn from them."""

    source: tuple[str, ...] = option(
        (),
        repeat=True,
        value="NAME=TRAIN.jsonl[,TEST.jsonl]",
        help="once per source; NAME=,TEST.jsonl is a group that is tested and never trained on",
    )
    sampling: str = option(
        "equal",
        choices=("equal", "proportional"),
        help="equal shares of every source in every step, or a random mix of everything",
    )
    pairs_per_source: int | None = option(
        None,
        within=PAIRS_PER_SOURCE,
        help="resample every source to this many pairs an epoch (default under equal sampling: "
        "all pairs / sources)",
    )
    max_length: int = option(512, within=COUNT, help="tokens a text, cut on the left")
    truncate: str = option(
        "each",
        choices=TRUNCATE,
        help="cut each side of a pair on its own (the paper), or both alike, so that long pairs "
        "share their prompt",
    )
    chat: bool = option(
        False,
        help="read prompts and responses that are strings as messages of a conversation",
    )
    append_eos: str = option(
        "no",
        choices=("no", "yes"),
        help="end every text with the EOS token and read its reward there, as TRL does; the "
        "paper's code does, too. Conversations end as their template writes them",
    )
    epochs: int = option(1, within=COUNT, help="passes over the sampled pairs")
    batch_size: int | None = option(
        None,
        within=Range(least=1),
        help="pairs a step; a multiple of the sources under equal sampling (default: 16 x sources)",
    )

    @property
    def rules(self) -> TextRules:
        """How texts become token ids."""
        return TextRules(self.max_length, self.truncate, self.chat, self.append_eos == "yes")


def batch_size_of(options: DataOptions, sources: int) -> int:
    """Pairs in a step; raises InputError where equal shares are not possible."""
    size = 16 * sources if options.batch_size is None else options.batch_size
    require(
        options.sampling != "equal" or size % sources == 0,
        f"--batch-size {size}: under equal sampling a step holds the same number of pairs of each "
        f"of the {sources} sources; expected a multiple of {sources}",
    )
    return size


def epoch_steps(
    sizes: Sequence[int],
    sampling: str,
    per_source: int | None,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[np.ndarray]:
    """The pairs of every step of one epoch: a list of (B, 2), a source and a pair in it.

    `equal` takes per_source pairs of every source, by default all pooled pairs / K. A smaller
    source is repeated, a larger one is sampled. A step has B / K of each source, one of each in
    turn.
    `proportional` is a random mix of everything; with per_source each source is resampled first.

    A pure function of its arguments, so a resumed run continues in place.
    """
    K = len(sizes)
    if sampling == "equal" or per_source:
        counts = [per_source or max(1, sum(sizes) // K)] * K
    else:
        counts = list(sizes)
    orders = [
        _resampled(k, size, count, np.random.default_rng([seed, epoch, k]))
        for k, (size, count) in enumerate(zip(sizes, counts))
    ]
    if sampling == "equal":
        pool = np.stack(orders, 1).reshape(-1, 2)  # one of each source in turn
    else:
        mix = np.random.default_rng([seed, epoch, K]).permutation(sum(counts))
        pool = np.concatenate(orders)[mix]
    return [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]


def _resampled(k: int, size: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` pairs of source k, which has `size`: permutations, the last one cut. (count, 2)"""
    rounds = [random.permutation(size) for _ in range(-(-count // size))]
    return np.stack([np.full(count, k), np.concatenate(rounds)[:count]], 1)
