"""Opening a checkpoint against transformers' `from_pretrained`: seconds and peak memory.

    python tests/bench/loading.py --tokenizer tokenizer.json [--width 2048 --blocks 24]

A random GPT-NeoX of Pythia's form (1.4B parameters by default) is written as safetensors in fp32
and opened as a reward model in fp32 by both, each time in a process of its own. The first process
of each side is not counted: it brings the file into the system's cache. The peak is that of the
process's anonymous memory less what its imports take; pages of the mapped file do not count on
either side. Linux only. What it does not measure: a disk, and a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu_memory import Peak, anonymous
from tokenizers import Tokenizer as TokenizerFile

from minimore.data.world import small_gpt_neox
from minimore.model.checkpoint import random_checkpoint
from minimore.reward import ModelOptions, open_reward_model
from minimore.tables import Table

SIDES = ("transformers", "minimore")


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="open --model by this one, once")
    parser.add_argument("--model")
    return parser.parse_args()


def open_once(side, model):
    """Seconds and peak of one opening, as JSON."""
    if side == "transformers":
        from transformers import AutoModelForSequenceClassification

        def load():
            return AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, dtype="float32"
            )
    else:

        def load():
            return open_reward_model(ModelOptions(model=model, device="cpu"))

    before, peak = anonymous(), Peak()
    peak.start()
    began = time.perf_counter()
    opened = load()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": peak.stop() - before, "is": str(type(opened))}))


def measured(side, model):
    """One opening in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, "--side", side, "--model", model]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def main():
    options = parse_options()
    if options.side:
        open_once(options.side, options.model)
        return
    rows = max(TokenizerFile.from_file(str(options.tokenizer)).get_vocab().values()) + 1
    config = small_gpt_neox(
        options.width, options.blocks, options.width // 128, -(-rows // 128) * 128
    )
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        random_checkpoint(model, config, options.tokenizer, seed=0)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        results = {side: [measured(side, str(model))] for side in SIDES}
        for turn in range(options.rounds):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                results[side].append(measured(side, str(model)))
    table = Table("side", "seconds", "least", "most", "peak, GB", "of the file")
    for side, (_, *opened) in results.items():
        seconds, peak = [r["seconds"] for r in opened], max(r["peak"] for r in opened)
        times = [f"{s:.2f}" for s in (statistics.median(seconds), min(seconds), max(seconds))]
        table.add(side, *times, f"{peak / 1e9:.2f}", f"{peak / size:.2f}")
    print(f"{size / 1e9:.2f} GB of fp32 weights, with a language-model head that is not read")
    print(table)


if __name__ == "__main__":
    main()
