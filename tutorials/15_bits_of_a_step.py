"""Tutorial 15: the bits of a step.

Question      A weight of .02 takes a step of one millionth, as the paper's learning rate has it.
              In which number formats does it arrive?
You will see  the grid of bf16, and that rounding to the nearest drops 97% of such steps; that
              rounding at random keeps all of them on average; 16 bits that make a bf16 number
              exact; what becomes of Adam's moments; and four trainings of one model, one of them
              half frozen.
Takes         about 12 seconds on one CPU core; no GPU.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch

import minimore.engine.optim as optim
from minimore import ModelOptions, load_source, open_reward_model
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.storage import join, key_of, random_bits, round_at_random, split
from minimore.engine.streamed import open_engine
from minimore.more import uniform_weights
from minimore.report import evaluate_sources
from minimore.tables import Table

torch.manual_seed(0)

# %% The grid
# A number in fp32 has 24 bits of precision. A number in bf16 is the upper half of it: the same
# range, and 8 bits of precision. Between 1/64 and 1/32, where a weight of .02 lies, bf16 numbers
# are 2^-13 = .000122 apart. Look at the gap: a step of 1e-6 is less than a hundredth of it.

step = 1e-6
below = torch.tensor(0.02).bfloat16()  # the bf16 number nearest to .02
above = (below.view(torch.int16) + 1).view(torch.bfloat16)  # the next one
gap = float(above.double() - below.double())
print(f"bf16 next to .02: {below.item():.6f} and then {above.item():.6f}")
print(f"the gap is {gap:.2e}, and a step of 1e-6 is {step / gap:.1%} of it")

# %% A million weights take one step
# The weights have a standard deviation of .02, as in a transformer. Each takes a step of 1e-6
# upwards. We ask for the mean change of what is stored, as a share of the step: 1 if all of it
# arrives.

weights = torch.randn(1_000_000) * 0.02
stored = weights.bfloat16()  # what bf16 holds before the step


def share_arrived(after, before):
    """The mean change of all weights, as a share of the step."""
    return float((after.double() - before.double()).mean() / step)


def share_changed(after):
    """The share of the stored weights that are another number after the step."""
    return float((after != stored).float().mean())


# %% Rounding to the nearest
# A step that is smaller than half a gap is rounded away. Only weights so near to zero that their
# grid is fine enough can move at all: about 2% of them. Of the whole step about 3% arrives.

nearest = (stored.float() + step).bfloat16()
arrived_nearest = share_arrived(nearest, stored)
print(f"\nto the nearest: {arrived_nearest:.3f} of the step arrives", end="; ")
print(f"{share_changed(nearest):.1%} of the weights change")

# %% Rounding at random
# Let x lie between two bf16 numbers, and round
#
#     up with probability (x - lower) / (upper - lower), and down otherwise
#
# The expected value is then x itself. A weight near .02 jumps a whole gap about once in a hundred
# steps. No single weight is right after one step. The mean of all weights is, and so is the mean of
# one weight over many steps: look for a share near 1.

place = torch.arange(len(weights), dtype=torch.int32)
bits = random_bits(key_of(seed=0, step=1, name="weights", rounded="value"), place)
at_random = round_at_random(stored.float() + step, bits)
arrived_at_random = share_arrived(at_random, stored)
print(f"at random:      {arrived_at_random:.3f} of the step arrives", end="; ")
print(f"{share_changed(at_random):.1%} of the weights change")

# %% Keeping the missing bits
# `split` makes two numbers of one: the bf16 number to compute with, and beside it the other 16 bits
# as an int16. `join` makes the fp32 number of them again, to the bit. So a step that is taken on
# the joined number arrives as in fp32: look for a share of 1.

high, low = split(weights)
after_split = join(*split(join(high, low) + step))
arrived_split = share_arrived(after_split, weights)
print(f"split:          {arrived_split:.3f} of the step arrives")

# Here is one number, .02, taken apart. One unit of the int16 is worth 2^-29 at this size.
x = torch.tensor([0.02])
x_high, x_low = split(x)
x_joined = join(x_high, x_low)
print(f"\n{x.item():.10f} = {x_high.item():.10f} and {x_low.item()} x 2^-29", end="; ")
print(f"joined: {x_joined.item():.10f}")

# %% A moment that cannot fall
# Adam's second moment is a mean of squared gradients that forgets a thousandth a step:
#
#     v <- .999 v + .001 g²
#
# At 1 the next bf16 number below is 1/256 away, so a fall of less than half of that is rounded
# away. Let g² have been 1 so far, and be .25 from now on. After 5,000 steps v should be
#
#     .25 + .75 x .999^5000 = .255
#
# Predict what rounding to the nearest makes of it. We watch 200 copies of v.


def after_one_step(v):
    """The second moment after one step more, in fp32."""
    return 0.999 * v.float() + 0.001 * 0.25


v_fp32 = torch.ones(200)
v_nearest = torch.ones(200).bfloat16()
v_at_random = torch.ones(200).bfloat16()
place_of_v = torch.arange(200, dtype=torch.int32)
for t in range(5000):
    v_fp32 = after_one_step(v_fp32)
    v_nearest = after_one_step(v_nearest).bfloat16()
    bits = random_bits(key_of(seed=0, step=t, name="v", rounded="second"), place_of_v)
    v_at_random = round_at_random(after_one_step(v_at_random), bits)

mean_v = {
    "fp32": float(v_fp32.mean()),
    "nearest": float(v_nearest.float().mean()),
    "at random": float(v_at_random.float().mean()),
}
print("\nv after 5,000 steps:", ", ".join(f"{name} {v:.3f}" for name, v in mean_v.items()))
print(f"standard deviation of v at random: {v_at_random.float().std():.3f}")

# To the nearest, v stays at 1 for ever: four times too large. Adam divides by the square root of v,
# so that optimizer takes steps half as long as it should.

# %% Four trainings: the data
# The claims so far are about single numbers. Now one small model is trained in four ways, on the
# pairs of three annotators.

folder = tempfile.TemporaryDirectory()
home = Path(folder.name)
world = World(annotators=("ana", "ben", "cleo"), train_pairs=(300,), test_pairs=150)
paths = world.write(home)


def open_model():
    """The world's model with a fresh head, and its tokenizer."""
    model, checkpoint = open_reward_model(ModelOptions(model=str(home / "model"), device="cpu"))
    return model, checkpoint.tokenizer


_, tokenizer = open_model()
train_sources, test_sources = [], []
for name, (train_path, test_path) in paths.items():
    train_sources.append(load_source(name, str(train_path), tokenizer, max_length=64))
    test_sources.append(load_source(name, str(test_path), tokenizer, max_length=64))


# %% Four trainings: one of them
# 60 steps are taken at a learning rate of 3e-5, which is a quarter of the gap at a weight of .02.
# (At 1e-6 it would be a hundredth, and so small a model would learn nothing in 60 steps by any
# storage.) Only matrices are stored in the four ways. Vectors, the head among them, are fp32 in all
# four.


def matrices_of(model, optimizer):
    """All matrices of a model as one vector, as exactly as the optimizer knows them."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    return torch.cat([optimizer.value(name, p).flatten() for name, p in matrices])


def train(parameters, moments):
    """How far the matrices moved, and the mean report on held-out pairs, by these storages."""
    model, _ = open_model()
    optimizer = AdamW(parameters, moments)
    optimizer.adopt_all(model)
    optimizer.learning_rate = 3e-5
    engine = open_engine(model, optimizer, Recipe("streamed", parameters, moments))
    objective = RewardObjective(3, partial(uniform_weights, state={}))

    before = matrices_of(model, optimizer)
    steps = epoch_steps(
        [300] * 3, sampling="equal", per_source=None, batch_size=15, seed=0, epoch=0
    )
    for sampled in steps:  # (15, 2): source, pair in the source
        pairs = [train_sources[k].pairs[i] for k, i in sampled]
        engine.step(pairs, sampled[:, 0].tolist(), objective)
    distance = float((matrices_of(model, optimizer) - before).norm())
    return distance, evaluate_sources(model, test_sources)[0]["mean"]


# %% Four trainings: the results
# minimore does not offer rounding to the nearest, which is what most code does. For the last of the
# four we put it in the place of `optim.round_at_random`. Compare how far the matrices move, and the
# losses: the first three end at the same loss, to .005, and the last one is worse by more than .04.


def round_to_nearest(x, bits):
    """What the library does not offer. The random bits are not used."""
    return x.bfloat16()


storages = {
    "fp32": ("float32", "float32"),
    "split": ("split", "float32"),
    "at random, 8-bit moments": ("bfloat16", "int8"),
    "nearest": ("bfloat16", "float32"),
}
distance, held_out_loss = {}, {}
table = Table("storage", "matrices moved by", "held-out loss", "accuracy")
for name, (parameters, moments) in storages.items():
    optim.round_at_random = round_to_nearest if name == "nearest" else round_at_random
    distance[name], report = train(parameters, moments)
    held_out_loss[name] = report["nll"]
    moved = f"{distance[name]:.3f}"
    table.add(name, moved, f"{report['nll']:.4f}", f"{report['accuracy']:.3f}")
optim.round_at_random = round_at_random
folder.cleanup()
print(f"\n{table}")

# The last one trains its head on a trunk that hardly moves. There is no error and no warning, only
# a worse model.

# %% What was claimed
assert gap == 2**-13 and step / gap < 0.01
assert arrived_nearest < 0.05
assert abs(arrived_at_random - 1) < 0.1
assert abs(arrived_split - 1) < 1e-3
assert torch.equal(join(high, low), weights) and x_joined == x
assert mean_v["nearest"] == 1
assert abs(mean_v["at random"] / mean_v["fp32"] - 1) < 0.01
assert abs(distance["split"] - distance["fp32"]) < 0.01
assert distance["nearest"] < 0.85 * distance["fp32"]
for name in ("split", "at random, 8-bit moments"):
    assert abs(held_out_loss[name] - held_out_loss["fp32"]) < 0.005
assert held_out_loss["nearest"] > held_out_loss["fp32"] + 0.04

# %% Two exercises
# Exercise 1. Make the learning rate 1e-5, then 1e-6, and compare how far the matrices move. When
#             does rounding to the nearest stop altogether? Why does random rounding move them
#             farther than fp32 does, and the more so the smaller the rate? (How much of the
#             movement is noise?)
# Exercise 2. In minimore/engine/optim.py, let `update_slice` give `round_at_random` the same bits
#             in every step: a key that does not depend on the step. Which test of
#             tests/engine/test_optim.py fails, which does not, and what does the training above
#             show?
