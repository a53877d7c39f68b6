"""Tutorial 4: one MORE step.

Question      What happens between a batch of pairs from several sources and the gradient that the
              optimizer receives?
You will see  every tensor of one training step, with its shape and its numbers; the same step from
              halves of the batch; and what a step along the shortest gradient promises.
Takes         about 4 seconds on a laptop CPU. Nothing is downloaded.
"""

import math
import tempfile
from pathlib import Path

import torch

from minimore import (
    ModelOptions,
    bradley_terry_losses,
    head_gradients,
    load_source,
    min_norm_weights,
    open_reward_model,
    pack_pairs,
    weighted_loss,
)
from minimore.data.world import World
from minimore.more import more_loss, normalize_gradients

torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)

# %% Three annotators and a small model
# The annotators of this synthetic world share part of their taste; 60% is each one's own. Each of
# them labels 8 pairs, which are written to files as real data would be. The model is a GPT-NeoX of
# width 64 with random weights and a random head.

world = World(annotators=("ana", "ben", "cleo"), conflict=0.6, train_pairs=(8,), test_pairs=1)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    paths = world.write(folder)
    model, checkpoint = open_reward_model(ModelOptions(model=str(folder / "model"), device="cpu"))
    sources = [
        load_source(name, str(train_path), checkpoint.tokenizer, max_length=64)
        for name, (train_path, _) in paths.items()
    ]

# %% The batch: K = 3 sources, B = 12 pairs, one of each source in turn
# The pairs are one stream of N tokens without padding, with 24 places where a reward is read.
# `source` says whose each pair is.

order = [(k, i) for i in range(4) for k in range(3)]
pairs = [sources[k].pairs[i] for k, i in order]
batch = pack_pairs(pairs, [k for k, _ in order])
stream = batch.stream
print(f"tokens ({len(stream.tokens)},), read at {len(stream.last)} places")
print("source (12,):", batch.source.tolist())

# %% Forward: hidden states, margins, losses
#
#     m_b = w · (z_chosen_b - z_rejected_b)        L_k = -mean over b in k of log σ(m_b)  (Eq. 1)
#
# The hidden states are (B, D) = (12, 64) on either side. The model knows nothing, so its margins
# have both signs. Its random head has strong opinions all the same, so every source's loss is above
# log 2 = .69, the price of having none.

z_chosen, z_rejected = model.features(batch)
margins = ((z_chosen - z_rejected) @ model.head).detach()
losses = bradley_terry_losses(model.head, z_chosen, z_rejected, batch.source)  # Eq. 1
print("\nz_chosen", tuple(z_chosen.shape), "begins", z_chosen[0, :5].detach())
print("margins (12,):", margins)
print("losses (3,):", losses.detach())

# %% The head gradients, without a backward pass
#
#     g_k = -mean over b in k of σ(-m_b) (z_chosen_b - z_rejected_b)                      (Eq. 8)
#
# One row a source: (K, D) = (3, 64). The cosines say who agrees with whom. All are within .2 of 0:
# the mean of four pairs in 64 dimensions is mostly chance. On more pairs the shared taste shows,
# and so does the conflict (exercise 1).

gradients = head_gradients(model.head, z_chosen, z_rejected, batch.source)
units = normalize_gradients(gradients, losses.detach(), "l2")
cosines = units @ units.T
print("\ngradients", tuple(gradients.shape), "of lengths", gradients.norm(dim=1))
print("cosines\n", cosines)

# %% The weights
#
#     λ = argmin ||Σ_k λ_k g_k||    with λ_k >= 0 and Σ_k λ_k = 1
#
# Of raw gradients the shortest, ben's, gets the most weight. At equal lengths (l2, as in the
# authors' code) only angles count, and near right angles the weights are near 1/3. No gradient
# flows through the weights.

raw = min_norm_weights(gradients).float()
weights = min_norm_weights(units).float()
print("\nweights, raw gradients:", raw)
print("weights, after l2:     ", weights)

# %% The loss and the one backward pass
#
#     L = Σ_k λ_k L_k                                                                     (Eq. 7)
#
# It is an ordinary loss, and backward gives every parameter its gradient. For the head we know it
# already: weights @ gradients. Compare the two lines.

loss = weighted_loss(weights, losses)  # Eq. 7
loss.backward()
by_backward = model.head.grad.clone()
with_gradient = sum(p.grad is not None for p in model.parameters())
known = weights @ gradients
print(f"\nloss {loss:.4f}; {with_gradient} tensors of parameters have a gradient")
print("head, by backward:        ", by_backward[:5])
print("head, weights @ gradients:", known[:5])

# %% The library's step, and micro-batches
# `more_loss` does what you have just seen. In a training, `minimore.engine.plain.PlainEngine.step`
# does. If 12 pairs are too many for the memory, it takes them in parts. But the weights must see
# all 12 at once: weights that are solved in each half make another gradient, as the last line
# shows. So a first pass collects every z, the weights are solved, and a second pass carries the
# gradient down. (Tutorial 16 shows an engine that computes block by block: it has every z at hand
# when it needs the weights, and no pass is made for them.)

by_library, weights_by_library = more_loss(model.head, z_chosen, z_rejected, batch.source)
of_halves = []
for half in (slice(0, 6), slice(6, 12)):
    part = (model.head, z_chosen[half], z_rejected[half], batch.source[half])
    _, weights_of_half = more_loss(*part)
    of_halves.append(weights_of_half @ head_gradients(*part))
in_halves = sum(of_halves) / 2
distance = float((in_halves - known).norm() / known.norm())
print(f"\nloss by more_loss {by_library:.4f}")
print(f"weights solved in each half: a gradient of the head that is {distance:.0%} away")

# %% What the shortest gradient promises
# Let d be the shortest mean of the raw gradients. Tutorial 3 says g_k · d >= ||d||² for every
# source k, so a small step of the head against d lowers every loss by ||d||² or more per unit of
# step (less a little for curvature). Here all three have weight, so all losses fall alike, by 4.2.
#
# That is a promise about the head, these pairs, a small step, and weights without normalisation.
# With l2 the shortest mean is one of unit vectors, but the loss mixes the raw ones: a loud source
# can then still win over a quiet one. Lengths 3 and 1.4, 135 degrees apart, get 1/2 each, as any
# two sources do after l2, and the step raises the quiet one's loss (g_2 · d = -.5).

d, size = raw @ gradients, 1e-3
with torch.no_grad():
    after = bradley_terry_losses(model.head - size * d, z_chosen, z_rejected, batch.source)
change = (after - losses.detach()) / size
print(f"\n||d||² = {d @ d:.4f}; change of each loss per unit of step:", change)
loud = torch.tensor([[3.0, 0], [-1, 1]])
equal = min_norm_weights(normalize_gradients(loud, torch.ones(2), "l2")).float()
products = loud @ (equal @ loud)
print("loud and quiet: weights after l2", equal, "g_k · d", products)

# %% What was claimed
assert z_chosen.shape == z_rejected.shape == (12, 64)
assert losses.shape == (3,) and gradients.shape == (3, 64)
assert len(stream.last) == 24 and len(stream.tokens) == sum(pair.tokens for pair in pairs)
assert (margins > 0).any() and (margins < 0).any() and (losses > math.log(2)).all()
assert (cosines - torch.eye(3)).abs().max() < 0.2 and (weights - 1 / 3).abs().max() < 0.06
assert raw.argmax() == gradients.norm(dim=1).argmin() == 1 and not weights.requires_grad
assert torch.isclose(loss, weights @ losses)
assert torch.allclose(by_backward, known, atol=1e-5) and known.norm() > 1
assert torch.isclose(by_library, loss) and torch.allclose(weights_by_library, weights)
assert distance > 0.05
assert (gradients @ d >= d @ d - 1e-4).all()
assert torch.allclose(change, -(d @ d), rtol=0.01) and (change < 0).all()
assert torch.allclose(equal, torch.tensor([0.5, 0.5]))
assert torch.isclose(products[1], torch.tensor(-0.5))

# %% Two exercises
# Exercise 1. Give every annotator 400 pairs and put them all into one batch. Compare the cosines
#             for conflict 0, .6 and 1, and for `World(..., reversed="cleo")`. Then start from a
#             head of zeros: which agreement came from the head alone?
# Exercise 2. Take the small step with all parameters, not only the head: subtract size times the
#             gradient that `more_loss(..., normalize="none")` leaves in each `p.grad`. Which losses
#             fall, and by how much? Nothing is promised here; what makes it likely?
