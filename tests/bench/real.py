"""The main job on real preference data: uniform and MORE, through the command line.

    python tests/bench/real.py --data DIR --tokenizer FILE --output DIR

DIR holds NAME.train.jsonl.gz and NAME.test.jsonl.gz (or .jsonl) for the five sources below. FILE
is a tokenizer.json. The model is a small random GPT-NeoX (seeded), so the figures show that the
path works, not what the paper's models reach.
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
METHODS = ("uniform", "more")


def find(directory, name, split):
    """The file of a source, packed or not."""
    for end in (".jsonl.gz", ".jsonl"):
        path = directory / f"{name}.{split}{end}"
        if path.is_file():
            return path
    sources = ", ".join(SOURCES)
    sys.exit(f"{directory}: no {name}.{split}.jsonl.gz; expected train and test files of {sources}")


def source_options(directory, split):
    """--source NAME=FILE of every source."""
    options = []
    for name in SOURCES:
        options += ["--source", f"{name}={find(directory, name, split)}"]
    return options


def minimore(*arguments):
    subprocess.run([sys.executable, "-m", "minimore", *map(str, arguments)], check=True)


def parse_options():
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
    return parser.parse_args()


def write_model(options):
    """A random model with the tokenizer, and room for a pad token."""
    vocabulary = Tokenizer.from_file(str(options.tokenizer)).get_vocab(with_added_tokens=True)
    rows = max(vocabulary.values()) + 2
    config = small_gpt_neox(
        options.width,
        options.blocks,
        heads=max(1, options.width // 32),
        vocabulary=-(-rows // 64) * 64,
    )
    random_checkpoint(options.output / "model", config, options.tokenizer, options.seed)


def train(options, method, sources):
    minimore(
        "train",
        *sources,
        *("--model", options.output / "model"),
        *("--method", method),
        *("--output", options.output / method),
        *("--seed", options.seed),
        *("--max-length", options.max_length),
        *("--learning-rate", options.learning_rate),
        *("--pairs-per-source", options.pairs_per_source),
        *("--log-steps", 10),
        *("--save-steps", 50),
    )


def evaluate(options, method, sources):
    """The mean row of the report."""
    report = options.output / f"{method}.json"
    minimore("evaluate", "--model", options.output / method, *sources, "--json", report)
    return json.loads(report.read_text())["mean"]


def main():
    options = parse_options()
    if options.output.exists():
        sys.exit(f"{options.output}: exists already; choose another name")
    sources = source_options(options.data, "train")
    tests = source_options(options.data, "test")
    options.output.mkdir(parents=True)
    write_model(options)
    for method in METHODS:
        began = time.monotonic()
        train(options, method, sources)
        print(f"{method}: {time.monotonic() - began:.0f} s of training", flush=True)
    print("\nmean over sources:")
    for method in METHODS:
        mean = evaluate(options, method, tests)
        print(f"{method} accuracy {mean['accuracy']:.4f}, ECE {mean['ece']:.4f}", flush=True)


if __name__ == "__main__":
    main()
