"""Tutorial 6: diversified preferences and drift.

Question      What becomes of one reward that is asked to please five people, and how much of it is drift?
You will see  a world whose shared reward r* and drifts are known; a reward model of one person, taken apart into r* and drift (Eq. 4);
              the mixture, in which the drifts cancel (Eq. 6); and what that costs every single person.
Takes         about 5 seconds on a laptop CPU.
"""

import numpy as np
import torch

from minimore.calibration import accuracy
from minimore.data.records import Pair
from minimore.data.world import WORDS, World
from minimore.lab.probe import ProbeOptions, train_head

# %% Five people who agree on most things
# Every response is a bag of 14 words. Person k values it at r*(y) + drift_k(y). The drifts are orthogonal to r*, equally strong, and
# sum to zero over the five: a regular simplex. `conflict` is the share of a taste that is drift.

world = World(conflict=0.5, decisiveness=(2.0,), seed=1)
shared, drifts = world.values()  # word values (40,) and (5, 40)
print("drifts sum to zero:          ", np.abs(drifts.sum(0)).max().round(12))
print(
    "cosine of two tastes:        ",
    round(float(np.corrcoef(shared + drifts[0], shared + drifts[1])[0, 1]), 3),
)

# %% Their preferences
# A reward head that reads word counts can hold any of these tastes exactly, so nothing below is a matter of capacity. 4,000 pairs each;
# the label is drawn with probability sigmoid(2 x that person's margin).

random = np.random.default_rng(0)


def sample(count):
    """Pairs of texts, and what each side counts: (N,) Pair, (N, 40) first minus second."""
    words = random.integers(len(WORDS), size=(2, count, 14))
    counts = np.stack(
        [np.stack([np.bincount(w, minlength=len(WORDS)) for w in side]) for side in words]
    )
    texts = [[" ".join(WORDS[i] for i in w) for w in side] for side in words]
    return [Pair("", a, b) for a, b in zip(*texts)], (counts[0] - counts[1]) / np.sqrt(14)


def label(k, difference):
    """The same differences, turned so that person k's choice comes first."""
    p = 1 / (1 + np.exp(-2 * difference @ (shared + drifts[k])))
    return difference * np.where(random.random(len(p)) < p, 1, -1)[:, None]


train = [torch.tensor(label(k, sample(4000)[1]), dtype=torch.float32) for k in range(5)]
test_pairs, test = sample(4000)
answers = [label(k, test) for k in range(5)]

# %% One person's reward model
# Trained on Ana alone. Eq. 4 says r = r* + drift: both slopes should be near her decisiveness, 2.

options = ProbeOptions(features="", epochs=6, batch_size=80, learning_rate=0.1)
of_ana, _ = train_head(train[:1], "uniform", options, seed=0)
d = world.decompose(test @ of_ana.numpy(), test_pairs)
print(
    f"\nAna's model:     slope of r* {d.shared:.2f}, of her drift {d.drift[0]:.2f}; shares of its reward: r* {d.shared_share:.2f}, drift {d.drift_share:.2f}, other {d.other_share:.2f}"
)

# %% One reward for all
# Mixing is Eq. 6 with equal weights: r* stays and the drifts, which sum to zero, cancel.

of_all, _ = train_head(train, "uniform", options, seed=0)
e = world.decompose(test @ of_all.numpy(), test_pairs)
print(
    f"everyone's model: slope of r* {e.shared:.2f}, of drifts {np.abs(e.drift).max():.2f} at most; shares: r* {e.shared_share:.2f}, drift {e.drift_share:.2f}, other {e.other_share:.2f}"
)

# %% What it costs
# Each person's own rule, that person's model, and the shared one, on labels as noisy as theirs. The shared model also says less than
# each person means: its margins are smaller, because where people differ no margin is safe.

best, single = world.ceilings([Pair("", p.chosen, p.rejected) for p in test_pairs])
own = [train_head(train[k : k + 1], "uniform", options, seed=0)[0] for k in range(5)]
print("\n          own rule  own model  shared model  best shared rule")
found = {"own": [], "all": []}
for k, name in enumerate(world.annotators):
    found["own"].append(accuracy(answers[k] @ own[k].numpy()))
    found["all"].append(accuracy(answers[k] @ of_all.numpy()))
    print(
        f"{name:8}  {best[k]:8.3f}  {found['own'][k]:9.3f}  {found['all'][k]:12.3f}  {single[k]:16.3f}"
    )

# %% MORE
# The weights follow the gradients of whole losses; they cannot see which part of a gradient is drift. With five people of equal strength
# they stay near 1/5, and the reward is taken apart into the same shares.

of_more, weights = train_head(train, "more", options, seed=0)
m = world.decompose(test @ of_more.numpy(), test_pairs)
print(
    f"\nMORE: mean weights {weights.mean(0).round(3)}; shares: r* {m.shared_share:.2f}, drift {m.drift_share:.2f}, other {m.other_share:.2f}"
)

# %% What was claimed
assert np.abs(drifts.sum(0)).max() < 1e-12 and np.abs(drifts @ shared).max() < 1e-9
assert abs(d.shared - d.drift[0]) < 0.4 and abs(d.shared - 2) < 0.4  # r* + drift, as they are
assert (
    0.35 < d.drift_share < 0.65 and e.drift_share < 0.05
)  # half of Ana's reward is drift, hardly any of everyone's
assert e.shared < d.shared  # smaller margins
assert np.mean(found["own"]) > np.mean(found["all"]) + 0.03  # and a price
assert np.allclose(found["all"], single, atol=0.03)  # which is as low as it can be
assert np.allclose(weights.mean(0), 0.2, atol=0.05) and abs(m.drift_share - e.drift_share) < 0.05

# %% Two exercises
# Exercise 1. Make Eve far less decisive than the others (`decisiveness=(2.0, 2.0, 2.0, 2.0, 0.2)`). Do the drifts still cancel in everyone's model? Whose
#             is left, and why does `decompose` refuse a world in which Eve wants the opposite (`reversed="eve"`)?
# Exercise 2. Give Ana ten times the pairs of the others and mix by `proportional` weights. How much of the mixture's reward is Ana's drift, and
#             which weights in Eq. 6 would have told you so beforehand?
