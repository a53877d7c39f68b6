"""`minimore demo`: the whole path on a world where the right answers are known."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from .. import plots
from ..calibration import pair_ece
from ..data.pairs import load_source
from ..data.records import Pair, read_records, record_pairs
from ..data.world import World
from ..files import refuse_existing, write_json
from ..options import option
from ..report import evaluate_sources
from ..reward import ModelOptions, device_of, open_reward_model
from ..train import TrainOptions, train

METHODS = ("uniform", "more")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `demo` takes."""

    output: str | None = option(
        None, value="DIR", help="directory to make (default: demo, demo-2, ... whichever is free)"
    )
    seed: int = option(0, help="seeds the world, the model and the order of the data")
    pairs: int = option(3200, help="training pairs of each annotator")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")


def demo(options: DemoOptions) -> int:
    """Write a world, train one model with uniform weights and one with MORE, compare both with what is possible."""
    device_of(options)
    output = (
        options.output
        if options.output is not None
        else next(
            n for n in ("demo" if i == 1 else f"demo-{i}" for i in count(1)) if not Path(n).exists()
        )
    )
    refuse_existing(output, make_parents=True)
    out, world = Path(output), World(train_pairs=(options.pairs,), ties=0.05, seed=options.seed)
    paths = world.write(out / "world")
    print(
        f"A world of {len(paths)} annotators who share most of their taste and drift apart in the rest, written to {out}/world"
    )
    reports, weights = {}, {}
    for method in METHODS:
        print(f"\n== {method}", flush=True)
        code = train(
            TrainOptions(
                model=str(out / "world" / "model"),
                source=tuple(f"{n}={train_path}" for n, (train_path, _) in paths.items()),
                output=str(out / method),
                method=method,
                learning_rate=2e-3,
                max_length=64,
                seed=options.seed,
                device=options.device,
                log_steps=30,
                compute_dtype="float32",
            )
        )
        if code:
            return code
        reports[method], weights[method] = _report(out / method, paths, options)
    _print(world, paths, reports, weights["more"])
    write_json(out / "report.json", reports)
    if plots.available():
        print(
            f"\nFigures: {plots.draw_weights(weights['more'], out / 'figures')} and {out}/figures/METHOD/margins.png"
        )
    else:
        print("\nFigures: none, matplotlib is not installed (pip install 'minimore[plots]')")
    print(f"All numbers: {out}/report.json and {out}/METHOD/metrics.jsonl")
    return 0


def _report(run, paths, options):
    """Evaluate a finished run on the held-out files; its report and its weights over the steps."""
    model, checkpoint = open_reward_model(
        ModelOptions(model=str(run), device=options.device, compute_dtype="float32")
    )
    tests = [
        load_source(name, str(test), checkpoint.tokenizer, 64) for name, (_, test) in paths.items()
    ]
    report, margins = evaluate_sources(model, tests)
    if plots.available():
        plots.draw_margins(margins, run.parent / "figures" / run.name)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return report, {name: [s["sources"][name]["weight"] for s in steps] for name in paths}


def true_pairs(path: Path) -> list[Pair]:
    """The pairs of a file as texts, label ties left out."""
    return [
        pair for where, record in read_records(str(path)) for pair in record_pairs(record, where)[0]
    ]


def _print(world, paths, reports, weights):
    print("""
Held-out prompts. best: that annotator's own rule, with the ECE that its exact probabilities show on so few pairs;
single: the best rule shared by all. Both accuracies are expected ones.""")
    print("annotator    best    ECE  single | uniform: accuracy    ECE | more: accuracy    ECE")
    rows = []
    for k, (name, (_, test)) in enumerate(paths.items()):
        pairs = true_pairs(test)
        best, single = (ceiling[k] for ceiling in world.ceilings(pairs))
        floor = pair_ece(
            world.decisiveness[k % len(world.decisiveness)] * world.true_margins(pairs)[:, k]
        )
        found = [
            reports[method]["sources"][name][rate]
            for method in METHODS
            for rate in ("accuracy", "ece")
        ]
        rows.append([best, floor, single, *found])
        _row(name, rows[-1])
    _row("mean", np.mean(rows, 0))
    print("\nMORE's weights, mean over each fifth of the run:")
    for name, values in weights.items():
        print(f"{name:10} " + "  ".join(f"{part.mean():.3f}" for part in np.array_split(values, 5)))


def _row(name, values):
    best, floor, single, *found = values
    print(
        f"{name:10}  {best:.3f}  {floor:.3f}   {single:.3f} |          {found[0]:.3f}   {found[1]:.3f} |       {found[2]:.3f}   {found[3]:.3f}"
    )
