"""Tutorial 5: diversified preferences and drift.

Question      What becomes of one reward that is asked to please five people, and how much of it is
              drift?
You will see  a world whose shared reward r* and drifts are known; a reward model of one person,
              taken apart into r* and drift (Eq. 4); the mixture, in which the drifts cancel
              (Eq. 6); and what that costs every single person.
Takes         about 5 seconds on a laptop CPU.
"""

import numpy as np
import torch

from minimore.calibration import accuracy, probability
from minimore.data.forms import Pair
from minimore.data.world import WORDS, World
from minimore.figures.sketch import show_curves
from minimore.lab.probe import ProbeOptions, train_head
from minimore.tables import Table

W, K = len(WORDS), 5

# %% Five people who agree on most things
# Every response is a bag of 14 words. Person k values it at
#
#     r*(y) + drift_k(y)                                                                  (Eq. 4)
#
# where each of the two is a sum of word values. The drifts are orthogonal to r*, equally strong,
# and sum to zero over the five people. `conflict` is the share of a taste that is drift: here a
# half. So each drift has a correlation of -1/4 with another, and two tastes of 1/2 - 1/2 · 1/4.

world = World(conflict=0.5, decisiveness=(2.0,), seed=1)
shared, drifts = world.values()  # word values (W,) and (K, W)
similarity = np.corrcoef(shared + drifts[0], shared + drifts[1])[0, 1]
print(f"the drifts sum to {np.abs(drifts.sum(0)).max().round(12)} for every word")
print(f"the correlation of two people's tastes is {similarity:.3f}")

# %% Their preferences
# We draw 3,000 pairs for each person. The label is drawn with the probability σ(2 m), where m is
# that person's true margin and 2 the decisiveness.

random = np.random.default_rng(0)


def sample(count):
    """Pairs of texts, and what they count: (N,) Pair, (N, W) first minus second response."""
    words = random.integers(W, size=(2, count, 14))
    first, second = (
        np.stack([np.bincount(response, minlength=W) for response in side]) for side in words
    )
    texts = [[" ".join(WORDS[i] for i in response) for response in side] for side in words]
    pairs = [Pair("", a, b) for a, b in zip(*texts)]
    return pairs, (first - second) / np.sqrt(14)


def label(k, difference):
    """The same differences, turned so that person k's choice comes first."""
    decisiveness = world.decisiveness[k % len(world.decisiveness)]
    p = probability(decisiveness * difference @ (shared + drifts[k]))
    sign = np.where(random.random(len(p)) < p, 1, -1)
    return difference * sign[:, None]


train = [torch.tensor(label(k, sample(3000)[1]), dtype=torch.float32) for k in range(K)]
test_pairs, test = sample(3000)
answers = [label(k, test) for k in range(K)]

# %% How a reward is taken apart
# A model gives every test pair a margin m. The world knows the true margins of r* and of every
# drift on the same pairs: call one of them x. `World.decompose` asks two questions.
#
#     slope on x      mean(m x) / mean(x²)       how much of x the margin contains; 1 if it has x as
#                                                it is, 0 if it has none of it
#     share of X      mean(projection²) / mean(m²)
#                                                how much of the margin's mean square a combination
#                                                of X explains: of r* alone, or of all five drifts
#
# r* and the drifts are orthogonal, so the shares of r*, of the drifts and of everything else add up
# to 1, but for some hundredths: on 3,000 drawn pairs they are orthogonal only nearly. Hence also
# 1.96 in the place of 2, by hand, for margins that are 2 r* + 2 times Ana's drift:

true_margin, anas_drift = test @ shared, test @ drifts[0]
m = 2 * true_margin + 2 * anas_drift
slope_by_hand = np.mean(m * true_margin) / np.mean(true_margin**2)
parts = world.decompose(m, test_pairs)
print(f"\nby hand: slope of r* {slope_by_hand:.2f}; by World.decompose: {parts.shared:.2f}")


def shares(parts):
    """The three shares as text."""
    return (
        f"shares: r* {parts.shared_share:.2f}, drift {parts.drift_share:.2f},"
        f" other {parts.other_share:.2f}"
    )


# %% One person's reward model
# A head that reads word counts can hold any of these tastes exactly, so nothing below is a matter
# of capacity. Train one on Ana's pairs alone. Eq. 4 says r = r* + drift, so both slopes should be
# near her decisiveness, 2, and the shares near a half. The five drifts sum to zero, so Ana's
# contains -1/4 of each other one: hence Ben's slope of -.5 below. The share is of all five
# together.

options = ProbeOptions(features="", epochs=6, batch_size=200, learning_rate=0.25)
head_of_ana, _ = train_head(train[:1], "uniform", options, seed=0)
ana = world.decompose(test @ head_of_ana.numpy(), test_pairs)
print(f"\nAna's model:      slope of r* {ana.shared:.2f}, of her drift {ana.drift[0]:.2f}", end="")
print(f", of Ben's {ana.drift[1]:.2f}")
print(f"                  {shares(ana)}")

# %% One reward for all
# Mixing everybody's pairs is
#
#     r_mixed = r* + Σ_k λ_k drift_k                                                      (Eq. 6)
#
# with equal weights λ_k = 1/5. The drifts sum to zero, so r* stays and they cancel. Look at the
# share of drift.

head_of_all, _ = train_head(train, "uniform", options, seed=0)
everyone = world.decompose(test @ head_of_all.numpy(), test_pairs)
largest_slope = np.abs(everyone.drift).max()
print(f"everyone's model: slope of r* {everyone.shared:.2f}, of drifts {largest_slope:.2f} at most")
print(f"                  {shares(everyone)}")

# %% What it costs
# Compare each person's own rule, that person's model, and the shared one, on labels as noisy as
# theirs. (Rules are given as expectations: a model can pass them by luck.) The shared model has
# smaller margins than anybody, with a slope of r* below 2: people differ, so it must be less sure
# of a label than whoever gives it.

own_rule, shared_rule = world.ceilings(test_pairs)
accuracy_own, accuracy_all = [], []
table = Table("person", "own rule", "own model", "shared model", "best shared rule")
for k, name in enumerate(world.annotators):
    own_head, _ = train_head(train[k : k + 1], "uniform", options, seed=0)
    accuracy_own.append(accuracy(answers[k] @ own_head.numpy()))
    accuracy_all.append(accuracy(answers[k] @ head_of_all.numpy()))
    row = (own_rule[k], accuracy_own[k], accuracy_all[k], shared_rule[k])
    table.add(name, *(f"{value:.3f}" for value in row))
print(f"\n{table}")

# %% MORE, and what a mixture of two does
# MORE's weights follow the gradients of whole losses. They cannot see which part of a gradient is
# drift. With five people of equal strength they stay near 1/5, and the reward has the same shares.
# Let Ana and everybody else be mixed instead, with λ from 1/5 to 1 for Ana. Eq. 6 says how much of
# her drift is left: (λ - (1 - λ) / 4) of it.

head_of_more, weights = train_head(train, "more", options, seed=0)
more = world.decompose(test @ head_of_more.numpy(), test_pairs)
print(f"\nMORE:             mean weights {weights.mean(0).round(3)}")
print(f"                  {shares(more)}")
weights_of_ana, left = np.linspace(0.2, 1, 9), {"r*": [], "drift": []}
for weight in weights_of_ana:
    mixed = test @ (shared + weight * drifts[0] + (1 - weight) / 4 * drifts[1:].sum(0))
    of_mixture = world.decompose(mixed, test_pairs)
    left["r*"].append(of_mixture.shared_share)
    left["drift"].append(of_mixture.drift_share)
curves = {f"share of {name}": (weights_of_ana, values) for name, values in left.items()}
show_curves("05_shares", "Eq. 6: a mixture's reward, taken apart", "λ of Ana", "share", curves)

# %% What was claimed
assert np.abs(drifts.sum(0)).max() < 1e-12 and np.abs(drifts @ shared).max() < 1e-9
assert abs(slope_by_hand - parts.shared) < 1e-9 and abs(slope_by_hand - 1.96) < 0.02
assert abs(ana.shared - ana.drift[0]) < 0.4 and abs(ana.shared - 2) < 0.4  # r* + drift, as they are
assert 0.35 < ana.drift_share < 0.65  # half of Ana's reward is drift,
assert everyone.drift_share < 0.05  # and hardly any of everyone's,
assert everyone.shared < ana.shared  # whose margins are smaller.
assert np.mean(accuracy_own) > np.mean(accuracy_all) + 0.03  # It has a price,
assert np.allclose(accuracy_all, shared_rule, atol=0.03)  # which is as low as it can be.
assert np.allclose(weights.mean(0), 0.2, atol=0.05) and abs(similarity - 0.375) < 5e-4
assert abs(more.drift_share - everyone.drift_share) < 0.05
assert abs(ana.drift[1] + ana.drift[0] / 4) < 0.15
assert left["drift"][0] < 0.01 and 0.4 < left["drift"][-1] < 0.6

# %% Two exercises
# Exercise 1. Make Eve far less decisive than the others (`decisiveness=(2.0, 2.0, 2.0, 2.0, 0.2)`).
#             Do the drifts still cancel in everyone's model? Whose is left? And why does
#             `decompose` refuse a world in which Eve wants the opposite (`reversed="eve"`)?
# Exercise 2. Give Ana ten times the pairs of the others, and train by "proportional" weights with
#             `sampling="proportional"`. How much of the reward is Ana's drift, and why?
