"""Whole models in the synthetic world: fp32 against random bf16 with 8-bit moments.

    python tests/bench/lossy.py [--seeds 5] [--steps 300]

Prints mean and standard deviation over seeds, of the head and of the order of the data, for
accuracy, NLL and ECE. About ten minutes on one core.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from minimore.data.world import World
from minimore.reward_training import TrainOptions
from minimore.tables import Table, number
from minimore.train import train

FIGURES = ("accuracy", "nll", "ece")
RECIPES = {
    "fp32": {},
    "random bf16, 8-bit moments": {
        "engine": "streamed",
        "parameters": "bfloat16",
        "moments": "int8",
        "recompute": "full",
    },
}
BATCH = 9


def figures_of(home, paths, recipe, seed):
    """The figures of one training's report, means over its sources."""
    run = home / f"run-{len(list(home.iterdir()))}"
    train(
        TrainOptions(
            model=str(home / "model"),
            output=str(run),
            source=tuple(f"{name}={train},{test}" for name, (train, test) in paths.items()),
            seed=seed,
            batch_size=BATCH,
            learning_rate=2e-3,
            log_steps=1000,
            save_steps=1000,
            **recipe,
        )
    )
    mean = json.loads((run / "evaluation.json").read_text())["mean"]
    return [mean[figure] for figure in FIGURES]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    table = Table("storage", *FIGURES)
    with tempfile.TemporaryDirectory() as folder:
        home, names = Path(folder), ("ana", "ben", "cleo")
        pairs = options.steps * BATCH // len(names)
        paths = World(annotators=names, train_pairs=(pairs,), test_pairs=200).write(home)
        for name, recipe in RECIPES.items():
            figures = np.array(
                [figures_of(home, paths, recipe, seed) for seed in range(options.seeds)]
            )
            means, deviations = figures.mean(0), figures.std(0, ddof=1)
            table.add(name, *(f"{number(m)} ({number(d)})" for m, d in zip(means, deviations)))
    print(table)


if __name__ == "__main__":
    main()
