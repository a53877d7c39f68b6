"""Tutorial 3: conflicting gradients.

Question      Several sources of preference pull the reward head in different directions. Which single step serves them all?
You will see  two gradients that agree and two that fight; the shortest vector between them, by formula, by trying every
              support, and by Frank-Wolfe; what lengths do to the weights; and what MORE can and cannot claim to minimise.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import torch

from minimore import frank_wolfe_weights, head_gradients, min_norm_weights
from minimore.more import normalize_gradients

torch.set_default_dtype(torch.float64)
torch.set_printoptions(precision=4, sci_mode=False)
generator = torch.Generator().manual_seed(4)

# %% Where the vectors come from
# Every source k has its own loss, and the gradient g_k of that loss with respect to the head is a vector. Here are two sources
# with one pair each, hidden states of width 2, and a head of zeros: both margins are 0, so g_k is half of z_rejected - z_chosen,
# (-1, 0) for the first source and (.5, -1) for the second.

z_chosen, z_rejected = torch.tensor([[2.0, 0], [0, 2]]), torch.tensor([[0.0, 0], [1, 0]])
from_pairs = head_gradients(
    torch.zeros(2), z_chosen, z_rejected, source=torch.tensor([0, 1])
)  # (K, D)
print("gradients of two sources:", from_pairs.tolist())

# A small step against d changes the loss of source k by -g_k . d per unit of step. Two gradients agree if g_1 . g_2 > 0: a step
# for one helps the other. They fight if it is negative, as here: -.5.

print(f"g_1 . g_2 = {from_pairs[0] @ from_pairs[1]:.2f}")

# The mean gradient need not serve everybody. Below, source 1 is loud and source 2 wants something else. A step against their
# mean, (1, .5), raises the loss of source 2, because g_2 . mean = -.5.

loud = torch.tensor([[3.0, 0], [-1, 1]])
print(f"mean gradient {loud.mean(0).tolist()}, g_2 . mean = {loud[1] @ loud.mean(0):.2f}")

# %% The shortest vector between two
# The weighted means of g_1 and g_2 form the line between their tips, and MORE takes the shortest of them. The weight of g_1 is
# w = clip((g_2 - g_1) . g_2 / ||g_1 - g_2||^2, 0, 1), that of g_2 is 1 - w: the foot of a perpendicular, or an end of the line.


def two_by_formula(G):
    w = ((G[1] - G[0]) @ G[1] / (G[0] - G[1]).square().sum()).clamp(0, 1)
    return torch.stack([w, 1 - w])


cases = {
    "at right angles": torch.tensor([[2.0, 0], [0, 1]]),  # .2 and .8: the shorter one weighs more
    "one far longer": torch.tensor([[3.0, 0], [1, 0.5]]),  # 0 and 1: an end of the line
    "loud and quiet": loud,  # 5/17 and 12/17
    "opposite": torch.tensor([[1.0, 0], [-3, 0]]),
}  # 3/4 and 1/4: the shortest vector is 0
for name, G in cases.items():
    print(f"{name:15} weights {two_by_formula(G)} shortest vector {two_by_formula(G) @ G}")

# Opposite gradients leave nothing: no step helps both sources, and MORE takes none. Otherwise the shortest vector d is fair in a
# precise sense: g_k . d >= ||d||^2 > 0 for every source, so a small step against d lowers every loss, the quiet one's too.

fair = min_norm_weights(loud) @ loud
print("loud and quiet: g_k . d =", loud @ fair, f"||d||^2 = {fair @ fair:.4f}")

# %% Many vectors: try every support
# With K sources some weights are 0, and the others solve a small linear system. Which are 0 is not known beforehand, but there
# are only 2^K - 1 choices, 31 for the paper's five sources. `min_norm_weights` tries them all and keeps the shortest result. Of
# the five gradients below two get no weight. The three that do have g_k . d = ||d||^2, the other two have more: d serves them
# anyway. And 10,000 random weightings find nothing shorter.

five = torch.randn(5, 8, generator=generator) + 0.5
weights = min_norm_weights(five)
d = weights @ five
others = torch.rand(10_000, 5, generator=generator) ** 3
others = others / others.sum(1, keepdim=True) @ five  # (10000, D)
print("weights of five sources", weights, "\n     g_k . d / ||d||^2 ", five @ d / (d @ d))
print(f"length {d.norm():.4f}, the best of 10,000 random weightings {others.norm(dim=1).min():.4f}")

# %% Many vectors: Frank-Wolfe
# The paper iterates instead: find the source that the present d serves least (smallest g_k . d), move the weights towards it for
# as long as d gets shorter, repeat. It can zigzag: here d is still too long by about .3, .06, .01 and .002 after 1, 10, 100 and
# 1,000 iterations. minimore solves exactly, and so has no tolerance to choose.

iterations = [1, 10, 100, 1000]
excess = [
    float((frank_wolfe_weights(five, n, tolerance=0.0) @ five).norm() - d.norm())
    for n in iterations
]
print(
    "Frank-Wolfe, too long by:", ", ".join(f"{e:.4f} after {n}" for n, e in zip(iterations, excess))
)

# %% What lengths do
# Five gradients at right angles, of lengths 1, .5, .3, .1 and .02. The weights go with 1 / length^2, 1 : 4 : 11.1 : 100 : 2500,
# and the shortest takes almost everything, .956. A source with a small gradient, for whatever reason, would rule the step.

lengths = torch.tensor([1, 0.5, 0.3, 0.1, 0.02])
by_length = min_norm_weights(lengths.diag())
print("weights for lengths 1 to .02:", by_length)

# So the authors' code first divides each gradient by its length (l2). Random directions in 2048 dimensions are nearly at right
# angles, and then little is left to decide: all weights are within .02 of 1/5, close to plain uniform weights.

wide = lengths[:, None] * torch.randn(5, 2048, generator=generator)
by_direction = min_norm_weights(normalize_gradients(wide, torch.ones(5), "l2"))
print("the same after l2:           ", by_direction)

# What l2 leaves is the angles. Of three sources let two be the same: the twins get 1/2 together, where uniform weights give 2/3.

twins = min_norm_weights(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
print(f"twins together {twins[:2].sum():.4f}, the third {twins[2]:.4f}")

# A zero gradient takes all the weight, and the step vanishes. A source of label ties, read as gradients of zero, would do just
# that; minimore leaves label ties out.

with_zero = min_norm_weights(torch.tensor([[1.0, 2], [0, 0], [3, 1]]))
print("weights beside a zero gradient:", with_zero)

# %% What is minimised, honestly
# The paper splits a reward into a part shared by all sources and each source's drift, and wants the drift's gradient short. But
# drift is not observed; what the weights minimise is the whole gradient. In a world where we know, let coordinate 1 be shared and
# the other two be drift, which cancels at weights of 1/3. If all sources have the same shared part, the two aims agree: 1/3 each.
# If the third has less of it, .3, the weights lean to the third: the shared part of the step falls from .77 to .63, and .29 of
# drift remains where uniform weights leave none.

drift = torch.tensor([[0, 1, 0], [0, -0.5, 0.75**0.5], [0, -0.5, -(0.75**0.5)]])
alike, unlike = (
    drift + torch.tensor([1.0, 0, 0]),
    drift + torch.tensor([[1, 0, 0], [1, 0, 0], [0.3, 0, 0]]),
)
agree, lean = min_norm_weights(alike), min_norm_weights(unlike)
more, uniform = lean @ unlike, unlike.mean(0)
print("weights, shared part the same:", agree, "\nweights, the third has less:  ", lean)
print(
    f"the third has less: MORE keeps {more[0]:.2f} shared and {more[1:].norm():.2f} drift, "
    f"uniform {uniform[0]:.2f} shared and {uniform[1:].norm():.2f} drift"
)

# %% What was claimed
close = lambda a, *b, atol=1e-9: torch.allclose(a, torch.tensor(b, dtype=a.dtype), atol=atol)
assert from_pairs.tolist() == [[-1, 0], [0.5, -1]] and from_pairs[0] @ from_pairs[1] == -0.5
assert loud.mean(0).tolist() == [1, 0.5] and loud[1] @ loud.mean(0) == -0.5
for G, expected in zip(cases.values(), [(0.2, 0.8), (0, 1), (5 / 17, 12 / 17), (3 / 4, 1 / 4)]):
    assert close(two_by_formula(G), *expected) and close(min_norm_weights(G), *expected)
assert (loud @ fair >= fair @ fair - 1e-9).all() and fair @ fair > 0.5
assert (min_norm_weights(cases["opposite"]) @ cases["opposite"]).norm() < 1e-9
assert (
    (weights == 0).sum() == 2
    and torch.allclose((five @ d)[weights > 0], d @ d)
    and ((five @ d)[weights == 0] > d @ d).all()
)
assert (others.norm(dim=1) > d.norm()).all()
assert all(abs(e / told - 1) < 0.5 for e, told in zip(excess, (0.3, 0.06, 0.01, 0.002)))
assert close(by_length, *(lengths**-2 / (lengths**-2).sum())) and close(
    by_length[4], 0.956, atol=5e-4
)
assert (by_direction - 1 / 5).abs().max() < 0.02 and min_norm_weights(wide)[4] > 0.9
assert close(twins[2], 0.5) and close(twins[:2].sum(), 0.5) and with_zero.tolist() == [0, 1, 0]
assert close(agree, 1 / 3, 1 / 3, 1 / 3) and uniform[1:].norm() < 1e-9
assert close(torch.stack([uniform[0], more[0], more[1:].norm()]), 0.77, 0.63, 0.29, atol=5e-3)

# %% Two exercises
# Exercise 1. Take five gradients of length 1 at right angles, and turn the fifth, degree by degree, towards minus the sum of the
#             other four. How does its weight grow? What is it when the shortest vector becomes 0, and why that number?
# Exercise 2. Multiply one row of `five` by 1,000, and by 1/1,000. Predict its weight before you look, without l2 and with it.
