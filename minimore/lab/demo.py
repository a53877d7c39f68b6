"""`minimore demo`: the whole path in a world where the right answers are known."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import pair_ece
from ..data.pairs import load_source
from ..data.world import Paths, World
from ..figures import plots
from ..files import refuse_existing, write_json
from ..options import Range, check_ranges, option
from ..report import evaluate_sources
from ..reward import ModelOptions, device_of, open_reward_model
from ..reward_training import TrainOptions
from ..tables import Table
from ..train import train
from .drift import true_pairs

METHODS = ("uniform", "more")
MAX_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `demo` takes."""

    output: str | None = option(
        None, value="DIR", help="directory to make (default: demo, demo-2, ... whichever is free)"
    )
    seed: int = option(0, help="seeds the world, the model and the order of the data")
    pairs: int = option(3200, within=Range(least=10), help="training pairs of each annotator")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")


def demo(options: DemoOptions) -> int:
    """Write a world, train one model with uniform weights and one with MORE.

    Compare both with what is possible. Returns the exit code.
    """
    check_ranges(options)
    device_of(options)
    name = options.output if options.output is not None else free_name()
    refuse_existing(name)
    output = Path(name)
    world = World(train_pairs=(options.pairs,), ties=0.05, seed=options.seed)
    paths = world.write(output / "world")
    print(
        f"A world of {len(paths)} annotators who share most of their taste and drift apart in the"
        f" rest, written to {output}/world"
    )
    reports = {}
    for method in METHODS:
        print(f"\n== {method}", flush=True)
        exit_code = train(training(method, output, paths, options))
        if exit_code:
            return exit_code
        reports[method] = report_of_run(output / method, paths, options)
    weights = weights_by_step(output / "more", paths)
    print()
    print("Held-out prompts. best: that annotator's own rule, with the ECE that its exact")
    print("probabilities show on so few pairs; single: the best rule shared by all. Both")
    print("accuracies are expected ones.")
    print(comparison(world, paths, reports))
    print("\nMORE's weights, mean over each fifth of the run:")
    print(weights_table(weights))
    write_json(output / "report.json", reports)
    if plots.available():
        figure = plots.draw_weights(weights, output / "figures")
        print(f"\nFigures: {figure} and {output}/figures/METHOD/margins.png")
    else:
        print("\nFigures: none, matplotlib is not installed (pip install 'minimore[plots]')")
    print(f"All numbers: {output}/report.json and {output}/METHOD/metrics.jsonl")
    return 0


def free_name() -> str:
    """The first of demo, demo-2, demo-3, ... that is not there."""
    names = ("demo" if i == 1 else f"demo-{i}" for i in count(1))
    return next(name for name in names if not Path(name).exists())


def training(method: str, output: Path, paths: Paths, options: DemoOptions) -> TrainOptions:
    """What the demo trains with."""
    return TrainOptions(
        model=str(output / "world" / "model"),
        source=tuple(f"{name}={train_path}" for name, (train_path, _) in paths.items()),
        output=str(output / method),
        method=method,
        learning_rate=2e-3,
        max_length=MAX_LENGTH,
        seed=options.seed,
        device=options.device,
        log_steps=30,
        compute_dtype="float32",
    )


def report_of_run(run: Path, paths: Paths, options: DemoOptions) -> dict[str, Any]:
    """The report of a finished run on the held-out files; draws its margins."""
    model, checkpoint = open_reward_model(
        ModelOptions(model=str(run), device=options.device, compute_dtype="float32")
    )
    tests = [
        load_source(name, str(test_path), checkpoint.tokenizer, MAX_LENGTH)
        for name, (_, test_path) in paths.items()
    ]
    report, margins = evaluate_sources(model, tests)
    if plots.available():
        plots.draw_margins(margins, run.parent / "figures" / run.name, method=run.name)
    return report


def weights_by_step(run: Path, paths: Paths) -> dict[str, list[float]]:
    """The weight of every source in every step of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    sources = [json.loads(line)["sources"] for line in lines]
    return {name: [step[name]["weight"] for step in sources] for name in paths}


def comparison(world: World, paths: Paths, reports: Mapping[str, dict[str, Any]]) -> Table:
    """Accuracy and ECE of every method and annotator, beside what is possible."""
    of_method = [("|", f"{method}: accuracy", "ECE") for method in METHODS]
    table = Table("annotator", "best", "ECE", "single", *chain(*of_method))
    rows = []  # of three figures from `possible`, then accuracy and ECE of every method
    for k, (name, (_, test_path)) in enumerate(paths.items()):
        reached = [reports[method]["sources"][name] for method in METHODS]
        row = possible(world, k, test_path)
        row += [figures[key] for figures in reached for key in ("accuracy", "ece")]
        rows.append(row)
        add_row(table, name, row)
    add_row(table, "mean", np.mean(rows, 0))
    return table


def possible(world: World, k: int, test_path: Path) -> list[float]:
    """What is possible for annotator k, on labels as noisy as these.

    [accuracy of the own rule, ECE of its exact probabilities, accuracy of the best shared rule]
    """
    pairs = true_pairs(test_path)
    own, shared = world.ceilings(pairs)
    beta = world.decisiveness[k % len(world.decisiveness)]
    exact_margins = beta * world.true_margins(pairs)[:, k]
    return [own[k], pair_ece(exact_margins), shared[k]]


def add_row(table: Table, name: str, row: Any) -> None:
    """Seven figures with three digits; lines stand between the methods."""
    cells = [f"{value:.3f}" for value in row]
    table.add(name, *cells[:3], "|", *cells[3:5], "|", *cells[5:])


def weights_table(weights: Mapping[str, list[float]]) -> Table:
    """The mean weight of every source in each fifth of a run."""
    table = Table("annotator", "1st", "2nd", "3rd", "4th", "5th")
    for name, values in weights.items():
        fifths = np.array_split(values, 5)  # of fewer than five steps, some are empty
        table.add(name, *(f"{part.mean():.3f}" if len(part) else None for part in fifths))
    return table
