"""Tutorial 1: one preference by hand.

Question      How does one human judgement, "this response is better than that one", become a number
              to minimise?
You will see  two texts become one stream of tokens with the prompt stored once; then two rewards, a
              margin, a probability and a loss; then the gradient of that loss from a formula that
              needs no backward pass.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

from minimore import (
    ModelOptions,
    bradley_terry_losses,
    head_gradients,
    load_source,
    open_reward_model,
    pack_pairs,
    pair_losses,
)
from minimore.data.world import small_gpt_neox, train_tokenizer
from minimore.figures.sketch import show_curves
from minimore.model.checkpoint import random_checkpoint

# %% Two judgements on paper
# In the first, somebody preferred one response: this is a pair. In the second, both responses got
# the same score. This label tie does not say which one is better: there is nothing to learn from.

prompt = "\n\nHuman: 2 + 2?\n\nAssistant:"
judgements = [
    {"prompt": prompt, "chosen": " It is 4.", "rejected": " It is five!"},
    {"text": [prompt + " Four.", prompt + " 4."], "score": [1.0, 1.0]},
]

# %% A model small enough to count in
# A vocabulary of 258 leaves the tokenizer no room beyond the 256 bytes and two special tokens, so
# one letter is one token. The weights are random, so the model's opinions are worthless, but what
# it computes is what a model of 7 billion parameters computes.

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    pairs_file, tokenizer_file = folder / "pairs.jsonl", folder / "tokenizer.json"
    pairs_file.write_text("".join(json.dumps(judgement) + "\n" for judgement in judgements))
    train_tokenizer([prompt], tokenizer_file, vocabulary=258)
    shape = small_gpt_neox(width=16, heads=2, vocabulary=258)
    random_checkpoint(folder / "model", shape, tokenizer_file, seed=2, std=0.5)
    model, checkpoint = open_reward_model(ModelOptions(model=str(folder / "model"), device="cpu"))
    source = load_source("sums", str(pairs_file), checkpoint.tokenizer, max_length=512)

print(source.line())

# %% From texts to one stream
# Prompt and response are read as one text. The two texts of the pair begin alike, and for longer
# than the prompt: 27 tokens of prompt and 7 of " It is " make 34. These are stored once. What is
# left of each response follows: 2 tokens of the chosen one and 5 of the rejected one.

batch = pack_pairs(source.pairs)
stream = batch.stream
tokens = stream.tokens.tolist()
decode = checkpoint.tokenizer.file.decode
shared_text, chosen_ending, rejected_ending = map(decode, (tokens[:34], tokens[34:36], tokens[36:]))
print(f"\nshared {shared_text!r}\nchosen {chosen_ending!r}, rejected {rejected_ending!r}")

# %% Positions
# Both endings follow directly on the shared part, so both count on from 34: first 34 35, then 34 35
# 36 37 38. Each ending sees the shared part and itself, but never the other ending. The reward of a
# text is read at its last token, which is at places 35 and 40 of the stream. The stream has 41
# tokens; the two texts apart have 75.

positions = stream.positions.tolist()
print("\npositions from place 32:", positions[32:])
print("rewards are read at places", stream.last.tolist())
apart = pack_pairs(source.pairs, share=False).stream
print(f"tokens in the stream {len(tokens)}, of two texts apart {len(apart.tokens)}")

# %% Two rewards
# The trunk turns each text into one vector z of width D = 16, its last hidden state. The reward is
# the product of z with one more vector w, the head:
#
#     r = w · z
#
# This model prefers the wrong sum.

z_chosen, z_rejected = model.features(batch)  # (1, 16) each
reward_chosen = (z_chosen @ model.head).detach()[0]
reward_rejected = (z_rejected @ model.head).detach()[0]
print(f"\nrewards: chosen {reward_chosen:.4f}, rejected {reward_rejected:.4f}")

# %% Sharing the prompt is exact
# A token of a causal model never sees what comes after it, so the prompt's hidden states are the
# same whichever response follows. Only rounding may differ, by at most some 1e-6. A model whose
# tokens saw later ones, or whose positions depended on a text's length, could not share. And texts
# that are cut on the left may begin differently, and share nothing.

with torch.no_grad():
    gap = (model.rewards(stream) - model.rewards(apart)).abs().max().item()
print(f"shared against apart: the rewards differ by {gap:.0e}")

# %% The margin and the probability
# Bradley and Terry (1952) take exp(reward) as the strength of a response. With the margin m, the
# chosen reward minus the rejected one, the chosen response wins with probability
#
#     exp(r_chosen) / (exp(r_chosen) + exp(r_rejected)) = σ(m) = 1 / (1 + exp(-m))
#
# Here the margin is about -.95 and the probability .28. Only the difference of the rewards counts.

margin = reward_chosen - reward_rejected
probability = torch.sigmoid(margin)
print(f"\nmargin {margin:.4f}, probability {probability:.4f}")

# %% The loss
# The loss is minus the logarithm of that probability:
#
#     L = -log σ(r_chosen - r_rejected)                                                     (Eq. 1)
#
# Here it is about 1.28.

losses = bradley_terry_losses(model.head, z_chosen, z_rejected, batch.source)  # one per source
loss = losses[0]
print(f"loss {loss:.4f}")

# A margin of 2 in the right direction costs .127, a margin of 0 costs log 2 = .693, and a margin of
# 2 in the wrong direction costs 2.127. Beside the loss the picture shows how hard a pair pushes.

several = torch.linspace(-4, 4, 33)
lines = {"loss": (several, pair_losses(several)), "σ(-m)": (several, torch.sigmoid(-several))}
show_curves("01_loss", "The loss of a pair, and how hard it pushes", "margin m", "nats", lines)
landmarks = pair_losses(torch.tensor([2.0, 0.0, -2.0]))

# %% The gradient without a backward pass
# The head w enters the loss only through w · (z_chosen - z_rejected). So its gradient is
#
#     ∂L/∂w = -σ(-margin) (z_chosen - z_rejected)                                           (Eq. 8)
#
# This is a direction times a strength, and the strength is the probability of being wrong: a pair
# that is learned hardly pushes any more. Compare the two lines.

by_formula = head_gradients(model.head, z_chosen, z_rejected, batch.source)[0]  # (16,)
(by_autograd,) = torch.autograd.grad(loss, model.head)
print("\ngradient, first 4 of 16, by formula: ", by_formula[:4])
print("                         by autograd:", by_autograd[:4])

# %% One step of the head
# A step of size .1 against this gradient raises the margin by
#
#     .1 σ(-margin) ||z_chosen - z_rejected||²
#
# which is about 1.26 here: this one pair is now right.

size = 0.1
difference = (z_chosen - z_rejected)[0].detach()
predicted_rise = size * torch.sigmoid(-margin) * (difference @ difference)
margin_after = (model.head.detach() - size * by_formula) @ difference
rise = margin_after - margin
print(f"\nthe step raised the margin by {rise:.4f}, predicted {predicted_rise:.4f}")

# %% What was claimed
assert (len(source.pairs), source.label_ties) == (1, 1)
assert (shared_text, chosen_ending, rejected_ending) == (prompt + " It is ", "4.", "five!")
assert positions == [*range(34), 34, 35, 34, 35, 36, 37, 38]
assert stream.last.tolist() == [35, 40]
assert (len(tokens), len(apart.tokens)) == (41, 75) and gap < 1e-5
assert torch.isclose(loss, -torch.log(probability)) and probability < 0.5
assert torch.allclose(landmarks, torch.tensor([0.127, math.log(2), 2.127]), atol=5e-4)
assert torch.allclose(by_formula, by_autograd, atol=1e-6) and by_formula.norm() > 1
assert torch.isclose(rise, predicted_rise, rtol=1e-4) and margin_after > 0

# %% Two exercises
# Exercise 1. Swap "chosen" and "rejected" in the file. Which printed numbers change their sign,
#             which change places, and which stay? What is the sum of the two probabilities, before
#             and after the swap?
# Exercise 2. Let the positions count on from the chosen ending into the rejected one: take
#             `dataclasses.replace(stream, positions=torch.arange(len(tokens)))`. Which of the two
#             rewards comes out wrong, and why not the other?
