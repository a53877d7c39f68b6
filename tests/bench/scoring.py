"""Rewards of pairs, and of many responses to a prompt, against transformers' padded batches.

    python tests/bench/scoring.py --pairs helpful.test.jsonl.gz --tokenizer tokenizer.json \
        [--clock cpu --threads 1]

The same random GPT-NeoX of width 256 with 6 blocks, in fp32. Both sides sort their texts by length:
transformers scores 16 at a time, padded to the longest of them, ours packs 8,192 tokens. Then 16
responses of 100 tokens each to one prompt of 400. Rounds take turns, and the rewards are compared.
Tokenising is not measured, nor is reading the file.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from against_trl import CLOCKS, write_model

from minimore.data.pairs import load_source
from minimore.model.checkpoint import Checkpoint
from minimore.reward import ModelOptions, group_rewards, open_reward_model, pair_rewards
from minimore.tables import Table

BATCH = 16


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", required=True, help="a file of pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    return parser.parse_args()


@torch.no_grad()
def their_rewards(model, texts):
    """Rewards of texts (ids) by transformers, sorted by length and padded on the right."""
    rewards = torch.empty(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), BATCH):
        places = order[first : first + BATCH]
        width = max(len(texts[i]) for i in places)
        ids = torch.zeros(len(places), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(places):
            ids[row, : len(texts[i])] = torch.as_tensor(texts[i])
            mask[row, : len(texts[i])] = 1
        rewards[places] = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return rewards


def random_responses(pairs):
    """One prompt of 400 tokens with 16 responses of 100: whole texts."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.tensor(sorted({int(i) for pair in pairs for i in pair.chosen} - {0}))

    def draw(n):
        return vocabulary[torch.randint(len(vocabulary), (n,), generator=generator)].tolist()

    prompt = draw(400)
    return [np.array(prompt + draw(100)) for _ in range(16)]


def compared(theirs, ours, options):
    """Seconds of both sides in each round."""
    clock, seconds = CLOCKS[options.clock], ([], [])
    torch.testing.assert_close(theirs(), ours(), atol=1e-3, rtol=1e-3)  # warms up, too
    for turn in range(options.rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            began = clock()
            (theirs, ours)[side]()
            seconds[side].append(clock() - began)
    return seconds


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    import transformers

    with tempfile.TemporaryDirectory() as name:
        write_model(name, options)
        tokenizer = Checkpoint(name).tokenizer
        pairs = load_source("pairs", options.pairs, tokenizer, 512).pairs[: options.count]
        ours, _ = open_reward_model(ModelOptions(model=name))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    texts = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    group = random_responses(pairs)
    tasks = {
        f"{len(pairs)} pairs": (
            lambda: their_rewards(theirs, texts),
            lambda: pair_rewards(ours, pairs).flatten(),
        ),
        "16 responses to a prompt": (
            lambda: their_rewards(theirs, group),
            lambda: torch.cat(group_rewards(ours, [group], 8192)),
        ),
    }
    table = Table("task", "transformers s", "minimore s", "ratio", "least", "most")
    for name, sides in tasks.items():
        their_seconds, our_seconds = compared(*sides, options)
        ratios = [a / b for a, b in zip(their_seconds, our_seconds)]
        medians = [statistics.median(s) for s in (their_seconds, our_seconds, ratios)]
        table.add(name, *(f"{m:.2f}" for m in (*medians, min(ratios), max(ratios))))
    print(f"{options.clock} seconds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table)


if __name__ == "__main__":
    main()
