"""Which pairs teach how much? Learning curves of a reward model: `minimore reproduce curves`.

Every seed is another world. Its pairs are counts of words (word_counts.py), which are the states of
a perfect trunk, and one Bradley-Terry head for all sources is solved on some of them:

    any             pairs of all annotators in equal parts: what the others are compared with
    1 source        pairs of the first annotator alone; 2 sources: of the first two
    close, far      the half of all pairs with the smaller, or the larger, true margin
    short, long     responses of half as many words, or of twice as many
    agreed          pairs on which all annotators want the same response
    contested       pairs on which at least two annotators want the other one than most do

All heads are tested on the same pairs of any kind, of every annotator.

K annotators, N pairs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import accuracy, negative_log_likelihood, pair_ece
from ..data.world import World
from ..figures import plots
from ..files import make_directory
from ..options import check_ranges, require
from ..tables import Table
from ..uncertainty import over_seeds
from ..units import in_time
from .grid import ReproduceOptions, home_of
from .methods.heads import SharedHead
from .methods.states import StatePairs
from .scheme_tables import cell_text, difference_text
from .stored import stored_or_made, write_report
from .word_counts import CountedPairs, counted_pairs

SHARES = (1 / 400, 1 / 100, 1 / 25, 4 / 25)  # of all training pairs: the amounts of a curve
LEAST_PAIRS = 80  # of a source, of which the smallest amount is one pair of each
RATES = ("accuracy", "nll", "ece")
TITLES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
BASE = "any"
NOT_DRAWN = ("short", "long")  # their curves lie on that of BASE

Selection = Callable[[CountedPairs], np.ndarray]  # which pairs of a pool are of a kind: (N,)
Figures = dict[str, dict[str, dict[str, float]]]  # kind -> amount, as JSON writes it -> rates


# ---- the kinds of pairs --------------------------------------------------------------------------


def any_pair(pool: CountedPairs) -> np.ndarray:
    """All pairs."""
    return np.ones(len(pool.log_odds), bool)


def of_first_sources(pool: CountedPairs, sources: int) -> np.ndarray:
    """Pairs of the first annotators; sources: how many these are."""
    return pool.states.source.numpy() < sources


def is_far(pool: CountedPairs) -> np.ndarray:
    """Pairs whose own annotator sees a larger difference than in the median pair."""
    own = np.abs(pool.log_odds[np.arange(len(pool.log_odds)), pool.states.source.numpy()])
    return own > np.median(own)


def is_close(pool: CountedPairs) -> np.ndarray:
    """Pairs that are not far."""
    return ~is_far(pool)


def in_favour(pool: CountedPairs) -> np.ndarray:
    """How many annotators want the response that most of them want: (N,)."""
    for_chosen = (pool.log_odds > 0).sum(1)
    return np.maximum(for_chosen, pool.log_odds.shape[1] - for_chosen)


def is_agreed(pool: CountedPairs) -> np.ndarray:
    """Pairs on which all annotators want the same response."""
    return in_favour(pool) == pool.log_odds.shape[1]


def is_contested(pool: CountedPairs) -> np.ndarray:
    """Pairs on which at least two annotators want the other response than most do."""
    return in_favour(pool) <= pool.log_odds.shape[1] - 2


# Of every kind: how long its responses are, as a multiple of the world's, and which pairs it has.
KINDS: dict[str, tuple[float, Selection]] = {
    BASE: (1, any_pair),
    "1 source": (1, partial(of_first_sources, sources=1)),
    "2 sources": (1, partial(of_first_sources, sources=2)),
    "close": (1, is_close),
    "far": (1, is_far),
    "short": (1 / 2, any_pair),
    "long": (2, any_pair),
    "agreed": (1, is_agreed),
    "contested": (1, is_contested),
}


def check_curves(options: ReproduceOptions) -> None:
    """Refuse options that this experiment has no use for, or decides itself (InputError)."""
    check_ranges(options)
    require(
        not options.model and not options.source,
        "curves: exists in the world only, where it is known which pairs are close or contested",
    )
    require(
        not options.says_how_cells_train() and options.protocol == "clean",
        "curves: solves one head on counts of words; expected no --scheme, --width, --protocol,"
        " --learning-rate or --batch-size",
    )
    require(
        options.training_pairs() >= LEAST_PAIRS,
        f"--pairs {options.training_pairs()}: curves begins with a 400th of all; expected at least"
        f" {LEAST_PAIRS}",
    )


# ---- one world -----------------------------------------------------------------------------------


def figures_of_world(world: World, pairs: int) -> Figures:
    """RATES on the test pairs, of heads that learned every kind and amount of pairs.

    pairs: how many each annotator has in the pool from which a kind is selected.
    """
    K = len(world.annotators)
    test = counted_pairs(world, [world.test_pairs] * K, 1).states
    pools: dict[float, CountedPairs] = {}
    figures: Figures = {}
    for kind, (length, selection) in KINDS.items():
        if length not in pools:
            words = round(length * world.response_words)
            pools[length] = counted_pairs(replace(world, response_words=words), [pairs] * K, 0)
        own = by_turns(pools[length].states, selection(pools[length]))
        amounts = [round(share * pairs * K) for share in SHARES]
        figures[kind] = {
            str(amount): rates_of(own.at(torch.arange(amount)), test)
            for amount in amounts
            if amount <= len(own.chosen)  # a curve ends where its kind does
        }
    return figures


def by_turns(states: StatePairs, is_of_kind: np.ndarray) -> StatePairs:
    """The pairs of a kind in turns: the first pair of every source, then the second, and so on.

    So the first N of them are of all sources in equal parts, as long as every source has some left.
    """
    places = np.flatnonzero(is_of_kind)
    source = states.source.numpy()[places]
    turn = np.zeros(len(places), dtype=int)  # of each pair: how many of its source stand before it
    for k in range(states.sources):
        turn[source == k] = np.arange((source == k).sum())
    return states.at(torch.from_numpy(places[np.lexsort((source, turn))]))


def rates_of(train: StatePairs, test: StatePairs) -> dict[str, float]:
    """RATES of a head that learned these pairs, in the mean over the sources of the test."""
    head = SharedHead()
    margins = head.margins(head.fit(train, 0), test, False).numpy()
    by_source = [margins[test.source.numpy() == k] for k in range(test.sources)]
    return {
        "accuracy": float(np.mean([accuracy(own) for own in by_source])),
        "nll": float(np.mean([negative_log_likelihood(own) for own in by_source])),
        "ece": float(np.mean([pair_ece(own) for own in by_source])),
    }


# ---- all worlds ----------------------------------------------------------------------------------


def run_curves(options: ReproduceOptions, output: Path) -> list[Figures]:
    """The figures of every seed: read where they are stored, else made and stored."""
    make_directory(output / "worlds")
    worlds, pairs = [], options.training_pairs()
    began = time.monotonic()
    for seed in options.seed_range():
        world = home_of(options, options.regime, pairs, options.test_pair_count(), seed).world
        path = output / "worlds" / f"{seed}.json"
        worlds.append(stored_or_made(path, partial(figures_of_world, world, pairs)))
    print(f"{len(worlds)} worlds: {in_time(time.monotonic() - began)}", flush=True)
    return worlds


def report_curves(options: ReproduceOptions, output: Path, worlds: list[Figures]) -> None:
    """Print a table for every rate, draw the accuracy, and write both and every figure."""
    parts = [
        f"{len(worlds)} seeds, each another world of regime {options.regime}; ± is half a 95%"
        f" interval over seeds (t). Every kind minus {BASE!r} with as many pairs, seed by seed; !"
        " says that the interval excludes 0 (of 20 that are none, one looks like one). Blank:"
        " there are not so many pairs of that kind"
    ]
    parts += [f"{TITLES[rate]} by training pairs\n{rate_table(worlds, rate)}" for rate in RATES]
    drawings = ""
    if plots.available():
        path = output / "figures" / "curves.png"
        plots.draw_curves(curves_of(worlds), "log2 of the training pairs", "accuracy", path)
        drawings = f", drawing to {path}"
    write_report(output, worlds, "\n\n".join(parts), drawings)


def values_at(worlds: Sequence[Figures], kind: str, amount: str, rate: str) -> np.ndarray | None:
    """A rate of every world (S,), or nothing if the kind has not so many pairs in one of them."""
    if not all(amount in world[kind] for world in worlds):
        return None
    return np.array([world[kind][amount][rate] for world in worlds])


def rate_table(worlds: Sequence[Figures], rate: str) -> Table:
    """A row a kind, a column an amount: of BASE the rate itself, of others the difference."""
    amounts = list(worlds[0][BASE])
    table = Table("kind", *amounts)
    for kind in KINDS:
        cells: list[str | None] = []
        for amount in amounts:
            own, base = (values_at(worlds, name, amount, rate) for name in (kind, BASE))
            if own is None or base is None:
                cells.append(None)
            else:
                cells.append(cell_text(own) if kind == BASE else difference_text(own - base))
        table.add(kind, *cells)
    return table


def curves_of(worlds: Sequence[Figures]) -> dict[str, list[tuple[Any, ...]]]:
    """The accuracy of kinds as points (log2 of the pairs, mean, half its interval)."""
    curves: dict[str, list[tuple[Any, ...]]] = {}
    for kind in (kind for kind in KINDS if kind not in NOT_DRAWN):
        for amount in worlds[0][kind]:
            values = values_at(worlds, kind, amount, "accuracy")
            if values is not None:
                point = (np.log2(int(amount)), *over_seeds(values))
                curves.setdefault(kind, []).append(point)
    return curves
