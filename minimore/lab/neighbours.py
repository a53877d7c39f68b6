"""The neighbours' rewards in one table, in every regime of the world: `reproduce methods`.

Every seed is another world. All methods see the same pairs as counts of words (word_counts.py), and
are tested twice: with the source of every test pair known, and without.

S seeds, K sources.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration import accuracy, negative_log_likelihood, pair_ece
from ..data.world import World
from ..files import make_directory
from ..more import WEIGHTINGS
from ..options import check_ranges, require
from ..tables import Table
from ..uncertainty import noise_floor
from ..units import in_time
from .grid import REGIMES, ReproduceOptions, home_of
from .methods.by_name import METHODS, USES_SOURCE
from .methods.heads import Method
from .methods.states import of_no_source, of_own_source
from .probe import ProbeOptions, Weighting
from .scheme_tables import cell_text, difference_text
from .stored import stored_or_made, write_report
from .word_counts import CountedPairs, counted_pairs

BASE = "shared"  # the method from which differences are taken
RATES = ("accuracy", "ece", "floor", "nll")
FLOOR_REPLICATES = 20
EPOCHS, LEARNING_RATE = 5, 0.05  # of a weighting, which is trained in steps

Figures = dict[str, Any]  # of one method in one world: rates by reading, parameters, seconds
Worlds = dict[str, list[dict[str, Figures]]]  # regime -> of every seed, figures by method


def all_methods() -> dict[str, Method]:
    """Every method by name: the weightings of more.py, then those of methods/."""
    weightings = {}
    for name in sorted(WEIGHTINGS):
        sampling = "proportional" if name == "proportional" else "equal"
        options = ProbeOptions(
            features="", epochs=EPOCHS, learning_rate=LEARNING_RATE, sampling=sampling
        )
        weightings[name] = Weighting(name, options)
    return weightings | METHODS


def check_neighbours(options: ReproduceOptions) -> None:
    """Refuse options that this experiment has no use for, or decides itself (InputError)."""
    check_ranges(options)
    require(
        not options.model and not options.source,
        "methods: exists in the world only; on states of real models, `minimore probe --method`",
    )
    is_default = options.regime == "conflict" and options.protocol == "clean"
    require(
        is_default and not options.says_how_cells_train(),
        "methods: runs every method in every regime; expected no --scheme, --width, --regime,"
        " --protocol, --learning-rate or --batch-size",
    )


# ---- one world -----------------------------------------------------------------------------------


def figures_of_world(world: World, seed: int) -> dict[str, Figures]:
    """The figures of every method in one world, and those of the truth."""
    K = len(world.annotators)
    sizes = [int(np.resize(world.train_pairs, K)[k]) for k in range(K)]
    train, test = counted_pairs(world, sizes, 0), counted_pairs(world, [world.test_pairs] * K, 1)
    figures = {"truth": true_figures(test)}
    for name, method in all_methods().items():
        began = time.process_time()
        parameters = method.fit(train.states, seed)
        seconds = time.process_time() - began
        readings = {"unknown": method.margins(parameters, test.states, False)}
        if name in USES_SOURCE:
            readings["known"] = method.margins(parameters, test.states, True)
        figures[name] = {
            "parameters": sum(value.numel() for value in parameters.values()),
            "seconds": seconds,
            **{key: rates_of(margins, test) for key, margins in readings.items()},
        }
    return figures


def true_figures(test: CountedPairs) -> Figures:
    """What the exact probabilities reach: every annotator's own, and their mean."""
    log_odds = torch.from_numpy(test.log_odds)
    return {
        "unknown": rates_of(of_no_source(log_odds), test),
        "known": rates_of(of_own_source(log_odds, test.states.source), test),
    }


def rates_of(margins: Tensor, test: CountedPairs) -> dict[str, list[float]]:
    """Accuracy, ECE with its floor, and NLL of every source: {rate: (K,)}."""
    rates: dict[str, list[float]] = {rate: [] for rate in RATES}
    for k in range(test.states.sources):
        own = margins[test.states.source == k].double().numpy()
        rates["accuracy"].append(accuracy(own))
        rates["ece"].append(pair_ece(own))
        rates["floor"].append(noise_floor(own, replicates=FLOOR_REPLICATES).mean)
        rates["nll"].append(negative_log_likelihood(own))
    return rates


# ---- all worlds ----------------------------------------------------------------------------------


def world_file(output: Path, regime: str, seed: int) -> Path:
    """Where the figures of one world are stored."""
    return output / "worlds" / f"{regime}-{seed}.json"


def run_worlds(options: ReproduceOptions, output: Path) -> Worlds:
    """The figures of every regime and seed: read where they are stored, else made and stored."""
    make_directory(output / "worlds")
    worlds: Worlds = {regime: [] for regime in REGIMES}
    for number, seed in enumerate(options.seed_range(), 1):
        began = time.monotonic()
        pairs, test_pairs = options.training_pairs(), options.test_pair_count()
        for regime in REGIMES:
            world = home_of(options, regime, pairs, test_pairs, seed).world
            path = world_file(output, regime, seed)
            make = partial(figures_of_world, world, seed)
            worlds[regime].append(stored_or_made(path, make, key="methods"))
        print(f"[{number}/{options.seed_count()}] {in_time(time.monotonic() - began)}", flush=True)
    return worlds


# ---- the report ----------------------------------------------------------------------------------


def report_methods(options: ReproduceOptions, output: Path, worlds: Worlds) -> None:
    """Print every table, and write them and every figure."""
    parts = [
        f"{options.seed_count()} seeds, each another world; {options.training_pairs()} training and"
        f" {options.test_pair_count()} test pairs a source, as counts of words. ± is half a 95%"
        " interval over seeds (t); a difference is taken seed by seed, and ! says that its interval"
        " excludes 0 (of 20 that are none, one looks like one).",
        f"accuracy by regime\n{overview(worlds, 'accuracy')}",
        f"NLL by regime\n{overview(worlds, 'nll')}",
    ]
    for regime, figures in worlds.items():
        parts.append(f"regime {regime}\n{regime_table(figures)}")
    write_report(output, worlds, "\n\n".join(parts))


def rows_of(figures: list[dict[str, Figures]]) -> list[tuple[str, str, str]]:
    """Every row of a table: its label, the method, and the reading."""
    readings = {"unknown": "", "known": ", source known"}
    return [
        (name + label, name, reading)
        for reading, label in readings.items()
        for name, of_method in figures[0].items()
        if reading in of_method
    ]


def by_source(figures: list[dict[str, Figures]], name: str, reading: str, rate: str) -> np.ndarray:
    """A rate of every seed and source: (S, K)."""
    return np.array([of_world[name][reading][rate] for of_world in figures])


def overview(worlds: Worlds, rate: str) -> Table:
    """The mean over sources of one rate: a row a method, a column a regime."""
    table = Table(rate, *worlds)
    for label, name, reading in rows_of(next(iter(worlds.values()))):
        cells = [by_source(figures, name, reading, rate).mean(1) for figures in worlds.values()]
        table.add(label, *map(cell_text, cells))
    return table


def regime_table(figures: list[dict[str, Figures]]) -> Table:
    """Every rate of every method in one regime, and its differences from the shared head."""
    table = Table(
        *("method", "accuracy", "worst source", "ECE", "floor", "NLL"),
        *(f"| minus {BASE}: accuracy", "worst source", "NLL", "parameters", "CPU seconds"),
    )
    base = {rate: by_source(figures, BASE, "unknown", rate) for rate in RATES}
    for label, name, reading in rows_of(figures):
        rates = {rate: by_source(figures, name, reading, rate) for rate in RATES}
        accuracies, nll = rates["accuracy"], rates["nll"]
        differences: list[str | None] = [None, None, None]
        if label != BASE:
            differences = [
                difference_text(accuracies.mean(1) - base["accuracy"].mean(1)),
                difference_text(accuracies.min(1) - base["accuracy"].min(1)),
                difference_text(nll.mean(1) - base["nll"].mean(1)),
            ]
        table.add(
            label,
            cell_text(accuracies.mean(1)),
            cell_text(accuracies.min(1)),
            cell_text(rates["ece"].mean(1)),
            f"{rates['floor'].mean():.3f}",
            cell_text(nll.mean(1)),
            *differences,
            *costs(figures, name),
        )
    return table


def costs(figures: list[dict[str, Figures]], name: str) -> tuple[int | None, str | None]:
    """How many parameters a method has, and the CPU seconds that it took in the mean."""
    if "seconds" not in figures[0][name]:
        return None, None
    seconds = np.mean([of_world[name]["seconds"] for of_world in figures])
    return figures[0][name]["parameters"], f"{seconds:.2f}"
