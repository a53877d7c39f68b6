"""MORE's weights from the gradients of the head, and from those of all parameters.

    python tests/bench/whole.py [--seeds 3]

Trains small models in the synthetic world with either, and prints how far the weights of every
step lie apart, and what becomes of the models. About six minutes on two cores.
"""

import argparse
import json
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from minimore.data.world import World
from minimore.reward_training import TrainOptions
from minimore.tables import Table
from minimore.train import train

PAIRS = (2000, 1000, 500, 250, 250)


def trained(home, paths, normalize, gradients, seed):
    """The log of one training, and the means of its report."""
    run = home / f"{normalize}-{gradients}"
    options = TrainOptions(
        model=str(home / "model"),
        output=str(run),
        source=tuple(f"{name}={own},{test}" for name, (own, test) in paths.items()),
        normalize=normalize,
        lambda_gradients=gradients,
        learning_rate=3e-3,
        batch_size=80,
        seed=seed,
        engine="streamed",
        recompute="full",
    )
    with redirect_stdout(StringIO()):
        train(options)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return log, json.loads((run / "evaluation.json").read_text())["mean"]


def column(log, key):
    """A figure of every step and source: (steps, K)."""
    return np.array([[row[key] for row in record["sources"].values()] for record in log])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table = Table(
        *("normalize", "seed", "half the sum of differences", "correlation"),
        *("spread: all", "head", "all minus head: accuracy", "ECE", "NLL"),
    )
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            home = Path(directory)
            world = World(train_pairs=PAIRS, test_pairs=400, seed=seed)
            paths = world.write(home)
            for normalize in ("none", "l2"):
                log, mean = trained(home, paths, normalize, "all", seed)
                _, of_head = trained(home, paths, normalize, "head", seed)
                by_all, by_head = column(log, "weight"), column(log, "head_weight")
                table.add(
                    normalize,
                    seed,
                    f"{np.abs(by_all - by_head).sum(1).mean() / 2:.3f}",
                    f"{np.corrcoef(by_all.ravel(), by_head.ravel())[0, 1]:.3f}",
                    *(f"{weights.std(0).mean():.3f}" for weights in (by_all, by_head)),
                    *(f"{mean[key] - of_head[key]:+.3f}" for key in ("accuracy", "ece", "nll")),
                )
    print(table)


if __name__ == "__main__":
    main()
