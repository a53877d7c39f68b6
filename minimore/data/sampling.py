"""Which pairs a training step sees.

K sources, B pairs in a step.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ..options import COUNT, Range, option, require
from .labels import LabelOptions
from .pairs import TRUNCATE, TextRules

PAIRS_PER_SOURCE = Range(least=1, most=10**7)  # their order is made at once
MOST_OF_SHARES = 10**6  # pairs of a step of which shares are made
SHARE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?|\.[0-9]{1,6}")


def number_or_text(text: str) -> int | str:
    """A whole number, which may be written 40_000, or a text that is none as it is."""
    try:
        return int(text)
    except ValueError:
        return text


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
    shares: str | None = option(
        None,
        value="NAME=X,NAME=X,...",
        help="instead of equal shares, these shares of every source in every step, relative to "
        "their sum",
    )
    pairs_per_source: int | str | None = option(
        None,
        value="N|NAME=N,...",
        parse=number_or_text,
        help="resample every source to this many pairs an epoch (default under equal sampling: "
        "all pairs / sources); under proportional sampling also of single sources, by name",
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


# ---- how sources are mixed -----------------------------------------------------------------------


class Mix(NamedTuple):
    """How the pairs of K sources come together in steps.

    sampling: "equal", "proportional" or "shares". batch_size: pairs of a step. per_source: pairs an
    epoch, of every source as many or of each its own number; None for as many as there are.
    per_step: under "shares", the pairs of each source in a step.
    """

    sampling: str
    batch_size: int
    per_source: int | tuple[int | None, ...] | None = None
    per_step: tuple[int, ...] | None = None


def mix_of(options: DataOptions, names: Sequence[str]) -> Mix:
    """How sources of these names are mixed. Raises InputError for what cannot be."""
    require(
        options.shares is None or options.sampling == "equal",
        "--shares: says what every step holds, and --sampling proportional leaves it to chance;"
        " leave one of them out",
    )
    per_source = pairs_of_sources(options, names)
    if options.shares is None:
        return Mix(options.sampling, batch_size_of(options, len(names)), per_source)
    per_step = pairs_of_step(options, names)
    return Mix("shares", sum(per_step), per_source, per_step)


def batch_size_of(options: DataOptions, sources: int) -> int:
    """Pairs in a step; raises InputError where equal shares are not possible."""
    size = 16 * sources if options.batch_size is None else options.batch_size
    require(
        options.sampling != "equal" or size % sources == 0,
        f"--batch-size {size}: under equal sampling a step holds the same number of pairs of each "
        f"of the {sources} sources; expected a multiple of {sources}",
    )
    return size


def pairs_of_step(options: DataOptions, names: Sequence[str]) -> tuple[int, ...]:
    """Pairs of each source in a step under --shares: those must be whole numbers.

    Without --batch-size there are at least 16 x sources pairs in a step.
    """
    shares = by_name("--shares", str(options.shares), names)
    for name in names:
        require(name in shares, f"--shares {options.shares}: expected a share of source {name!r}")
    for name, share in shares.items():
        is_share = SHARE.fullmatch(share) and float(share) > 0
        require(is_share, f"--shares {name}={share}: expected a number above 0, such as 2 or 0.25")
    exact = [Fraction(shares[name]) / sum(map(Fraction, shares.values())) for name in names]
    smallest = math.lcm(*(share.denominator for share in exact))
    size = options.batch_size or smallest * math.ceil(16 * len(names) / smallest)
    require(
        size % smallest == 0,
        f"--batch-size {size}: with --shares {options.shares} a step holds whole pairs of every"
        f" source; expected a multiple of {smallest}",
    )
    require(
        size <= MOST_OF_SHARES,
        f"--shares {options.shares}: make a step of {size} pairs; expected rounder shares, or at"
        f" most {MOST_OF_SHARES} pairs",
    )
    return tuple(int(share * size) for share in exact)


def pairs_of_sources(
    options: DataOptions, names: Sequence[str]
) -> int | tuple[int | None, ...] | None:
    """Pairs of the sources an epoch, as --pairs-per-source says it, for all or by name."""
    value = options.pairs_per_source
    if value is None:
        return None
    if isinstance(value, int):
        _require_pairs(f"--pairs-per-source {value}", value)
        return value
    numbers = by_name("--pairs-per-source", value, names)
    require(
        options.sampling == "proportional",
        f"--pairs-per-source {value}: under equal sampling all sources have as many pairs an epoch;"
        " mix them by --shares, or give --sampling proportional",
    )
    for name, number in numbers.items():
        _require_pairs(f"--pairs-per-source {name}={number}", number_or_text(number))
    return tuple(int(numbers[name]) if name in numbers else None for name in names)


def _require_pairs(what: str, pairs: int | str) -> None:
    is_count = isinstance(pairs, int) and pairs in PAIRS_PER_SOURCE
    require(is_count, f"{what}: expected {PAIRS_PER_SOURCE}")


def by_name(flag: str, text: str, names: Sequence[str]) -> dict[str, str]:
    """The values of an option NAME=VALUE,NAME=VALUE, by name. Raises InputError.

    names: of the sources, of which each may have one value, and nothing else may.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        require(equals, f"{flag} {text}: expected NAME=VALUE,NAME=VALUE,...")
        require(
            name in names,
            f"{flag} {part}: no source that is trained on is called {name!r}; there are"
            f" {', '.join(names)}",
        )
        require(name not in values, f"{flag} {text}: names {name!r} twice")
        values[name] = value
    return values


# ---- the steps of an epoch -----------------------------------------------------------------------


def epoch_steps(
    sizes: Sequence[int],
    sampling: str,
    per_source: int | tuple[int | None, ...] | None,
    batch_size: int,
    seed: int,
    epoch: int,
    per_step: tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """The pairs of every step of one epoch: a list of (B, 2), a source and a pair in it.

    `equal` takes per_source pairs of every source, by default all pooled pairs / K. A smaller
    source is repeated, a larger one is sampled. A step has B / K of each source, one of each in
    turn.
    `proportional` is a random mix of everything; with per_source sources are resampled first.
    `shares` takes per_step pairs of each source in every step, in as many steps as `equal` would
    take.

    A pure function of its arguments, so a resumed run continues in place.
    """
    K = len(sizes)
    counts = pairs_of_epoch(sizes, sampling, per_source)
    if per_step is not None:
        steps = -(-sum(counts) // batch_size)
        counts = [steps * pairs for pairs in per_step]
    orders = [
        _resampled(k, size, count, np.random.default_rng([seed, epoch, k]))
        for k, (size, count) in enumerate(zip(sizes, counts))
    ]
    if per_step is not None:
        parts = [np.split(order, steps) for order in orders]
        return [np.concatenate(parts_of_step) for parts_of_step in zip(*parts)]
    if sampling == "equal":
        pool = np.stack(orders, 1).reshape(-1, 2)  # one of each source in turn
    else:
        mix = np.random.default_rng([seed, epoch, K]).permutation(sum(counts))
        pool = np.concatenate(orders)[mix]
    return [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]


def pairs_of_epoch(
    sizes: Sequence[int], sampling: str, per_source: int | tuple[int | None, ...] | None
) -> list[int]:
    """Pairs of each source that an epoch draws, before shares change them.

    >>> pairs_of_epoch([30, 10], "equal", None), pairs_of_epoch([30, 10], "proportional", None)
    ([20, 20], [30, 10])
    >>> pairs_of_epoch([30, 10], "proportional", (None, 15))
    [30, 15]
    """
    if isinstance(per_source, tuple):
        return [size if own is None else own for size, own in zip(sizes, per_source)]
    if sampling == "proportional" and per_source is None:
        return list(sizes)
    return [per_source or max(1, sum(sizes) // len(sizes))] * len(sizes)


def _resampled(k: int, size: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` pairs of source k, which has `size`: permutations, the last one cut. (count, 2)"""
    rounds = [random.permutation(size) for _ in range(-(-count // size))]
    return np.stack([np.full(count, k), np.concatenate(rounds)[:count]], 1)
