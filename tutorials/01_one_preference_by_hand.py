"""Tutorial 1: one preference by hand.

Question      How does one human judgement, "this response is better than that one", become a number
              to minimise?
You will see  two texts become one stream of tokens with the prompt stored once; then two rewards, a
              margin, a probability and a loss; then the gradient of that loss from a formula that
              needs no backward pass.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import copy
import dataclasses
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
    text_rewards,
)
from minimore.calibration import accuracy
from minimore.data.world import small_gpt_neox, train_tokenizer
from minimore.model.checkpoint import random_checkpoint

# %% Two judgements on paper
# In the first, somebody preferred one response: this is a pair. In the second, both responses got
# the same score: this is a label tie. It does not say which response is better, so there is nothing
# to learn from it.

prompt = "\n\nHuman: 2 + 2?\n\nAssistant:"
judgements = [
    {"prompt": prompt, "chosen": " It is 4.", "rejected": " It is five!"},
    {"text": [prompt + " Four.", prompt + " 4."], "score": [1.0, 1.0]},
]

# %% A model small enough to count in
# A vocabulary of 258 leaves the tokenizer no room beyond the 256 bytes and two special tokens, so
# one letter is one token. The model's weights are random, so its opinions are worthless. Its
# arithmetic is that of a model of 7 billion parameters.
#
# The line below should say that the file has one pair, and one label tie: left out, but counted.

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

pair = source.pairs[0]
batch = pack_pairs(source.pairs)
stream = batch.stream
tokens = stream.tokens.tolist()
decode = checkpoint.tokenizer.file.decode
shared_text = decode(tokens[:34])
chosen_ending = decode(tokens[34:36])
rejected_ending = decode(tokens[36:])
print(f"\nshared   {shared_text!r}")
print(f"chosen   {chosen_ending!r}")
print(f"rejected {rejected_ending!r}")

# %% Positions
# Both endings follow directly on the shared part, so both count on from 34: first 34 35, then 34 35
# 36 37 38. Each ending sees the shared part and itself, but never the other ending. The reward of a
# text is read at its last token, which is at places 35 and 40 of the stream.

positions = stream.positions.tolist()
print("\npositions from place 32:", positions[32:])
print("rewards are read at places", stream.last.tolist())

# %% No padding
# The stream has 41 tokens, and no more are computed. Two separate texts would have 75. Padded to a
# rectangle they would have 78.

apart = pack_pairs(source.pairs, share=False).stream
rectangle = 2 * max(len(pair.chosen), len(pair.rejected))
print(f"\ntokens in the stream:          {len(tokens)}")
print(f"tokens of two texts apart:     {len(apart.tokens)}")
print(f"tokens of a padded rectangle:  {rectangle}")

# %% Two rewards
# The trunk turns each text into one vector z of width D = 16, its last hidden state. The reward is
# the product of z with one more vector w, the head:
#
#     r = w · z
#
# This model prefers the wrong sum: its rewards are about -.12 and .83.

z_chosen, z_rejected = model.features(batch)  # (1, 16) each
reward_chosen = (z_chosen @ model.head).detach()[0]
reward_rejected = (z_rejected @ model.head).detach()[0]
print(f"\nrewards: chosen {reward_chosen:.4f}, rejected {reward_rejected:.4f}")

# %% Sharing the prompt is exact
# A token of a causal model never sees what comes after it. So the prompt's hidden states are the
# same whichever response follows. Only rounding may differ: by at most some 1e-6 in float32, and
# some 1e-15 in float64. The rejected text all alone has the same reward as before, .8331.


def largest_gap(any_model):
    """The largest difference between the rewards with a shared prompt and those of texts apart."""
    with torch.no_grad():
        return (any_model.rewards(stream) - any_model.rewards(apart)).abs().max().item()


double_model = copy.deepcopy(model).double()
double_model.trunk.compute_dtype = torch.float64
gap_float32, gap_float64 = largest_gap(model), largest_gap(double_model)
alone = text_rewards(model, [pair.rejected.tolist()])[0]
print(f"\nshared against apart: {gap_float32:.0e} in float32, {gap_float64:.0e} in float64")
print(f"the rejected text all alone: {alone:.4f}")

# %% Why the positions begin again
# Let the positions count on instead, from the chosen ending into the rejected one: 34 to 40. The
# chosen reward stays, but the rejected reward comes out wrong: about -.19 instead of .83.

counted_on = dataclasses.replace(stream, positions=torch.arange(len(tokens)))
with torch.no_grad():
    wrong_chosen, wrong_rejected = model.rewards(counted_on)
print(f"positions counted on: chosen {wrong_chosen:.4f}, rejected {wrong_rejected:.4f}")

# %% The margin and the probability
# The margin is the chosen reward minus the rejected one. Bradley and Terry (1952) take exp(reward)
# as the strength of a response. The chosen response then wins with probability
#
#     exp(r_chosen) / (exp(r_chosen) + exp(r_rejected)) = σ(margin),     σ(m) = 1 / (1 + exp(-m))
#
# Here the margin is about -.95 and the probability .28. Only the difference of the rewards counts:
# 5 more for both changes nothing.

margin = reward_chosen - reward_rejected
probability = torch.sigmoid(margin)
raised_rewards = torch.stack([reward_chosen, reward_rejected]) + 5
probability_raised = torch.softmax(raised_rewards, 0)[0]
print(f"\nmargin {margin:.4f}")
print(f"probability {probability:.4f}, with 5 more for both rewards {probability_raised:.4f}")

# %% The loss
# The loss is minus the logarithm of that probability:
#
#     L = -log σ(r_chosen - r_rejected)                                                     (Eq. 1)
#
# Here it is about 1.28.

losses = bradley_terry_losses(model.head, z_chosen, z_rejected, batch.source)  # one per source
loss = losses[0]
print(f"loss {loss:.4f}")

# Three losses are worth knowing by heart. A margin of 2 in the right direction costs .127, a margin
# of 0 costs log 2 = .693, and a margin of 2 in the wrong direction costs 2.127.

landmarks = pair_losses(torch.tensor([2.0, 0.0, -2.0]))
print("losses at margins of 2, 0 and -2:", landmarks)

# %% The gradient without a backward pass
# The head w enters the loss only through w · (z_chosen - z_rejected). So its gradient is
#
#     ∂L/∂w = -σ(-margin) (z_chosen - z_rejected)                                           (Eq. 8)
#
# This is a direction times a strength, and the strength is the probability of being wrong. It is
# .018 at a margin of 4 and .982 at a margin of -4: a pair that is learned hardly pushes any more.
# Compare the two lines: the formula and autograd give the same numbers.

by_formula = head_gradients(model.head, z_chosen, z_rejected, batch.source)[0]  # (16,)
(by_autograd,) = torch.autograd.grad(loss, model.head)
strengths = torch.sigmoid(torch.tensor([-4.0, 4.0]))
print("\ngradient, first 4 of 16, by formula: ", by_formula[:4])
print("                         by autograd:", by_autograd[:4])

# %% One step of the head
# A step of size .1 against this gradient raises the margin by
#
#     .1 σ(-margin) ||z_chosen - z_rejected||²
#
# which is about 1.26 here. The margin becomes about .31: this one pair is now right.

size = 0.1
difference = (z_chosen - z_rejected)[0].detach()
predicted_rise = size * torch.sigmoid(-margin) * (difference @ difference)
head_after = model.head.detach() - size * by_formula
margin_after = head_after @ difference
rise = margin_after - margin
print(f"\nmargin after the step {margin_after:.4f}")
print(f"raised by {rise:.4f}, predicted {predicted_rise:.4f}")

# %% Two kinds of tie
# A label tie says that the people were undecided. It is no pair, and was left out above. A reward
# tie says that the model is undecided: its margin is exactly 0, as from a head of zeros. This is an
# ordinary pair. It has half credit in accuracy, a loss of log 2, and a gradient of half the length
# of z_chosen - z_rejected.

accuracy_of_tie = accuracy([0.0])
zero_head = torch.zeros(16)
tie_gradient = head_gradients(zero_head, z_chosen, z_rejected, batch.source)[0]
print(f"\nreward tie: accuracy {accuracy_of_tie}")
print(f"length of its gradient {tie_gradient.norm():.4f}, half of {difference.norm():.4f}")

# %% What was claimed
assert (len(source.pairs), source.label_ties) == (1, 1)
assert (shared_text, chosen_ending, rejected_ending) == (prompt + " It is ", "4.", "five!")
assert positions == [*range(34), 34, 35, 34, 35, 36, 37, 38]
assert stream.last.tolist() == [35, 40]
assert (len(tokens), len(apart.tokens), rectangle) == (41, 75, 78)
assert gap_float32 < 1e-5 and gap_float64 < 1e-13
assert abs(alone - reward_rejected) < 1e-5
assert abs(wrong_chosen - reward_chosen) < 1e-5 and abs(wrong_rejected - reward_rejected) > 0.1
assert torch.isclose(loss, -torch.log(probability)) and probability < 0.5
assert torch.isclose(probability_raised, probability)
assert torch.allclose(landmarks, torch.tensor([0.127, math.log(2), 2.127]), atol=5e-4)
assert torch.allclose(strengths, torch.tensor([0.018, 0.982]), atol=5e-4)
assert torch.allclose(by_formula, by_autograd, atol=1e-6) and by_formula.norm() > 1
assert torch.isclose(rise, predicted_rise, rtol=1e-4) and margin_after > 0
assert accuracy_of_tie == 0.5
assert torch.isclose(tie_gradient.norm(), difference.norm() / 2)

# %% Two exercises
# Exercise 1. Swap "chosen" and "rejected" in the file. Which printed numbers change their sign,
#             which change places, and which stay? What is the sum of the two probabilities, before
#             and after the swap?
# Exercise 2. Train the tokenizer on whole texts, with a vocabulary of 300. Find a prompt and a
#             response whose tokens, taken apart, are not the tokens of the two as one text. Why is
#             one text the safer choice?
