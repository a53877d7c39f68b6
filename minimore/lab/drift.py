"""What a model's rewards consist of while it learns them: the shared reward, drift, neither.

Only in the world, where both are known; see `World.decompose`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.forms import Pair, record_pairs
from ..data.pairs import Source, load_source
from ..data.records import read_records
from ..data.world import World
from ..model.checkpoint import Checkpoint
from ..report import source_margins
from ..reward import RewardModel
from .grid import Cell

WATCHED_PAIRS = 300  # of every annotator
WATCHED_TIMES = 8  # in a run
MAX_LENGTH = 512
MICRO_TOKENS = 8192


class DriftWatch:
    """Takes a model's margins apart at eighths of a run; `train` calls it after every step.

    points: of every time that it looked, {"step", "of", "mean"}. `of` is the number of steps.
    `mean` averages five figures over the annotators: slope of r*, slope of the own drift, and the
    shares of r*, of drift, and of neither.
    """

    def __init__(self, cell: Cell):
        assert cell.world is not None, "drift is known in the world only"
        self.cell, self.world = cell, cell.world
        self.points: list[dict[str, Any]] = []
        self._sources: list[tuple[Source, list[Pair]]] = []  # of each annotator

    def __call__(self, step: int, steps: int, model: RewardModel) -> None:
        """Look at the model, if this step ends an eighth of the run."""
        if step % max(1, steps // WATCHED_TIMES):
            return
        if not self._sources:
            self._sources = watched_sources(self.cell)
        figures = [
            own_figures(self.world, k, model, source, pairs)
            for k, (source, pairs) in enumerate(self._sources)
        ]
        means = [None if math.isnan(mean) else mean for mean in np.mean(figures, 0)]
        self.points.append({"step": step, "of": steps, "mean": means})


def watched_sources(cell: Cell) -> list[tuple[Source, list[Pair]]]:
    """The first test pairs of every annotator, as tokens and as texts."""
    tokenizer = Checkpoint(str(cell.model)).tokenizer
    watched = []
    for name, path in cell.tests.items():
        pairs = true_pairs(path)[:WATCHED_PAIRS]
        source = load_source(name, path, tokenizer, MAX_LENGTH)
        watched.append((replace(source, pairs=source.pairs[: len(pairs)]), pairs))
    return watched


def true_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file as texts, label ties left out."""
    return [
        pair for where, record in read_records(str(path)) for pair in record_pairs(record, where)[0]
    ]


def own_figures(
    world: World, k: int, model: RewardModel, source: Source, pairs: list[Pair]
) -> list[float]:
    """What the margins on the pairs of annotator k consist of: see `DriftWatch.points`."""
    margins = source_margins(model, source, MICRO_TOKENS)
    parts = world.decompose(margins, pairs[: len(source.pairs)])
    own_drift = float(parts.drift[k])
    return [parts.shared, own_drift, parts.shared_share, parts.drift_share, parts.other_share]
