"""Tutorial 9: the bits of a step.

Question      A weight of .02 takes a step of one millionth, as the paper's learning rate has it.
              In which number formats does it arrive?
You will see  the grid of bf16, and that rounding to the nearest drops 97% of such steps; that
              rounding at random keeps all of them on average; 16 bits that make a bf16 number
              exact; what becomes of Adam's moments; and four trainings of one model, one of them
              half frozen.
Takes         about 25 seconds on one CPU core; no GPU.
"""

# %%
import tempfile
from functools import partial
from pathlib import Path

import torch

import minimore.engine.optim as optim
from minimore import ModelOptions, load_source, open_reward_model
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW, join, key_of, random_bits, round_at_random, split
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.more import uniform_weights
from minimore.report import evaluate_sources

torch.manual_seed(0)

# %% The grid
# fp32 has 24 bits of precision, bf16 has 8 (and the same range: it is the upper half of an fp32
# number). So bf16 numbers between 1/64 and 1/32, where a weight of .02 lies, are 2^-13 = .000122
# apart. A step of 1e-6 is a hundredth and more of that.
weight = torch.tensor(0.02)
here = weight.bfloat16()
above = (here.view(torch.int16) + 1).view(torch.bfloat16)
gap = float(above.double() - here.double())
print(
    f"bf16 next to .02: {here.item():.6f}, {above.item():.6f}; the gap is {gap:.2e},"
    f" a step of 1e-6 is {1e-6 / gap:.1%} of it"
)

# %% One step, four ways
# A million weights, as a transformer has them (standard deviation .02), each takes a step of 1e-6
# upwards.
weights, step = torch.randn(1_000_000) * 0.02, 1e-6
start = weights.bfloat16()  # what is stored before the step
nearest = (start.float() + step).bfloat16()


def bits(t):
    """The random bits of every weight in step t."""
    key = key_of(seed=0, step=t, name="weights", rounded="value")
    return random_bits(key, torch.arange(len(weights), dtype=torch.int32))


at_random = round_at_random(start.float() + step, bits(1))
high, low = split(weights)
exact = join(*split(join(high, low) + step))


def moved(after, before):
    """The mean change, as a share of the step."""
    return float((after.double() - before.double()).mean() / step)


arrived = {
    "nearest": moved(nearest, start),
    "at random": moved(at_random, start),
    "split": moved(exact, weights),
}
print("share of the step that arrives:", {name: f"{share:.3f}" for name, share in arrived.items()})
print(
    f"weights that changed at all: nearest {(nearest != start).float().mean():.1%},"
    f" at random {(at_random != start).float().mean():.1%}"
)
# To the nearest, only weights so near to zero that their grid is fine enough can move. At random,
# one weight in a hundred jumps a whole gap: up with the probability that the step is of the gap.
# No weight is right, their mean is; so is each one's over many steps.

# %% Where the missing bits are
# `split` keeps the bf16 number to compute with, and the other 16 bits beside it, as an int16.
# Together they are the fp32 number to the bit.
x = torch.tensor([0.02])
x_high, x_low = split(x)
print(
    f"{x.item():.10f} = {x_high.item():.10f} and {x_low.item()} x 2^-29;"
    f" joined again: {join(x_high, x_low).item():.10f}"
)

# %% A moment that cannot fall
# Adam's second moment decays by a thousandth a step: v <- .999 v + .001 g^2. bf16 numbers are up
# to 1/128 apart: rounded to the nearest, v never falls. Here g^2 has been 1 and is .25 from now
# on; after 5,000 steps v should be .25 (+ .75 x .999^5000 = .005).
v = {
    "fp32": torch.ones(2000),
    "nearest": torch.ones(2000).bfloat16(),
    "at random": torch.ones(2000).bfloat16(),
}
place = torch.arange(2000, dtype=torch.int32)
for t in range(5000):
    new = {name: 0.999 * value.float() + 0.001 * 0.25 for name, value in v.items()}
    v = {
        "fp32": new["fp32"],
        "nearest": new["nearest"].bfloat16(),
        "at random": round_at_random(
            new["at random"], random_bits(key_of(0, t, "v", "second"), place)
        ),
    }
found = {name: float(value.float().mean()) for name, value in v.items()}
print(
    "v after 5,000 steps:",
    {name: f"{value:.3f}" for name, value in found.items()},
    f"spread at random: {v['at random'].float().std():.3f}",
)
# An optimizer with that v takes steps half as long as it should, for ever.

# %% Four trainings
# One small model, three annotators, 200 steps at a learning rate of 3e-5: a quarter of the grid at
# a weight of .02. (At 1e-6 it would be a hundredth, and so small a model would learn nothing in
# 200 steps by any storage. Vectors, the head among them, are fp32 in all four.)
# `optim.round_at_random` is replaced for one of them by what most code does. (minimore offers no
# such option.)
folder = tempfile.TemporaryDirectory()
home = Path(folder.name)
paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(1600,), test_pairs=300).write(home)


def train(parameters, moments):
    model, checkpoint = open_reward_model(ModelOptions(model=str(home / "model"), device="cpu"))
    sources, tests = (
        [
            load_source(name, str(files[i]), checkpoint.tokenizer, 64)
            for name, files in paths.items()
        ]
        for i in (0, 1)
    )
    optimizer = AdamW(parameters, moments)
    optimizer.adopt_all(model)
    before = torch.cat(
        [optimizer.value(name, p).flatten() for name, p in model.named_parameters() if p.ndim > 1]
    )
    engine = open_engine(model, optimizer, Recipe("streamed", parameters, moments))
    optimizer.learning_rate = 3e-5
    for chosen in epoch_steps([1600] * 3, "equal", None, 24, 0, 0):
        engine.step(
            [sources[k].pairs[i] for k, i in chosen],
            chosen[:, 0].tolist(),
            RewardObjective(3, partial(uniform_weights, state={})),
        )
    after = torch.cat(
        [optimizer.value(name, p).flatten() for name, p in model.named_parameters() if p.ndim > 1]
    )
    return float((after - before).norm()), evaluate_sources(model, tests)[0]["mean"]


RUNS = {
    "fp32": ("float32", "float32"),
    "split": ("split", "float32"),
    "at random, 8-bit moments": ("bfloat16", "int8"),
    "nearest": ("bfloat16", "float32"),
}


def round_to_nearest(x, bits):
    """What the library does not offer; the bits are not used."""
    return x.bfloat16()


way = {}
for name, (parameters, moments) in RUNS.items():
    optim.round_at_random = round_to_nearest if name == "nearest" else round_at_random
    way[name], report = train(parameters, moments)
    print(
        f"{name:26} matrices moved by {way[name]:6.3f},"
        f" held-out loss {report['nll']:.4f}, accuracy {report['accuracy']:.3f}"
    )
    way[name, "loss"] = report["nll"]
optim.round_at_random = round_at_random
folder.cleanup()
# The first three end at the same loss. The last one trains its head on a trunk that hardly moves:
# no error, no warning, a worse model.

# %% Claims
assert gap == 2**-13 and 1e-6 / gap < 0.01
assert (
    arrived["nearest"] < 0.05
    and abs(arrived["at random"] - 1) < 0.1
    and abs(arrived["split"] - 1) < 1e-3
)
assert torch.equal(join(high, low), weights) and join(x_high, x_low) == x
assert found["nearest"] == 1 and abs(found["at random"] / found["fp32"] - 1) < 0.01
assert (
    abs(way["split"] - way["fp32"]) < 0.01
    and max(
        abs(way[name, "loss"] - way["fp32", "loss"])
        for name in ("split", "at random, 8-bit moments")
    )
    < 0.005
)
assert way["nearest"] < 0.8 * way["fp32"] and way["nearest", "loss"] > way["fp32", "loss"] + 0.04

# %% Exercises
# Exercise 1. Make the learning rate 1e-5, then 1e-6, and compare how far the matrices move. When
#             does nearest stop altogether, and why does random rounding move them farther than
#             fp32 does, the smaller the rate the more? (What moves, and what of it is noise?)
#
# Exercise 2. In optim.py, let `update_slice` give `round_at_random` the same bits in every step (a
#             key that does not depend on it). Which test of tests/engine/test_optim.py fails,
#             which does not, and what does the training above show?
