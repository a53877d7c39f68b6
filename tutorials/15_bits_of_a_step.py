"""Tutorial 15: the bits of a step.

Question      A weight of .02 takes a step of one millionth, as the paper's learning rate has it.
              In which number formats does it arrive?
You will see  the grid of bf16, and that rounding to the nearest drops 97% of such steps; that
              rounding at random keeps all of them on average; 16 bits beside a bf16 number
              that keep what it drops; a moment that cannot fall; and three trainings of one model,
              one of which trains hardly anything.
Takes         about 8 seconds on one CPU core; no GPU.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch

import minimore.engine.optim as optim
from minimore import ModelOptions, load_source, open_reward_model, pack_pairs, pair_losses
from minimore.data.world import World
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.storage import join, key_of, random_bits, round_at_random, split
from minimore.engine.streamed import open_engine
from minimore.figures.sketch import show_curves
from minimore.more import uniform_weights

torch.manual_seed(0)

# %% The grid
# A number in fp32 has 24 bits of precision. A number in bf16 is its upper half: the same range, and
# 8 bits of precision. Between 1/64 and 1/32, where a weight of .02 lies, bf16 numbers are 2^-13 =
# .000122 apart: a step of 1e-6 is less than a hundredth of it.

step = 1e-6
below = torch.tensor(0.02).bfloat16()  # the bf16 number nearest to .02
above = (below.view(torch.int16) + 1).view(torch.bfloat16)  # the next one
gap = float(above.double() - below.double())
print(f"bf16 next to .02: {below.item():.6f} and then {above.item():.6f}")
print(f"the gap is {gap:.2e}, and a step of 1e-6 is {step / gap:.1%} of it")

# %% A million weights take one step
# The weights have a standard deviation of .02, as in a transformer. Each takes a step of 1e-6
# upwards. We ask for the mean change of what is stored, as a share of the step.

weights = torch.randn(1_000_000) * 0.02
stored = weights.bfloat16()  # what bf16 holds before the step


def share_arrived(name, after, before):
    """The mean change of all weights, as a share of the step; prints it, and how many changed."""
    share = float((after.double() - before.double()).mean() / step)
    changed = (after != before).float().mean()
    print(f"{name:14} {share:.3f} of the step arrives; {changed:.1%} of the weights change")
    return share


# %% Rounding to the nearest
# A step that is smaller than half a gap is rounded away. Only weights so near to zero that their
# grid is fine enough can move at all: about 2% of them. Of the whole step about 3% arrives.

nearest = (stored.float() + step).bfloat16()
arrived_nearest = share_arrived("to the nearest", nearest, stored)

# %% Rounding at random
# Let x lie between two bf16 numbers, and round
#
#     up with probability (x - lower) / (upper - lower), and down otherwise
#
# The expected value is then x itself. A weight near .02 jumps a whole gap about once in a hundred
# steps, and smaller weights, on their finer grids, more often: 4% of all. No single weight is right
# after one step. The mean of all is: look for a share near 1.

place = torch.arange(len(weights), dtype=torch.int32)
bits = random_bits(key_of(seed=0, step=1, name="weights", rounded="value"), place)
at_random = round_at_random(stored.float() + step, bits)
arrived_at_random = share_arrived("at random", at_random, stored)

# %% Keeping the missing bits
# `split` makes two numbers of one: the bf16 number to compute with, and beside it the other 16 bits
# as an int16. `join` makes the fp32 number of them again, to the bit. So the step arrives whole.

high, low = split(weights)
after_split = join(*split(join(high, low) + step))
arrived_split = share_arrived("split", after_split, weights)

# %% A moment that cannot fall
# Adam's second moment forgets a thousandth a step: v <- .999 v + .001 g². At 1 the next bf16 number
# below is 1/256 away, so a fall of less than half of that is rounded away. Let g² have been 1 so
# far, and be .25 from now on. After 3,000 steps v should be .25 + .75 x .999^3000 = .287. Predict
# what rounding to the nearest makes of it. At random we watch the mean of 200 copies of v.


def after_one_step(v):
    """The second moment after one step more, in fp32."""
    return 0.999 * v.float() + 0.001 * 0.25


fall = {"nearest": [], "at random": [], "fp32": []}
v_nearest, v_at_random = torch.ones(1).bfloat16(), torch.ones(200).bfloat16()
place_of_v = torch.arange(200, dtype=torch.int32)
for t in range(3000):
    v_nearest = after_one_step(v_nearest).bfloat16()
    bits = random_bits(key_of(seed=0, step=t, name="v", rounded="second"), place_of_v)
    v_at_random = round_at_random(after_one_step(v_at_random), bits)
    values = v_nearest.item(), v_at_random.float().mean().item(), 0.25 + 0.75 * 0.999 ** (t + 1)
    for name, v in zip(fall, values):
        fall[name].append(v)

picture = {name: (range(0, 3000, 100), values[::100]) for name, values in fall.items()}
show_curves("15_moment", "A second moment that should fall from 1 to .29", "steps", "v", picture)

# To the nearest, v stays at 1 for ever, in the end four times too large. Adam divides by the square
# root of v, so that optimizer takes steps half as long as it should.

# %% Three trainings
# The claims so far are about single numbers. Now one small model is trained in three ways: 40 steps
# at a learning rate of 5e-5, less than half of the gap at a weight of .02. (At 1e-6 so small a
# model would learn nothing in 40 steps by any storage.) Matrices are stored in three ways, and
# vectors, the head among them, in fp32. minimore does not offer rounding to the nearest, which is
# what most code does: for the last training we put it in the place of `optim.round_at_random`.

with tempfile.TemporaryDirectory() as folder:
    world = World(annotators=("ana",), train_pairs=(600,), test_pairs=300)
    files = world.write(Path(folder))["ana"]
    options = ModelOptions(model=f"{folder}/model", device="cpu")
    untrained, checkpoint = open_reward_model(options)
    pairs, test_pairs = (load_source("ana", str(f), checkpoint.tokenizer, 64).pairs for f in files)


def train(parameters, moments):
    """The loss on held-out pairs after a training by these storages."""
    model = copy.deepcopy(untrained)
    optimizer = AdamW(parameters, moments)
    optimizer.adopt_all(model)
    optimizer.learning_rate = 5e-5
    engine = open_engine(model, optimizer, Recipe("streamed", parameters, moments))
    objective = RewardObjective(1, partial(uniform_weights, state={}))
    for step in range(40):
        engine.step(pairs[15 * step : 15 * step + 15], [0] * 15, objective)
    with torch.no_grad():
        chosen, rejected = model.features(pack_pairs(test_pairs))
        return float(pair_losses((chosen - rejected) @ model.head).mean())


def round_to_nearest(x, bits):
    """What the library does not offer. The random bits are not used."""
    return x.bfloat16()


held_out_loss = {
    "fp32": train("float32", "float32"),
    "at random, 8-bit moments": train("bfloat16", "int8"),
}
optim.round_at_random = round_to_nearest
held_out_loss["to the nearest"] = train("bfloat16", "float32")
optim.round_at_random = round_at_random
print("held-out loss:", {name: round(loss, 4) for name, loss in held_out_loss.items()})

# The last one trains its head on a trunk that hardly moves. There is no error and no warning, only
# a worse model.

# %% What was claimed
assert gap == 2**-13 and step / gap < 0.01
assert arrived_nearest < 0.05
assert abs(arrived_at_random - 1) < 0.1 and abs(arrived_split - 1) < 1e-3
assert torch.equal(join(high, low), weights)
assert fall["nearest"][-1] == 1
assert abs(fall["at random"][-1] / fall["fp32"][-1] - 1) < 0.015
assert abs(held_out_loss["at random, 8-bit moments"] - held_out_loss["fp32"]) < 0.005
assert held_out_loss["to the nearest"] > held_out_loss["fp32"] + 0.03

# %% Two exercises
# Exercise 1. Make the learning rate 1e-5, then 1e-6, and compare the losses. Count besides the
#             stored numbers that change in a step. Why does rounding to the nearest never stop
#             altogether? (Which weights still move?)
# Exercise 2. In `train`, let the optimizer draw the same bits in every step: replace
#             `optim.random_bits` by a function that ignores its key. Does the training show it?
