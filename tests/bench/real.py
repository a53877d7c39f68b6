"""The main job on real preference data: uniform and MORE, from a random checkpoint, through the command line.

    python tests/bench/real.py --data DIR --tokenizer FILE --output DIR

DIR holds NAME.train.jsonl.gz and NAME.test.jsonl.gz (or .jsonl) for the five sources below; FILE is a tokenizer.json.
The model is a small random GPT-NeoX (seeded), so the figures show that the path works, not what the paper's models reach.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from minimore.data.world import small_gpt_neox
from minimore.model.checkpoint import random_checkpoint

SOURCES = ("hh_helpful", "hh_harmless", "oasst1", "webgpt", "summeval")


def find(directory, name, split):
    for end in (".jsonl.gz", ".jsonl"):
        if (path := directory / f"{name}.{split}{end}").is_file():
            return path
    sys.exit(
        f"{directory}: no {name}.{split}.jsonl.gz; expected train and test files of {', '.join(SOURCES)}"
    )


def minimore(*arguments):
    subprocess.run([sys.executable, "-m", "minimore", *map(str, arguments)], check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pairs-per-source", type=int, default=1600)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=512)
    given = parser.parse_args()
    if given.output.exists():
        sys.exit(f"{given.output}: exists already; choose another name")
    train = [f"{n}={find(given.data, n, 'train')}" for n in SOURCES]
    test = [f"{n}={find(given.data, n, 'test')}" for n in SOURCES]

    rows = 1 + max(
        Tokenizer.from_file(str(given.tokenizer)).get_vocab(with_added_tokens=True).values()
    )
    config = small_gpt_neox(
        given.width,
        given.blocks,
        heads=max(1, given.width // 32),
        vocabulary=-(-(rows + 1) // 64) * 64,
    )
    given.output.mkdir(parents=True)
    random_checkpoint(given.output / "model", config, given.tokenizer, given.seed)

    for method in ("uniform", "more"):
        began, run = time.time(), given.output / method
        minimore(
            "train",
            "--model",
            given.output / "model",
            *(a for s in train for a in ("--source", s)),
            "--method",
            method,
            "--output",
            run,
            "--seed",
            given.seed,
            "--max-length",
            given.max_length,
            "--learning-rate",
            given.learning_rate,
            "--pairs-per-source",
            given.pairs_per_source,
            "--log-steps",
            10,
            "--save-steps",
            50,
        )
        print(f"{method}: {time.time() - began:.0f} s of training", flush=True)
    for method in ("uniform", "more"):
        print(f"\n== {method}", flush=True)
        minimore(
            "evaluate",
            "--model",
            given.output / method,
            *(a for s in test for a in ("--source", s)),
            "--json",
            given.output / f"{method}.json",
        )
    means = {
        m: json.loads((given.output / f"{m}.json").read_text())["mean"] for m in ("uniform", "more")
    }
    print(
        "\nmean over sources: "
        + "; ".join(
            f"{m} accuracy {r['accuracy']:.4f}, ECE {r['ece']:.4f}" for m, r in means.items()
        )
    )


if __name__ == "__main__":
    main()
