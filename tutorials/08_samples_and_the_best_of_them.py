"""Tutorial 8: samples of a policy, and the best of n.

Question      What is a reward model for, and how far can one trust it while it chooses?
You will see  a small language model that learns the world's responses by the language objective;
              its samples, token by token; the best of n by a known reward, against exact order
              statistics; the same by reward models of few and of many labels, which promise more
              than they keep.
Takes         about 10 seconds on a laptop CPU.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from minimore import ModelOptions
from minimore.alignment.generate import Sampling, generate
from minimore.alignment.language import LanguageObjective, Responses
from minimore.alignment.policy import open_policy
from minimore.calibration import probability
from minimore.data.world import WORDS, World, small_gpt_neox, train_tokenizer
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.figures.sketch import show_curves
from minimore.lab.probe import ProbeOptions, train_head
from minimore.model.checkpoint import Checkpoint, random_checkpoint

W, LENGTH = len(WORDS), 14
random = np.random.default_rng(0)

# %% What people have written
# In the synthetic world a response is 14 words out of 40, and Ana values it at a sum of word
# values. We write 2,000 answers, and train a tokenizer on them. The end of a response is a token
# of its own, id 0.

world = World(annotators=("ana",), conflict=0.0)
shared, drifts = world.values()
values_of_words = shared + drifts[0]  # (W,)
PROMPT = "\n\nHuman: tell me something\n\nAssistant:"
texts = [" " + " ".join(random.choice(WORDS, LENGTH)) for _ in range(2000)]
with tempfile.TemporaryDirectory() as folder:
    tokenizer_file, directory = Path(folder) / "tokenizer.json", Path(folder) / "model"
    train_tokenizer([PROMPT + text for text in texts], tokenizer_file)
    random_checkpoint(directory, small_gpt_neox(), tokenizer_file, seed=0)
    checkpoint = Checkpoint(str(directory))
    policy = open_policy(checkpoint, ModelOptions(model=str(directory), device="cpu"))
tokenizer = checkpoint.tokenizer
(prompt,) = tokenizer.encode([PROMPT])
END = 0
responses = [ids[len(prompt) :] + [END] for ids in tokenizer.encode([PROMPT + t for t in texts])]
print(f"{texts[0][:40]!r}... is {len(responses[0])} tokens, the end included")

# %% A policy
# A language model is a trunk with an unembedding on top. It learns by the loss of the responses'
# tokens, given everything before them. What stands on a trunk is an *objective*: the engine that
# takes steps for rewards takes them for this one, too. A batch holds the prompt once.

optimizer = AdamW()
optimizer.adopt_all(policy)
engine = open_engine(policy, optimizer, Recipe())
optimizer.learning_rate = 3e-3
losses = []
for _ in range(110):
    some = random.integers(len(responses), size=32)
    items = [Responses(prompt, [responses[i] for i in some])]
    losses.append(engine.step(items, [0], LanguageObjective()).loss.item())
# Every word is as likely as every other, so no model can do better than log 40 a word.
print(f"\nloss of a token: {losses[0]:.2f}, after 110 steps {losses[-1]:.2f}")
print(f"log 40 a word, and nothing for the end: {LENGTH * np.log(W) / (LENGTH + 1):.2f}")

# %% Samples
# The prompt is computed once. Every sample then goes on by itself: each block remembers the keys
# and values of what the sample has written, so a step computes one new token a sample. A sample has
# a seed of its own, so it is the same whether drawn alone or with others.

sampling = Sampling(max_new_tokens=40, eos=frozenset({END}))
alone = generate(policy, [prompt], [[7]], sampling)[0]
together = generate(policy, [prompt], [list(range(64))], sampling)
print(f"\nsample 7: {tokenizer.file.decode(alone.tokens[:-1])!r}")


def words_of(sample):
    """The counts (W,) of the world's words in a sample, and whether it has 14 of them only."""
    said = tokenizer.file.decode(sample.tokens).replace("<|endoftext|>", "").split()
    counts = np.array([said.count(word) for word in WORDS])
    return counts, counts.sum() == len(said) == LENGTH


N, prompts = 32, 60
samples = []
for first in range(0, prompts, 30):
    seeds = [[N * p + j + 1000 for j in range(N)] for p in range(first, first + 30)]
    samples += generate(policy, [prompt] * 30, seeds, sampling)
read = [words_of(sample) for sample in samples]
whole = np.array([is_whole for _, is_whole in read])
print(f"{whole.mean():.0%} of {len(samples):,} samples are 14 words of the world and an end")

# %% The best of n, by a reward that is known
# Take n samples of a prompt, and keep the one that Ana values most. If values are normal with
# standard deviation s, the best of n is on the mean s c(n) above the mean of all, with
#
#     c(n) = ∫ x d(Φ(x)ⁿ)     Φ: the share of a normal distribution that is below x
#
# which is 0.56 for two and 2.07 for 32. Here s is 1.01.

features = np.stack([counts for counts, _ in read]).reshape(prompts, N, W) / np.sqrt(LENGTH)
true = features @ values_of_words  # (prompts, N)


def best_of(n, by):
    """The true value of the best of the first n samples of every prompt: (prompts,)."""
    return np.take_along_axis(true[:, :n], by[:, :n].argmax(1)[:, None], 1)[:, 0]


def expected_maximum(n):
    """c(n) by summing over a fine grid."""
    x = np.linspace(-8, 8, 20001)
    cdf = np.cumsum(np.exp(-(x**2) / 2))
    powers = (cdf / cdf[-1]) ** n
    return float(((x[1:] + x[:-1]) / 2 * np.diff(powers)).sum())


SIZES = 1, 2, 4, 8, 16, 32
spread, mean = true.std(), true.mean()
possible, theory = [], []
for n in SIZES:
    possible.append(best_of(n, true).mean() - mean)
    theory.append(spread * expected_maximum(n))
print("\nn                    ", *(f"{n:5}" for n in SIZES))
print("gain by theory       ", *(f"{value:5.2f}" for value in theory))
print("of the best of n     ", *(f"{value:5.2f}" for value in possible))

# %% By a reward model, which only believes that it knows
# Two reward models learn Ana's taste from labels drawn with the probability σ(2 m): one from 60
# pairs, one from 6,000. They choose; Ana counts. A promise is divided by its slope on Ana's values
# (tutorial 5): a reward has no unit.


def reward_model(pairs):
    """Word values (W,) as a model of so many labelled pairs has them."""
    first, second = random.multinomial(LENGTH, [1 / W] * W, (2, pairs)) / np.sqrt(LENGTH)
    difference = first - second
    p = probability(2 * difference @ values_of_words)
    labelled = difference * np.where(random.random(pairs) < p, 1, -1)[:, None]
    options = ProbeOptions(features="", epochs=max(4, 24000 // pairs), learning_rate=0.05)
    head, _ = train_head([torch.tensor(labelled, dtype=torch.float32)], "uniform", options, seed=0)
    return head.double().numpy()


promised, gained = {}, {}
for name, model in {"few": reward_model(60), "many": reward_model(6000)}.items():
    rewards = features @ model
    slope = (rewards * true).mean() / (true * true).mean()  # in Ana's units
    promised[name] = [(rewards[:, :n].max(1) - rewards.mean()).mean() / slope for n in SIZES]
    gained[name] = [best_of(n, rewards).mean() - mean for n in SIZES]
    print(f"{name:>4} labels, promised", *(f"{value:5.2f}" for value in promised[name]))
    print(f"{name:>4} labels, kept    ", *(f"{value:5.2f}" for value in gained[name]))
lines = {"60 labels: promised": promised["few"], "kept": gained["few"], "possible": possible}
curves = {name: (np.log2(SIZES), values) for name, values in lines.items()}
show_curves("08_best_of_n", "What the best of n gains, in Ana's units", "log2 n", "gain", curves)

# A temperature would change what a model promises, and nothing of what it chooses: tutorial 9.

# %% What was claimed
assert losses[-1] < losses[0] - 2 and whole.mean() > 0.85
assert together[7].tokens == alone.tokens
for n, gain, expected in zip(SIZES, possible, theory):
    assert abs(gain - expected) < 4 * best_of(n, true).std(ddof=1) / np.sqrt(prompts)
assert abs(expected_maximum(2) - 1 / np.sqrt(np.pi)) < 1e-3
assert promised["few"][-1] > gained["few"][-1] + 0.6  # Few labels keep little of what they promise.
assert gained["many"][-1] > gained["few"][-1] + 0.2
assert gained["many"][-1] > 0.8 * possible[-1]

# %% Two exercises
# Exercise 1. Sample at `temperature=0.5` and at `1.5`. What becomes of the share of whole
#             responses, and of the best of 32? Which of them does the standard deviation explain?
# Exercise 2. Mix the rewards of both models: choose by their sum, and by the sum of a tenth of the
#             first and the second. Why does the scale matter now?
