"""Tutorial 6: uniform weights against MORE, with error bars.

Question      When is a difference between two methods more than luck, and where do MORE's weights
              make one?
You will see  the same comparison over ten seeds in four worlds; intervals of paired differences;
              the smallest difference that ten seeds can show; and that the answer depends on the
              world: nothing at all, a little harm, or clear harm.
Takes         about 10 seconds on a laptop CPU.
"""

import numpy as np
import torch

from minimore.calibration import accuracy, pair_ece
from minimore.data.world import WORDS, World
from minimore.lab.probe import ProbeOptions, train_head
from minimore.tables import Table
from minimore.uncertainty import detectable, over_seeds

SEEDS, W, K = 10, len(WORDS), 5

# %% Pairs as word counts
# As in tutorial 5 a head reads word counts, so a run takes a tenth of a second and ten seeds are no
# luxury. A pair is the difference of two responses' counts, chosen minus rejected. Which response
# is chosen is drawn, as the world draws it:
#
#     P(a over b) = σ(β_k (r*(a) + drift_k(a) - r*(b) - drift_k(b)))


def count_words(random, count):
    """Word counts of `count` responses of 14 words: (count, W)."""
    words = random.integers(W, size=(count, 14))
    counts = np.zeros((count, W))
    np.add.at(counts, (np.arange(count)[:, None], words), 1)
    return counts


def labelled_differences(random, world, k, count):
    """`count` pairs of annotator k, chosen minus rejected: (count, W)."""
    difference = (count_words(random, count) - count_words(random, count)) / np.sqrt(14)
    shared, drifts = world.values()
    beta = world.decisiveness[k % len(world.decisiveness)]
    p = 1 / (1 + np.exp(-beta * difference @ (shared + drifts[k])))
    sign = np.where(random.random(count) < p, 1, -1)
    return difference * sign[:, None]


# %% One seed: the same world, pairs, start and order for both methods
# A seed is another world, other pairs, another start and another order: everything that could have
# been otherwise. Within a seed only the weights differ.


def options(epochs):
    """How a head is trained."""
    return ProbeOptions(
        features="", epochs=epochs, batch_size=240, pairs_per_source=1500, learning_rate=0.06
    )


def compare_once(seed, sizes, epochs, fields):
    """Mean accuracy and ECE over annotators by method, and MORE's mean weights."""
    world, random = World(seed=seed, **fields), np.random.default_rng(seed)
    train = [
        torch.tensor(labelled_differences(random, world, k, size), dtype=torch.float32)
        for k, size in enumerate(sizes)
    ]
    test = [labelled_differences(random, world, k, 1500) for k in range(K)]
    result = {}
    for method in ("uniform", "more"):
        head, weights = train_head(train, method, options(epochs), seed)
        margins = [pairs @ head.numpy() for pairs in test]
        result[method, "accuracy"] = np.mean([accuracy(m) for m in margins])
        result[method, "ece"] = np.mean([pair_ece(m) for m in margins])
        result[method, "weights"] = weights.mean(0)
    return result


def compare(sizes=(1500,) * K, epochs=1, **fields):
    """`compare_once` for every seed: {(method, figure): (S, ...)}."""
    results = [compare_once(seed, sizes, epochs, fields) for seed in range(SEEDS)]
    return {key: np.array([result[key] for result in results]) for key in results[0]}


# %% Four worlds
# In the mild one the annotators share most of their taste. In the others something is unequal: how
# decisive they are, how many pairs they give, or one of them wants the opposite of all others.

worlds = {
    "mild": compare(),
    "unequal noise": compare(decisiveness=(5.0, 4.0, 2.0, 0.7, 0.2)),
    "small sources": compare(sizes=(1500, 400, 100, 40, 40), epochs=3),
    "one reversed": compare(reversed="eve"),
}


def differences(world, figure):
    """MORE minus uniform, seed by seed: (S,)."""
    return world["more", figure] - world["uniform", figure]


# %% One seed is a habit
# The habit of the field is one run each. Look at what single seeds would have said in the mild
# world.

gaps = differences(worlds["mild"], "ece")
print("mild world, ECE of MORE minus uniform, ten seeds:")
print(gaps.round(4))
print(f"the largest and the smallest are {gaps.max():+.4f} and {gaps.min():+.4f}:")
print("with one seed one could publish either.\n")

# %% Ten seeds, paired
# Differences are taken seed by seed, because the same seed gives both methods the same world. Their
# mean has an interval from Student's t. "could show" is the smallest true difference that ten seeds
# with this spread would find four times in five.

table = Table("MORE minus uniform", "accuracy", "could show", "ECE", "could show", "mean weights")
for name, world in worlds.items():
    cells = []
    for figure in ("accuracy", "ece"):
        values = differences(world, figure)
        mean, half = over_seeds(values)
        cells += [f"{mean:+.4f} ± {half:.4f}", f"{detectable(values):.4f}"]
    table.add(name, *cells, world["more", "weights"].mean(0).round(2))
print(table)

# %% What the weights do
# In the mild world they are 1/5 on average and nothing differs. The noisiest source, whose
# gradients agree least with the others', and the smallest ones get a little more than their share,
# which costs a little. Where one is reversed, its gradient opposes all others, so the shortest
# vector leans on it. That the weights can help is not excluded: the page of the laboratory has
# whole models, and real sources are none of these worlds.


def is_clear(values):
    """Whether the interval of the mean over seeds excludes zero."""
    mean, half = over_seeds(values)
    return abs(mean) > half


# %% What was claimed
assert gaps.max() > 0 > gaps.min()  # single runs say either
assert abs(differences(worlds["mild"], "accuracy").mean()) < 0.006
assert np.allclose(worlds["mild"]["more", "weights"].mean(0), 0.2, atol=0.02)
harm = differences(worlds["one reversed"], "accuracy")
assert is_clear(harm) and harm.mean() < 0
reversed_weight = worlds["one reversed"]["more", "weights"].mean(0)[4]
assert reversed_weight > 0.25  # more than its share
for world in worlds.values():
    assert detectable(differences(world, "accuracy")) > 0
    assert detectable(differences(world, "ece")) > 0

# %% Two exercises
# Exercise 1. Repeat with three seeds instead of ten. Which of the conclusions would you still have
#             drawn?
# Exercise 2. Take `normalize="none"` (the paper's text) in `ProbeOptions`. Which source do the
#             weights prefer now, and why? Look at the lengths of the gradients, and at tutorial 3.
