"""The memory that training steps of a 300M-parameter GPT-NeoX take on a CPU, against the plan.

    python tests/bench/cpu_memory.py --engine streamed --parameters bfloat16 --moments int8 \
        --recompute full

Linux only. Prints one JSON object. The peak is that of the process's anonymous memory over two
steps, less what it had before the model was made.
"""

import argparse
import json
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from models import NEOX, random_model

from minimore.data.pairs import TokenPair
from minimore.engine.memory import memory_of
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.sizes import parameter_bytes, parameter_shapes, state_bytes
from minimore.engine.streamed import open_engine
from minimore.engine.workload import Workload, shape_of, tokens_of
from minimore.more import more_weights

SOURCES, STEPS = 5, 2


def anonymous():
    """Bytes that the process holds and that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


class Peak(threading.Thread):
    """The largest `anonymous` between `start` and `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.over = 0, threading.Event()

    def run(self):
        while not self.over.is_set():
            self.highest = max(self.highest, anonymous())
            time.sleep(0.002)

    def stop(self):
        self.over.set()
        self.join()
        return self.highest


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("engine", "parameters", "moments", "recompute"):
        parser.add_argument(f"--{name}", default=getattr(Recipe, name))
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--length", type=int, default=16)
    return parser.parse_args()


def config_of(options):
    return replace(
        NEOX,
        vocabulary=options.vocabulary,
        width=options.width,
        blocks=options.blocks,
        heads=options.width // 64,
        kv_heads=options.width // 64,
        head_width=64,
        mlp_width=4 * options.width,
        rotary_width=16,
    )


def random_pairs(options):
    """Pairs of a prompt and two responses, all of one length."""
    random, pairs = np.random.default_rng(0), []
    for _ in range(options.pairs):
        ids = random.integers(2, options.vocabulary, (3, options.length)).astype(np.int32)
        prompt, chosen, rejected = ids
        sides = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
        pairs.append(TokenPair(*sides, options.length, 0))
    return pairs


def load_libraries():
    """Take the memory that torch itself needs, so that it is not counted."""
    torch.set_num_threads(1)
    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).sum().backward()


def train(config, recipe, pairs):
    """Model, optimizer and seconds a step after a few steps."""
    optimizer = AdamW(recipe.parameters, recipe.moments)
    model = random_model(config, optimizer)
    optimizer.learning_rate = 1e-6
    engine = open_engine(model, optimizer, recipe)
    source = [i % SOURCES for i in range(len(pairs))]
    began = time.perf_counter()
    for _ in range(STEPS):
        objective = RewardObjective(SOURCES, partial(more_weights, state={}))
        engine.step(pairs, source, objective)
    return model, optimizer, (time.perf_counter() - began) / STEPS


def main():
    options = parse_options()
    recipe = Recipe(
        options.engine,
        options.parameters,
        options.moments,
        options.recompute,
        micro_tokens=options.micro_tokens,
    )
    config, pairs = config_of(options), random_pairs(options)
    load_libraries()
    before, peak = anonymous(), Peak()
    peak.start()
    model, optimizer, seconds = train(config, recipe, pairs)
    highest = peak.stop() - before

    shapes = tuple(shape_of(pair) for pair in pairs)
    planned = memory_of(config, Workload(shapes, 1, tokens_of(shapes)), recipe, 4, False)
    parts = parameter_shapes(config).parts
    planned_states = sum(parameter_bytes(p, recipe) + state_bytes(p, recipe) for p in parts)
    report = {
        "recipe": str(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak": highest,
        "planned_peak": planned.peak,
        "phase": planned.phase,
        "states": optimizer.bytes(model),
        "planned_states": planned_states,
        "seconds_a_step": seconds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
