"""Tutorial 1: one preference by hand.

Question      How does one human judgement, "this response is better than that one", become a
              number to minimise?
You will see  two texts become one stream of tokens with the prompt stored once; then two rewards,
              a margin, a probability and a loss; then the gradient of that loss from a formula
              that needs no backward pass.
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
# In the first, somebody preferred one response: a pair. In the second, both responses got the same
# score: a label tie. It does not say which is better, so there is nothing to learn from it.

prompt = "\n\nHuman: 2 + 2?\n\nAssistant:"
lines = [
    {"prompt": prompt, "chosen": " It is 4.", "rejected": " It is five!"},
    {"text": [prompt + " Four.", prompt + " 4."], "score": [1.0, 1.0]},
]

# %% A model small enough to count in
# A vocabulary of 258 leaves the tokenizer no room beyond the 256 bytes and two special tokens: one
# letter is one token. The model's weights are random, so its opinions are worthless; its
# arithmetic is that of a model of 7 billion parameters.

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer([prompt], folder / "tokenizer.json", vocabulary=258)
    shape = small_gpt_neox(width=16, heads=2, vocabulary=258)
    random_checkpoint(folder / "model", shape, folder / "tokenizer.json", seed=2, std=0.5)
    model, checkpoint = open_reward_model(ModelOptions(model=str(folder / "model"), device="cpu"))
    source = load_source("sums", str(folder / "pairs.jsonl"), checkpoint.tokenizer, max_length=512)

print(source.line())  # one pair, and one label tie: left out, but counted

# %% From texts to one stream
# Prompt and response are read as one text. The two texts of the pair begin alike, and for longer
# than the prompt: 27 tokens of prompt and 7 of " It is " make 34. They are stored once, followed
# by what is left of each response: 2 tokens and 5.

pair, batch = source.pairs[0], pack_pairs(source.pairs)
stream, decode = batch.stream, checkpoint.tokenizer.file.decode
tokens = stream.tokens.tolist()
print(
    f"shared   {decode(tokens[:34])!r}\n"
    f"chosen   {decode(tokens[34:36])!r}\n"
    f"rejected {decode(tokens[36:])!r}"
)

# Both endings follow directly on the shared part, so both count on from 34: first 34 35, then 34
# 35 36 37 38. Each ending sees the shared part and itself, never the other. The reward is read at
# the last token of each text, places 35 and 40 here.

print(
    f"positions from place 32: {stream.positions.tolist()[32:]};"
    f" rewards are read at places {stream.last.tolist()}"
)

# There is no padding: 41 tokens are computed. Two separate texts are 75; padded to a rectangle
# they would be 78.

apart = pack_pairs(source.pairs, share=False).stream
rectangle = 2 * max(len(pair.chosen), len(pair.rejected))
print(
    f"tokens: {len(tokens)} in the stream, {len(apart.tokens)} apart,"
    f" {rectangle} as a padded rectangle"
)

# %% Two rewards
# The trunk turns each text into one vector z, its last hidden state. The reward is its product
# with one vector more, the head. This model prefers the wrong sum: rewards of about -.12 and .83.

z_chosen, z_rejected = model.features(batch)  # (1, 16) each
rewards = torch.stack([z_chosen @ model.head, z_rejected @ model.head], 1).detach()[0]  # (2,)
print(f"rewards: chosen {rewards[0]:.4f}, rejected {rewards[1]:.4f}")

# Sharing the prompt is exact. A token of a causal model never sees what comes after it, so the
# prompt's hidden states are the same whichever response follows. Only rounding may differ: at most
# some 1e-6 in float32, some 1e-15 in float64.

exact = copy.deepcopy(model).double()
exact.trunk.compute_dtype = torch.float64
with torch.no_grad():
    gaps = [(m.rewards(stream) - m.rewards(apart)).abs().max().item() for m in (model, exact)]
    counted_on = model.rewards(dataclasses.replace(stream, positions=torch.arange(len(tokens))))
alone = text_rewards(model, [pair.rejected.tolist()])[0]
print(
    f"shared against apart: {gaps[0]:.0e} in float32, {gaps[1]:.0e} in float64;"
    f" the rejected text all alone: {alone:.4f}"
)

# What matters is that the positions begin again. Counted on, past the chosen ending, the rejected
# reward comes out wrong.

print(f"positions counted on: chosen {counted_on[0]:.4f} as before, rejected {counted_on[1]:.4f}")

# %% Margin, probability, loss
# The margin is the chosen reward minus the rejected one. Bradley and Terry (1952) take exp(reward)
# as strength: the chosen wins with probability exp(r_c) / (exp(r_c) + exp(r_r)) = sigmoid(margin).
# Only the difference counts: 5 more for both changes nothing. The loss is -log of that probability
# (Eq. 1 of the paper). Here: margin -.95, probability .28, loss 1.28.

margin = rewards[0] - rewards[1]
probability, shifted = torch.sigmoid(margin), torch.softmax(rewards + 5, 0)[0]
loss = bradley_terry_losses(model.head, z_chosen, z_rejected, batch.source)[0]
print(
    f"margin {margin:.4f} -> probability {probability:.4f} (5 more for both: {shifted:.4f})"
    f" -> loss {loss:.4f}"
)

# Worth knowing by heart: a margin of 0 costs log 2 = .693; 2 in the right direction costs .127, 2
# in the wrong one 2.127.
landmarks = pair_losses(torch.tensor([2.0, 0.0, -2.0]))
print("loss at margins of 2, 0 and -2:", landmarks)

# %% The gradient without a backward pass
# The head enters only through head . (z_c - z_r), so its gradient is -sigmoid(-margin) (z_c -
# z_r): a direction, and a strength that is the probability of being wrong. At a margin of 4 it is
# .018, at -4 it is .982: a pair once learned hardly pushes.

closed = head_gradients(model.head, z_chosen, z_rejected, batch.source)[0]  # (16,)
(automatic,) = torch.autograd.grad(loss, model.head)
print("gradient, first 4 of 16, closed form:", closed[:4])
print("                             autograd:", automatic[:4])

# A step of .1 against it raises the margin by .1 sigmoid(-margin) ||z_c - z_r||^2, about 1.26:
# this one pair is now right.

difference = (z_chosen - z_rejected)[0].detach()
predicted = 0.1 * torch.sigmoid(-margin) * (difference @ difference)
after = (model.head.detach() - 0.1 * closed) @ difference
print(
    f"margin after the step {after:.4f}, raised by {after - margin:.4f}, predicted {predicted:.4f}"
)

# %% Two kinds of tie
# A label tie (the people were undecided) is no pair, and was left out above. A reward tie (the
# model is undecided: a margin of exactly 0, as from a head of zeros) is an ordinary pair: half
# credit in accuracy, a loss of log 2, and a gradient.

undecided = head_gradients(torch.zeros(16), z_chosen, z_rejected, batch.source)[0]
print(
    f"reward tie: accuracy {accuracy([0.0])}, gradient of length {undecided.norm():.4f},"
    f" half of {difference.norm():.4f}"
)

# %% What was claimed
assert (len(source.pairs), source.label_ties) == (1, 1)
assert [decode(tokens[a:b]) for a, b in ((0, 34), (34, 36), (36, 41))] == [
    prompt + " It is ",
    "4.",
    "five!",
]
assert stream.positions.tolist() == [
    *range(34),
    34,
    35,
    34,
    35,
    36,
    37,
    38,
] and stream.last.tolist() == [35, 40]
assert (len(tokens), len(apart.tokens), rectangle) == (41, 75, 78)
assert gaps[0] < 1e-5 and gaps[1] < 1e-13 and abs(alone - rewards[1]) < 1e-5
assert abs(counted_on[0] - rewards[0]) < 1e-5 and abs(counted_on[1] - rewards[1]) > 0.1
assert (
    torch.isclose(loss, -torch.log(probability))
    and torch.isclose(shifted, probability)
    and probability < 0.5
)
assert torch.allclose(landmarks, torch.tensor([0.127, math.log(2), 2.127]), atol=5e-4)
assert torch.allclose(
    torch.sigmoid(torch.tensor([-4.0, 4.0])), torch.tensor([0.018, 0.982]), atol=5e-4
)
assert torch.allclose(closed, automatic, atol=1e-6) and closed.norm() > 1
assert torch.isclose(after - margin, predicted, rtol=1e-4) and after > 0
assert accuracy([0.0]) == 0.5 and torch.isclose(undecided.norm(), difference.norm() / 2)

# %% Two exercises
# Exercise 1. Swap "chosen" and "rejected" in the file. Which printed numbers change sign, which
#             change places, which stay? What do the two probabilities, before and after the swap,
#             sum to?
# Exercise 2. Train the tokenizer on whole texts, with a vocabulary of 300. Find a prompt and a
#             response whose tokens, taken apart, are not the tokens of the two as one text. Why is
#             one text the safer choice?
