"""Tutorial 3: conflicting gradients.

Question      Several sources of preference pull the reward head in different directions. Which
              single step serves them all?
You will see  two gradients that agree and two that fight; the problem that the weights of MORE
              solve, its constraints, and the condition by which a solution is recognised; what
              lengths do to the weights; and what MORE can and cannot claim to minimise.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import numpy as np
import torch

from minimore import frank_wolfe_weights, min_norm_weights
from minimore.figures.sketch import show_curves
from minimore.more import normalize_gradients
from minimore.tables import Table

torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=4, sci_mode=False)
generator = torch.Generator().manual_seed(4)

# %% Two gradients agree or fight
# The gradient g_k of source k's loss with respect to the head is a vector (tutorial 1). A small
# step against a vector d changes that loss by -g_k · d per unit of step. Two gradients agree if g_1
# · g_2 > 0: a step for one helps the other. The two below fight, and source 1 is loud: a step
# against the mean, (1, .5), raises the loss of source 2, because g_2 · mean = -.5.

loud = torch.tensor([[3.0, 0], [-1, 1]])
mean = loud.mean(0)
print(f"g_1 · g_2 = {loud[0] @ loud[1]:.2f}, g_2 · mean = {loud[1] @ mean:.2f}\n")

# %% The shortest vector between two
# The weighted means of g_1 and g_2 form the line between their tips, and MORE takes the shortest of
# them. It is the foot of a perpendicular, or an end of the line:
#
#     λ_1 = clip((g_2 - g_1) · g_2 / ||g_1 - g_2||², 0, 1),     λ_2 = 1 - λ_1


def weights_of_two(G):
    """The weights of the shortest vector between two rows, by the formula above: (2,)."""
    first = ((G[1] - G[0]) @ G[1] / (G[0] - G[1]).square().sum()).clamp(0, 1)
    return torch.stack([first, 1 - first])


cases = {
    "at right angles": torch.tensor([[2.0, 0], [0, 1]]),
    "one far longer": torch.tensor([[3.0, 0], [1, 0.5]]),
    "loud and quiet": loud,
    "opposite": torch.tensor([[1.0, 0], [-3, 0]]),
}
# %% The problem, and how a solution is recognised
# With K sources the weights λ solve a quadratic problem with constraints,
#
#     minimise   ||d||²,  d = Σ_k λ_k g_k,     such that  λ_k >= 0  and  Σ_k λ_k = 1
#
# Weights are optimal if and only if no source can take more of the weight and shorten d:
#
#     g_k · d >= ||d||²     for every k,     and  g_k · d = ||d||²  wherever  λ_k > 0
#
# Why: moving a little weight ε to source k changes ||d||² by 2 ε (g_k · d - ||d||²), which must not
# be negative. Where λ_k > 0 weight can also be moved away, so it must be 0. The condition says
# besides that d is fair: a small step against it lowers every loss, the quiet one's, too. Opposite
# gradients leave d = 0: no step helps both sources, and MORE takes none.


def is_optimal(weights, G, atol=1e-9):
    """Whether weights are feasible, and no source can take more of them and shorten d."""
    slack = G @ (weights @ G) - (weights @ G).square().sum()  # (K,)
    is_feasible = (weights >= 0).all() and (weights.sum() - 1).abs() < atol
    return bool(is_feasible and (slack > -atol).all() and (slack[weights > 0].abs() < atol).all())


table = Table("two gradients", "weights", "g_k · d", "||d||²")
for name, G in cases.items():
    weights = min_norm_weights(G)
    d = weights @ G
    table.add(name, weights.numpy().round(3), (G @ d).numpy().round(3) + 0.0, f"{d @ d:.3f}")
print(table)
uniform_is_optimal = is_optimal(torch.tensor([0.5, 0.5]), loud)
print(f"uniform weights are optimal for loud and quiet: {uniform_is_optimal}")

# %% Many vectors: try every support
# With K sources some weights are 0, and the others solve a small linear system. Which are 0 is not
# known beforehand, but there are only 2^K - 1 choices: 31 for the paper's five sources.
# `min_norm_weights` tries them all and keeps the shortest result. Of the five gradients below three
# get weight, and for these g_k · d / ||d||² is 1. For the two without weight it is more.

five = torch.randn(5, 8, generator=generator) + 0.5
weights = min_norm_weights(five)
d = weights @ five
print("\nweights of five sources", weights)
print("    g_k · d / ||d||²   ", five @ d / (d @ d))

# %% Many vectors: Frank-Wolfe
# The paper iterates instead: find the source that d serves least (smallest g_k · d), move the
# weights towards it while d gets shorter, repeat. After 1, 10, 100 and 1,000 iterations d is still
# too long by .35, .06, .01 and .002, because the path zigzags. minimore solves exactly.

excess = {}
for iterations in (1, 3, 10, 30, 100, 300, 1000):
    approximate = frank_wolfe_weights(five, iterations, tolerance=0.0) @ five
    excess[iterations] = float(approximate.norm() - d.norm())
powers = np.log10([list(excess), list(excess.values())])
show_curves(
    *("03_frank_wolfe", "Frank-Wolfe: how much too long d is", "log10 iterations", "log10 excess"),
    {"excess": (powers[0], powers[1])},
)

# %% What lengths do, and l2
# Take five gradients at right angles, of lengths 1, .5, .3, .1 and .02. The weights go with 1 /
# length², and the shortest takes almost everything, .956: a source with a small gradient would rule
# the step. So the authors' code first divides each gradient by its length (l2). Then only angles
# count: at right angles all get 1/5. Two sources get 1/2 each at any angle, since the shortest mean
# of two unit vectors is their midpoint. But d is no longer fair: raw losses are mixed (tutorial 4).

lengths = torch.tensor([1, 0.5, 0.3, 0.1, 0.02])
by_length = min_norm_weights(lengths.diag())
print("\nweights for lengths 1 to .02:", by_length)
by_direction = min_norm_weights(normalize_gradients(lengths.diag(), torch.ones(5), "l2"))
print("the same after l2:           ", by_direction)

# A zero gradient takes all the weight, with l2 as without, and the step vanishes. A source of label
# ties, read as gradients of zero, would do just that. minimore leaves label ties out.

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

# If the third source has less of it, .3, the weights lean to it: of the step .63 is shared and .29
# drift, where uniform weights keep .77 and leave no drift.

less_shared = drift + torch.tensor([[1, 0, 0], [1, 0, 0], [0.3, 0, 0]])
weights_less = min_norm_weights(less_shared)
by_more, by_uniform = weights_less @ less_shared, less_shared.mean(0)
print("weights, the third has less:  ", weights_less)
print(f"MORE keeps {by_more[0]:.2f} shared, {by_more[1:].norm():.2f} drift", end="; ")
print(f"uniform {by_uniform[0]:.2f} and {by_uniform[1:].norm():.2f}")


# %% What was claimed
def is_close(a, *expected, atol=1e-9):
    """Whether a tensor has these values."""
    return torch.allclose(a, torch.tensor(expected, dtype=a.dtype), atol=atol)


assert mean.tolist() == [1, 0.5] and loud[1] @ mean == -0.5
expected_weights = [(0.2, 0.8), (0, 1), (5 / 17, 12 / 17), (3 / 4, 1 / 4)]
for G, expected in zip(cases.values(), expected_weights):
    assert is_close(weights_of_two(G), *expected) and is_close(min_norm_weights(G), *expected)
    assert is_optimal(min_norm_weights(G), G)
assert not uniform_is_optimal and is_optimal(weights, five)
assert (min_norm_weights(cases["opposite"]) @ cases["opposite"]).norm() < 1e-9
assert (weights == 0).sum() == 2 and ((five @ d)[weights == 0] > 1.05 * (d @ d)).all()
for iterations, claimed in {1: 0.35, 10: 0.06, 100: 0.01, 1000: 0.002}.items():
    assert abs(excess[iterations] / claimed - 1) < 0.25
assert is_close(by_length, *(lengths**-2 / (lengths**-2).sum()))
assert is_close(by_length[4], 0.956, atol=5e-4)
assert torch.allclose(by_direction, torch.tensor(1 / 5)) and with_zero.tolist() == [0, 1, 0]
assert is_close(min_norm_weights(normalize_gradients(loud, torch.ones(2), "l2")), 0.5, 0.5)
assert is_close(weights_same, 1 / 3, 1 / 3, 1 / 3) and by_uniform[1:].norm() < 1e-9
kept_parts = torch.stack([by_uniform[0], by_more[0], by_more[1:].norm()])
assert is_close(kept_parts, 0.77, 0.63, 0.29, atol=5e-3)

# %% Two exercises
# Exercise 1. Take five gradients of length 1 at right angles, and turn the fifth, degree by degree,
#             towards minus the sum of the other four. How does its weight grow? What is it when the
#             shortest vector becomes 0, and why that number?
# Exercise 2. Multiply one row of `five` by 1,000, and by 1/1,000. Predict its weight before you
#             look, without l2 and with it.
