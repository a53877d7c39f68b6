"""Tutorial 3: conflicting gradients.

Question      Several sources of preference pull the reward head in different directions. Which
              single step serves them all?
You will see  two gradients that agree and two that fight; the shortest vector between them, by
              formula, by trying every support, and by Frank-Wolfe; what lengths do to the weights;
              and what MORE can and cannot claim to minimise.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import torch

from minimore import frank_wolfe_weights, head_gradients, min_norm_weights
from minimore.more import normalize_gradients

torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=4, sci_mode=False)
generator = torch.Generator().manual_seed(4)

# %% Where the vectors come from
# Every source k has its own loss, and the gradient g_k of that loss with respect to the head is a
# vector. Here are two sources with one pair each, hidden states of width 2, and a head of zeros.
# Both margins are 0, so g_k is half of z_rejected - z_chosen: (-1, 0) for the first source and
# (.5, -1) for the second.

z_chosen, z_rejected = torch.tensor([[2.0, 0], [0, 2]]), torch.tensor([[0.0, 0], [1, 0]])
source = torch.tensor([0, 1])
from_pairs = head_gradients(torch.zeros(2), z_chosen, z_rejected, source)  # (K, D)
print("gradients of two sources:", from_pairs.tolist())

# %% Two gradients agree or fight
# A small step against d changes the loss of source k by -g_k · d per unit of step. Two gradients
# agree if g_1 · g_2 > 0: a step for one helps the other. They fight if it is negative, as here:
# -.5.

print(f"g_1 · g_2 = {from_pairs[0] @ from_pairs[1]:.2f}")

# %% The mean gradient need not serve everybody
# Below, source 1 is loud and source 2 wants something else. A step against their mean, (1, .5),
# raises the loss of source 2, because g_2 · mean = -.5.

loud = torch.tensor([[3.0, 0], [-1, 1]])
mean = loud.mean(0)
print(f"\nmean gradient {mean.tolist()}, g_2 · mean = {loud[1] @ mean:.2f}")

# %% The shortest vector between two
# The weighted means of g_1 and g_2 form the line between their tips, and MORE takes the shortest of
# them. It is the foot of a perpendicular, or an end of the line:
#
#     w = clip((g_2 - g_1) · g_2 / ||g_1 - g_2||², 0, 1)     for g_1, and 1 - w for g_2


def weights_of_two(G):
    """The weights of the shortest vector between two rows, by the formula above: (2,)."""
    w = ((G[1] - G[0]) @ G[1] / (G[0] - G[1]).square().sum()).clamp(0, 1)
    return torch.stack([w, 1 - w])


# The weights that you will see: .2 and .8 at right angles, where the shorter one weighs more; 0 and
# 1, an end of the line, where one is far longer; 5/17 and 12/17; and 3/4 and 1/4 for opposite ones,
# whose shortest vector is 0.

cases = {
    "at right angles": torch.tensor([[2.0, 0], [0, 1]]),
    "one far longer": torch.tensor([[3.0, 0], [1, 0.5]]),
    "loud and quiet": loud,
    "opposite": torch.tensor([[1.0, 0], [-3, 0]]),
}
for name, G in cases.items():
    w = weights_of_two(G)
    print(f"{name:15} weights {w} shortest vector {w @ G}")

# %% The shortest vector is fair
# Opposite gradients leave nothing: no step helps both sources, and MORE takes none. Otherwise the
# shortest vector d is fair in a precise sense:
#
#     g_k · d >= ||d||² > 0     for every source k
#
# so a small step against d lowers every loss, the quiet one's, too.

fair = min_norm_weights(loud) @ loud
print("\nloud and quiet: g_k · d =", loud @ fair, f"||d||² = {fair @ fair:.4f}")

# %% Many vectors: try every support
# With K sources some weights are 0, and the others solve a small linear system. Which are 0 is not
# known beforehand, but there are only 2^K - 1 choices: 31 for the paper's five sources.
# `min_norm_weights` tries them all and keeps the shortest result. Of the five gradients below two
# get no weight. The three that do have g_k · d = ||d||², and the other two have more: d serves them
# anyway. And 10,000 random weightings find nothing shorter.

five = torch.randn(5, 8, generator=generator) + 0.5
weights = min_norm_weights(five)
d = weights @ five
random_weights = torch.rand(10_000, 5, generator=generator) ** 3
random_weights = random_weights / random_weights.sum(1, keepdim=True)
random_lengths = (random_weights @ five).norm(dim=1)  # (10000,)
print("\nweights of five sources", weights)
print("    g_k · d / ||d||²   ", five @ d / (d @ d))
print(f"length {d.norm():.4f}, the best of 10,000 random weightings {random_lengths.min():.4f}")

# %% Many vectors: Frank-Wolfe
# The paper iterates instead: find the source that the present d serves least (smallest g_k · d),
# move the weights towards it for as long as d gets shorter, repeat. It can zigzag: here d is still
# too long by about .3, .06, .01 and .002 after 1, 10, 100 and 1,000 iterations. minimore solves
# exactly, and so has no tolerance to choose.

excess = {}
for iterations in (1, 10, 100, 1000):
    approximate = frank_wolfe_weights(five, iterations, tolerance=0.0) @ five
    excess[iterations] = float(approximate.norm() - d.norm())
    print(f"Frank-Wolfe after {iterations:4d}: too long by {excess[iterations]:.4f}")

# %% What lengths do
# Take five gradients at right angles, of lengths 1, .5, .3, .1 and .02. The weights go with 1 /
# length²: 1 : 4 : 11.1 : 100 : 2500. The shortest takes almost everything, .956. A source with a
# small gradient, for whatever reason, would rule the step.

lengths = torch.tensor([1, 0.5, 0.3, 0.1, 0.02])
by_length = min_norm_weights(lengths.diag())
print("\nweights for lengths 1 to .02:", by_length)

# %% What l2 does
# So the authors' code first divides each gradient by its length (l2). Random directions in 2048
# dimensions are nearly at right angles, and then little is left to decide: all weights are within
# .02 of 1/5, close to plain uniform weights.

wide = lengths[:, None] * torch.randn(5, 2048, generator=generator)
by_direction = min_norm_weights(normalize_gradients(wide, torch.ones(5), "l2"))
print("the same after l2:           ", by_direction)

# What l2 leaves is the angles. Of three sources let two be the same: the twins get 1/2 together,
# where uniform weights give them 2/3.

twins = min_norm_weights(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
print(f"twins together {twins[:2].sum():.4f}, the third {twins[2]:.4f}")

# %% A zero gradient
# It takes all the weight, and the step vanishes. A source of label ties, read as gradients of zero,
# would do just that. minimore leaves label ties out.

with_zero = min_norm_weights(torch.tensor([[1.0, 2], [0, 0], [3, 1]]))
print("weights beside a zero gradient:", with_zero)

# %% What is minimised, honestly
# The paper splits a reward into a part that all sources share and each source's drift, and wants
# the drift's gradient short. But drift is not observed: the weights minimise the whole gradient.
# Take a world where we know. Let coordinate 1 be shared and the other two be drift, which cancels
# at weights of 1/3. If all sources have the same shared part, the two aims agree: 1/3 each.

drift = torch.tensor([[0, 1, 0], [0, -0.5, 0.75**0.5], [0, -0.5, -(0.75**0.5)]])
same_shared = drift + torch.tensor([1.0, 0, 0])
weights_same = min_norm_weights(same_shared)
print("\nweights, shared part the same:", weights_same)

# If the third source has less of it, .3, the weights lean to the third. The shared part of the step
# falls from .77 to .63, and .29 of drift remains where uniform weights leave none.

less_shared = drift + torch.tensor([[1, 0, 0], [1, 0, 0], [0.3, 0, 0]])
weights_less = min_norm_weights(less_shared)
by_more, by_uniform = weights_less @ less_shared, less_shared.mean(0)
print("weights, the third has less:  ", weights_less)
for method, step in (("MORE", by_more), ("uniform", by_uniform)):
    print(f"    {method:7} keeps {step[0]:.2f} shared and {step[1:].norm():.2f} drift")


# %% What was claimed
def is_close(a, *expected, atol=1e-9):
    """Whether a tensor has these values."""
    return torch.allclose(a, torch.tensor(expected, dtype=a.dtype), atol=atol)


assert from_pairs.tolist() == [[-1, 0], [0.5, -1]] and from_pairs[0] @ from_pairs[1] == -0.5
assert mean.tolist() == [1, 0.5] and loud[1] @ mean == -0.5
expected_weights = [(0.2, 0.8), (0, 1), (5 / 17, 12 / 17), (3 / 4, 1 / 4)]
for G, expected in zip(cases.values(), expected_weights):
    assert is_close(weights_of_two(G), *expected) and is_close(min_norm_weights(G), *expected)
assert (loud @ fair >= fair @ fair - 1e-9).all() and fair @ fair > 0.5
assert (min_norm_weights(cases["opposite"]) @ cases["opposite"]).norm() < 1e-9
has_weight = weights > 0
assert (~has_weight).sum() == 2
assert torch.allclose((five @ d)[has_weight], d @ d) and ((five @ d)[~has_weight] > d @ d).all()
assert (random_lengths > d.norm()).all()
for value, claimed in zip(excess.values(), (0.3, 0.06, 0.01, 0.002)):
    assert abs(value / claimed - 1) < 0.5
assert is_close(by_length, *(lengths**-2 / (lengths**-2).sum()))
assert is_close(by_length[4], 0.956, atol=5e-4)
assert (by_direction - 1 / 5).abs().max() < 0.02 and min_norm_weights(wide)[4] > 0.9
assert is_close(twins[2], 0.5) and is_close(twins[:2].sum(), 0.5)
assert with_zero.tolist() == [0, 1, 0]
assert is_close(weights_same, 1 / 3, 1 / 3, 1 / 3) and by_uniform[1:].norm() < 1e-9
kept_parts = torch.stack([by_uniform[0], by_more[0], by_more[1:].norm()])
assert is_close(kept_parts, 0.77, 0.63, 0.29, atol=5e-3)

# %% Two exercises
# Exercise 1. Take five gradients of length 1 at right angles, and turn the fifth, degree by degree,
#             towards minus the sum of the other four. How does its weight grow? What is it when the
#             shortest vector becomes 0, and why that number?
# Exercise 2. Multiply one row of `five` by 1,000, and by 1/1,000. Predict its weight before you
#             look, without l2 and with it.
