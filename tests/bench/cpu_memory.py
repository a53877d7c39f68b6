"""What two training steps of a 300M-parameter GPT-NeoX take of a CPU's memory, against the plan. Linux only.

    python tests/bench/cpu_memory.py --engine streamed --parameters bfloat16 --moments int8 --recompute full

Prints one JSON object: bytes of the process's anonymous memory at its peak, less what it had before the model was made.
"""

import argparse
import json
import threading
import time
from functools import partial

import numpy as np
import torch

from minimore.data.pairs import TokenPair
from minimore.engine.cost import (
    PairShape,
    Workload,
    memory_of,
    parameter_bytes,
    parameter_shapes,
    state_bytes,
)
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW, replace_parameter
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.model.trunk import ModelConfig, Trunk
from minimore.more import more_weights
from minimore.reward import RewardModel, fresh_head


def anonymous():
    """Bytes that the process holds and that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


class Peak(threading.Thread):
    """The largest `anonymous` while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.over = 0, threading.Event()
        self.start()

    def run(self):
        while not self.over.is_set():
            self.highest = max(self.highest, anonymous())
            time.sleep(0.002)

    def stop(self):
        self.over.set()
        self.join()
        return self.highest


def random_model(c, optimizer):
    """Random weights, each adopted as soon as it is made, as in loading a checkpoint."""
    with torch.device("meta"):
        model = RewardModel(Trunk(c), torch.empty(c.width))
    generator = torch.Generator().manual_seed(0)
    for name, p in list(model.named_parameters()):
        value = torch.empty(p.shape)
        value.normal_(0, 0.02, generator=generator) if p.ndim > 1 else value.fill_(
            float(name.endswith("norm.weight"))
        )
        value = fresh_head(c.width, 0) if name == "head" else value
        replace_parameter(model, name, optimizer.adopt(name, value))
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("engine", "parameters", "moments", "recompute"):
        parser.add_argument(f"--{name}", default=getattr(Recipe, name))
    for name, default in (
        ("micro-tokens", 8192),
        ("width", 1024),
        ("blocks", 24),
        ("vocabulary", 512),
        ("pairs", 5),
        ("length", 16),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    recipe = Recipe(
        given.engine,
        given.parameters,
        given.moments,
        given.recompute,
        micro_tokens=given.micro_tokens,
    )
    c = ModelConfig(
        vocabulary=given.vocabulary,
        width=given.width,
        blocks=given.blocks,
        heads=given.width // 64,
        kv_heads=given.width // 64,
        head_width=64,
        mlp_width=4 * given.width,
        activation="gelu",
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        parallel_residual=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary_width=16,
        rope_base=1e4,
    )
    torch.set_num_threads(1)
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # the libraries' own memory

    before, peak = anonymous(), Peak()
    optimizer = AdamW(recipe.parameters, recipe.moments)
    model = random_model(c, optimizer)
    engine, optimizer.learning_rate = open_engine(model, optimizer, recipe), 1e-6
    random, pairs = np.random.default_rng(0), []
    for _ in range(given.pairs):
        prompt, a, b = (
            random.integers(2, given.vocabulary, given.length).astype(np.int32) for _ in range(3)
        )
        pairs.append(
            TokenPair(np.concatenate([prompt, a]), np.concatenate([prompt, b]), given.length, 0)
        )
    began = time.perf_counter()
    for _ in range(2):
        engine.step(
            pairs,
            [i % 5 for i in range(given.pairs)],
            RewardObjective(5, partial(more_weights, state={})),
        )
    seconds = (time.perf_counter() - began) / 2
    highest = peak.stop() - before

    work, s = (
        Workload(
            (PairShape(given.length, given.length, given.length),) * given.pairs,
            1,
            3 * given.length * given.pairs,
        ),
        parameter_shapes(c),
    )
    memory = memory_of(c, work, recipe, 4, False)
    print(
        json.dumps(
            {
                "recipe": str(recipe),
                "parameters": sum(p.numel() for p in model.parameters()),
                "peak": highest,
                "planned_peak": memory.peak,
                "phase": memory.phase,
                "states": optimizer.bytes(model),
                "planned_states": sum(
                    parameter_bytes(part, recipe) + state_bytes(part, recipe) for part in s.parts
                ),
                "seconds_a_step": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
