"""Tutorial 16: where the memory goes.

Question      Training takes 16 bytes a parameter, they say, and activations. Which of these bytes
              must be there at the same time?
You will see  what a training step holds, counted; three ways to keep a block's activations; the
              streamed step watched block by block, with the bytes that are alive after each; that
              its gradient is the plain one's; and what all this makes of 6.9 billion parameters.
Takes         about 10 seconds on one CPU core; no GPU.
"""

# %% A small model and 20 pairs of five sources
import gc
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from minimore.data.pairs import TokenPair
from minimore.engine.cost import block_activations, in_bytes, memory_of, parameter_shapes
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW
from minimore.engine.plain import PlainEngine
from minimore.engine.plan import RECIPES
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import StreamedEngine, StreamedStep, parts_of
from minimore.engine.workload import PairShape, Workload
from minimore.model.model_config import ModelConfig
from minimore.model.trunk import Trunk
from minimore.more import more_weights
from minimore.reward import RewardModel, fresh_head

config = ModelConfig(
    vocabulary=500,
    width=256,
    blocks=6,
    heads=4,
    kv_heads=4,
    head_width=64,
    mlp_width=1024,
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


def make_model():
    """The same random model every time."""
    torch.manual_seed(0)
    trunk = Trunk(config)
    for name, p in trunk.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, p.shape[1] ** -0.5)
        else:
            torch.nn.init.constant_(p, float(name.endswith("norm.weight")))
    return RewardModel(trunk, fresh_head(256, 0))


random = np.random.default_rng(0)


def random_ids(count):
    """Token ids."""
    return random.integers(2, 500, count).astype(np.int32)


pairs = []
for _ in range(20):
    prompt, chosen, rejected = random_ids(20), random_ids(15), random_ids(15)
    sides = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
    pairs.append(TokenPair(*sides, shared=20, longer=0))
source = [i % 5 for i in range(20)]
objective = RewardObjective(5, partial(more_weights, state={}))
TOKENS = sum(pair.tokens for pair in pairs)  # 20 pairs of 50


def alive():
    """Bytes of all tensors that Python knows of; what only autograd holds is not among them.

    A storage that several tensors share counts once.
    """
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# %% What a step holds
# Parameters, their gradients, two moments of AdamW: four fp32 numbers for each parameter, 16 bytes.

model, optimizer = make_model(), AdamW()
P = sum(p.numel() for p in model.parameters())
optimizer.adopt_all(model)
print(f"{P:,} parameters, {in_bytes(4 * P)}")
print(f"with moments {in_bytes(optimizer.bytes(model))}, with gradients {in_bytes(16 * P)}")

# %% Three ways to keep a block's activations
# Backward needs what forward computed. Keep all of it; or keep matrix products and attention, and
# compute norms and activations again; or keep the block's input alone, and compute the whole block
# again. These are bytes of one block on our 1,000 tokens, in fp32.

shapes = tuple(
    PairShape(pair.shared, len(pair.chosen) - pair.shared, len(pair.rejected) - pair.shared)
    for pair in pairs
)
activations = []
for recompute in ("none", "selective", "full"):
    size = block_activations(config, shapes, 4, recompute, flash=False)
    activations.append(size)
    per_unit = size / TOKENS / config.width
    print(f"--recompute {recompute:10} {in_bytes(size):>9} a block,", end=" ")
    print(f"{per_unit:.1f} bytes a token and unit of width")

# %% The plain step
# Forward through everything, backward through everything. Only then does the optimizer know all
# gradients and take its step. We put an optimizer in its place that looks and does not step.


class KeepsGradients(AdamW):
    """Keeps the gradients of a step and changes nothing."""

    gradients = {}

    def update(self, name, p, gradient, state=None):
        """Keep the gradient."""
        self.gradients[name] = gradient


plain_model, looking = make_model(), KeepsGradients()
looking.adopt_all(plain_model)
PlainEngine(plain_model, looking, Recipe()).step(pairs, source, objective)
expected = dict(looking.gradients)
size = sum(gradient.nbytes for gradient in expected.values())
print(f"the plain step's gradient, all at once: {in_bytes(size)}")

# %% The streamed step, forward
# Without a graph: of each block only the input is kept. At the head all pairs are in view, so the
# losses, the weights and the gradient at the last tokens are exact.

base = alive()
batches = micro_batches(pairs, source, 400)  # three micro-batches of at most 400 tokens
step = StreamedStep(model, batches, objective, recompute="full")
result = step.forward()
inputs = config.blocks * TOKENS * config.width * 4
print(f"after forward {in_bytes(alive() - base)} more; inputs of blocks are {in_bytes(inputs)}")
print(f"weights {result.weights.numpy().round(2)}")

# %% The streamed step, backward
# Compute a block again, with a graph, and take its gradient: the block may then be updated at once.
# What is alive falls block by block, because the block's input goes when its gradient is taken, and
# the gradient goes when the block is updated. (Our copies, for the comparison below, do not count.)


def title_of(names):
    """A part of the model: its block, or the names of its parameters."""
    if len(names) > 3:
        return ".".join(names[0].split(".")[1:3])
    return ", ".join(name.removeprefix("trunk.") for name in names)


streamed, alive_after = {}, []
for names, gradients in zip(parts_of(model), step.backward()):
    alive_after.append(alive() - base)
    size = sum(gradient.nbytes for gradient in gradients.values())
    print(f"  {title_of(names)}")
    print(f"      gradient {in_bytes(size):>9}, alive {in_bytes(alive_after[-1]):>9}")
    streamed |= {name: gradient.clone() for name, gradient in gradients.items()}
    base += size
    del gradients

errors = []
for name, gradient in expected.items():
    scale = gradient.norm().clamp_min(1e-3)
    errors.append(float((streamed[name] - gradient).norm() / scale))
print(f"largest relative difference from the plain step's gradient: {max(errors):.0e}")

# %% The engine
# `StreamedEngine` is that loop with an update in it. Take the same start twice and one step each:
# the parameters are the same.

RECIPES_HERE = {
    PlainEngine: Recipe(),
    StreamedEngine: Recipe("streamed", recompute="full", micro_tokens=400),
}
ends = []
for engine, recipe in RECIPES_HERE.items():
    model = make_model().double()
    model.trunk.compute_dtype = torch.float64
    optimizer = AdamW()
    optimizer.adopt_all(model)
    optimizer.learning_rate = 1e-3
    engine(model, optimizer, recipe).step(pairs, source, objective)
    ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
difference = float((ends[0] - ends[1]).abs().max())
print(f"one step in float64: plain and streamed parameters differ by at most {difference:.0e}")

# %% 6.9 billion parameters
# The same arithmetic for Pythia-6.9B, 80 pairs of 342 tokens, bf16 on a GPU. `minimore plan` prints
# this table for any config.json.

large = replace(
    config,
    vocabulary=50432,
    width=4096,
    blocks=32,
    heads=32,
    kv_heads=32,
    head_width=128,
    mlp_width=16384,
    rotary_width=32,
)
work = Workload((PairShape(140, 101, 101),) * 80, 2500, 200_000 * 342)
print(f"{parameter_shapes(large).parameters / 1e9:.2f} billion parameters")
peaks = {}
for name, recipe in RECIPES.items():
    memory = memory_of(large, work, replace(recipe, recompute="full"), 2, flash=True)
    peaks[name] = memory.peak
    host = f" and {in_bytes(sum(memory.host.values()))} of the host's" if memory.host else ""
    print(f"  {name:45} {in_bytes(memory.peak):>9}{host}")

# %% What was claimed
assert optimizer.bytes(model) == 3 * 8 * P  # in float64 now: 8 bytes each
assert activations == sorted(activations, reverse=True)
assert max(errors) < 1e-4 and difference < 1e-12
assert alive_after[1] > alive_after[-2]
assert all(a > b for a, b in zip(alive_after[1:-2], alive_after[2:-1]))
assert max(alive_after) < 0.75 * 4 * P  # never near a whole gradient
assert peaks["fp32 AdamW, plain"] > 100e9
assert peaks["stochastic bf16, 8-bit moments (rounds)"] < 40e9
assert peaks["split master, states and inputs on the host"] < 24e9

# %% Two exercises
# Exercise 1. Change a block before its gradient is taken: in the loop above, after the part of
#             block 5, multiply `model.trunk.blocks[4].mlp.up.weight` by 1.5 in place (under
#             torch.no_grad()). Which gradients are wrong? Which test of tests/engine/test_engine.py
#             notices such a change?
# Exercise 2. Clipping by the global norm needs the norm of the whole gradient before the first
#             update. What would the streamed step have to keep for it, or to do twice? Work out
#             bytes and FLOPs for 6.9B, and compare with what
#             `minimore train --engine streamed --max-grad-norm 1` says.
