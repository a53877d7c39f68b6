"""Tutorial 16: where the memory goes.

Question      Training takes 16 bytes a parameter, they say, and activations. Which of these bytes
              must be there at the same time?
You will see  what a training step holds, counted; three ways to keep a block's activations; the
              streamed step watched block by block, with the bytes that are alive after each; that
              its gradient is the plain one's; and what all this makes of Pythia-6.9B.
Takes         about 8 seconds on one CPU core; no GPU.
"""

import gc
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from minimore import bradley_terry_losses
from minimore.data.pairs import TokenPair, pack_pairs
from minimore.data.world import small_gpt_neox
from minimore.engine.activations import block_activations
from minimore.engine.memory import memory_of
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW
from minimore.engine.plan import RECIPES
from minimore.engine.sizes import parameter_shapes
from minimore.engine.streamed import StreamedStep, parts_of
from minimore.engine.workload import PairShape, Workload
from minimore.figures.sketch import show_curves
from minimore.model.config_json import Json
from minimore.model.families import FAMILIES
from minimore.model.trunk import Trunk
from minimore.more import more_weights, weighted_loss
from minimore.reward import RewardModel, fresh_head
from minimore.units import in_bytes

# %% A small model, and 20 pairs of five sources


def config_of(*sizes):
    """The configuration of a GPT-NeoX: width, blocks, heads, words of the vocabulary."""
    return FAMILIES["gpt_neox"].config(Json(small_gpt_neox(*sizes), "config"))


torch.manual_seed(0)
config = config_of(256, 6, 4, 500)
trunk = Trunk(config)
for name, p in trunk.named_parameters():
    if p.ndim > 1:
        torch.nn.init.normal_(p, 0, p.shape[1] ** -0.5)
    else:
        torch.nn.init.constant_(p, float(name.endswith("norm.weight")))
model = RewardModel(trunk, fresh_head(256, 0))

random = np.random.default_rng(0)
pairs = []
for _ in range(20):
    prompt, chosen, rejected = (random.integers(2, 500, n).astype(np.int32) for n in (20, 15, 15))
    sides = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
    pairs.append(TokenPair(*sides, shared=20, longer=0))
source = [i % 5 for i in range(20)]
objective = RewardObjective(5, partial(more_weights, state={}))
TOKENS = sum(pair.tokens for pair in pairs)  # 20 pairs of 50


def alive():
    """Bytes of all tensors that Python knows of; a storage that several share counts once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# %% What a step holds
# Parameters, their gradients, two moments of AdamW: four fp32 numbers for each parameter, 16 bytes.

optimizer = AdamW()
P = sum(p.numel() for p in model.parameters())
optimizer.adopt_all(model)
print(f"{P:,} parameters, {in_bytes(4 * P)}")
print(f"with moments {in_bytes(optimizer.bytes(model))}, with gradients {in_bytes(16 * P)}")

# %% Three ways to keep a block's activations
# Backward needs what forward computed. Keep all of it; or keep matrix products and attention, and
# compute norms and activations again; or keep the block's input alone, and compute the whole block
# again: a third more arithmetic, for backward is two forwards. Bytes of one block, 1,000 tokens:

shapes = (PairShape(20, 15, 15),) * 20
activations = []
for recompute in ("none", "selective", "full"):
    size = block_activations(config, shapes, 4, recompute, flash=False)
    activations.append(size)
    per_unit = size / TOKENS / config.width
    print(f"--recompute {recompute:10} {in_bytes(size):>9} a block,", end=" ")
    print(f"{per_unit:.1f} bytes a token and unit of width")

# %% The streamed step, forward
# Without a graph: of each block only the input is kept. At the head the last hidden states of all
# pairs are there, and the weights need nothing else: so they, the losses and the gradient at the
# last tokens are those of the whole batch, without a second forward for the weights.

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


alive_after, streamed = [], {}
for names, gradients in zip(parts_of(model), step.backward()):
    alive_after.append((alive() - base) / 1e6)
    streamed |= {name: gradient.clone() for name, gradient in gradients.items()}
    size = sum(gradient.nbytes for gradient in gradients.values())
    print(
        f"  gradient of {title_of(names):28} {in_bytes(size):>9}, alive {alive_after[-1]:6.1f} MB"
    )
    base += size
    del gradients
part = range(len(alive_after))
curves = {"streamed": (part, alive_after), "a whole gradient": (part, [4 * P / 1e6] * len(part))}
show_curves("16_alive", "Alive beside parameters and moments", "part, from the head", "MB", curves)

# %% The plain gradient
# Forward through everything with a graph, backward through everything: all gradients at once. They
# are the same ones.

z_chosen, z_rejected = model.features(pack_pairs(pairs, source))
losses = bradley_terry_losses(model.head, z_chosen, z_rejected, torch.tensor(source))
weighted_loss(result.weights, losses).backward()
errors = []
for name, p in model.named_parameters():
    errors.append(float((streamed[name] - p.grad).norm() / p.grad.norm().clamp_min(1e-3)))
print(f"largest relative difference between plain and streamed gradient: {max(errors):.0e}")

# %% Pythia-6.9B
# The same arithmetic for Pythia-6.9B, 80 pairs of 342 tokens, bf16 on a GPU; `minimore plan` prints
# it for any config.json. A reward model has 6.65 billion, for it has no unembedding.

large = config_of(4096, 32, 32, 50432)
work = Workload((PairShape(140, 101, 101),) * 80, 2500, 200_000 * 342)
print(f"{parameter_shapes(large).parameters / 1e9:.2f} billion parameters")
peaks = {}
for name, recipe in RECIPES.items():
    memory = memory_of(large, work, replace(recipe, recompute="full"), 2, flash=True)
    peaks[name] = memory.peak
    host = f" and {in_bytes(sum(memory.host.values()))} of the host's" if memory.host else ""
    print(f"  {name:45} {in_bytes(memory.peak):>9}{host}")

# %% What was claimed
assert optimizer.bytes(model) == 3 * 4 * P
assert activations == sorted(activations, reverse=True)
assert max(errors) < 1e-4
assert all(a > b for a, b in zip(alive_after[1:-2], alive_after[2:-1]))
assert max(alive_after) < 0.75 * 4 * P / 1e6  # never near a whole gradient
assert peaks["fp32 AdamW, plain"] > 100e9
assert peaks["stochastic bf16, 8-bit moments (rounds)"] < 40e9
assert peaks["split master, states and inputs on the host"] < 24e9

# %% Two exercises
# Exercise 1. Change a block before its gradient is taken: in the loop above, after the part of
#             block 5, multiply `model.trunk.blocks[4].mlp.up.weight` by 1.5 in place (under
#             torch.no_grad()). Which gradients are wrong?
# Exercise 2. Clipping needs the norm of the whole gradient before the first update. What would the
#             streamed step have to keep for it, or to do twice, in bytes and FLOPs of 6.9B? Compare
#             with what `minimore train --engine streamed --max-grad-norm 1` says.
