"""Tutorial 13: several votes a pair.

Question      People disagree. What does a reward model lose when only one label, or the majority of
              several, is kept of what they said? And which part of its error is theirs?
You will see  three heads that learn from the same pairs: by one label, by the majority, by all
              votes; why a model that learns from majorities is too sure of itself; and which part
              of a Brier score is the people's, and which the model's.
Takes         about 4 seconds on a laptop CPU. Nothing is downloaded.
"""

import numpy as np
import torch

from minimore import accuracy, pair_ece, pair_losses
from minimore.calibration import (
    fit_temperature,
    negative_log_likelihood,
    pair_reliability,
    probability,
)
from minimore.data.world import WORDS, World
from minimore.disagreement import disagreement
from minimore.figures.sketch import show_curves
from minimore.lab.probe import ProbeOptions, train_head
from minimore.tables import Table, number, with_interval
from minimore.uncertainty import intervals
from minimore.votes import Labels

random = np.random.default_rng(0)
W, VOTES = len(WORDS), 4

# %% Pairs, of which the truth is known, and four votes on each
# A response is 14 words and is worth the sum of their values (tutorial 5). Four people vote on each
# pair, each with the same probability,
#
#     p = P(first wins) = σ(worth of the first - worth of the second)
#
# The factor 1.25 sets worth against chance: two people agree on about .68 of the pairs.

values = 1.25 * World(annotators=("ana",), conflict=0.0).values()[0]  # (W,)


def voted(pairs):
    """Differences of word counts (N, W), their true margins (N,), and who voted first (N, 4)."""
    first, second = random.multinomial(14, [1 / W] * W, (2, pairs)) / np.sqrt(14)
    margin = (first - second) @ values
    first_wins = random.random((pairs, VOTES)) < probability(margin)[:, None]
    return first - second, margin, first_wins


train_difference, _, train_votes = voted(1000)
test_difference, test_margin, test_votes = voted(3000)
shares = test_votes.mean(1)  # (N,) of the votes, those for the first

# %% What votes are in the loss
# If three of four prefer a response, its share is t = 3/4. The loss is that of a soft target,
#
#     L = -t log σ(m) - (1 - t) log σ(-m)
#
# and this is the mean loss of the four votes, each a pair of its own: three one way round, one the
# other. It is least where σ(m) = 3/4. A majority makes of the same votes a pair with t = 1.

one = torch.ones(1)
soft_loss = pair_losses(0.8 * one, labels=Labels(share=0.75 * one, margin=0 * one, weight=one))
loss_of_votes = pair_losses(torch.tensor([0.8, 0.8, 0.8, -0.8])).mean()
print(f"loss of a soft target {soft_loss.item():.6f}, mean of four votes {loss_of_votes:.6f}")

# %% The label, the majority, the votes
# Three heads learn from the same pairs: from what the first person said; from the majority, which
# leaves out what is split two to two; and from all votes.


def rows_of(difference, first_wins):
    """Chosen minus rejected, for one label a pair: (N, W)."""
    sign = np.where(first_wins, 1.0, -1.0)
    return torch.tensor(difference * sign[:, None], dtype=torch.float32)


decided = train_votes.sum(1) != VOTES / 2
lessons = {
    "one label": (rows_of(train_difference, train_votes[:, 0]), 20),
    "majority": (rows_of(train_difference, train_votes.sum(1) > VOTES / 2)[decided], 20),
    # Four rows a pair, so four times as many in a step.
    "four votes": (
        rows_of(train_difference.repeat(VOTES, axis=0), train_votes.reshape(-1)),
        80,
    ),
}

# %% Which of them is right?
# "as the truth" is the share of pairs that a head ranks as their true worth does: several opinions
# are better than one. T is the temperature that would mend a head; above 1, the head is too sure of
# itself. To the head of the majority three to one is as clear as four to none, so its margins are
# too large. The head of single labels has learned some chance as if it were taste.

table = Table("learned from", "as the truth", "NLL", "ECE", "T")
margins, as_truth, nll, ece, temperature, diagram = {}, {}, {}, {}, {}, {}
for name, (rows, batch_size) in lessons.items():
    options = ProbeOptions(features="", epochs=8, batch_size=batch_size, learning_rate=0.08)
    head, _ = train_head([rows], "uniform", options, seed=0)
    margins[name] = test_difference @ head.double().numpy()
    as_truth[name] = accuracy(np.where(test_margin > 0, 1, -1) * margins[name])
    nll[name] = negative_log_likelihood(margins[name], shares)
    ece[name] = pair_ece(margins[name], outcomes=shares)
    temperature[name] = fit_temperature(margins[name], shares)
    figures = (as_truth[name], nll[name], ece[name])
    table.add(name, *map(number, figures), number(temperature[name], 2))
    bins = pair_reliability(margins[name], outcomes=shares)
    diagram[f"{name}, ECE {ece[name]:.3f}"] = (bins.confidence, bins.accuracy)
print(f"\n{table}")
show_curves("13_votes", "Said and voted", "predicted probability", "share of votes", diagram)

# %% What one label cannot say
# The head of the votes agrees with a person about as often as any rule could. Is its Brier score
# good? The mean of p (1 - p) is the part of the score that no model can go below, because people
# differ. Several votes on a pair are enough to estimate it. In this world p is known, and the
# estimate can be compared with it. What is left for the model is small: it has next to nothing left
# to learn.
#
# One label a pair gives no such estimate: people who disagree and a model that errs look the same.

votes = np.full(len(shares), VOTES)
verdict = disagreement(margins["four votes"], shares, votes)
p = probability(test_margin)
true_floor = np.mean(p * (1 - p))
single = test_votes[:, 0].astype(float)
of_single_labels = disagreement(margins["four votes"], single, np.ones_like(single))
print(f"\ntwo people agree in {verdict.annotators_agree:.3f} of the pairs,", end=" ")
print(f"model and person in {verdict.model_agrees:.3f}, at most {verdict.ceiling:.3f}")
print(f"Brier score {verdict.brier:.3f}: people's part {verdict.brier_floor:.3f}", end=" ")
print(f"(in truth {true_floor:.3f}), the model's {verdict.brier - verdict.brier_floor:.3f}")
print(f"the same from single labels: {of_single_labels}")

# %% How sure one is
# Judge the head of the majority twice on the same pairs: by the first person, and by all four. The
# second interval of its calibration error is about half as wide. Four times as many pairs with one
# label each would do that, too, but they would not say what the last cell said.

_, by_one = intervals(margins["majority"], outcomes=single)
_, by_four = intervals(margins["majority"], outcomes=shares)
print(f"\nECE less noise, by one label  {with_interval(by_one.value, by_one[1:])}")
print(f"               by four votes  {with_interval(by_four.value, by_four[1:])}")

# %% What was claimed
assert torch.isclose(soft_loss, loss_of_votes)
assert as_truth["one label"] + 0.01 < min(as_truth["majority"], as_truth["four votes"])
assert nll["four votes"] == min(nll.values()) and ece["majority"] > 3 * ece["four votes"]
assert temperature["majority"] > 1.5 and abs(temperature["four votes"] - 1) < 0.2
assert verdict.annotators_agree + 0.04 < verdict.model_agrees < verdict.ceiling < 0.84
assert abs(verdict.brier_floor - true_floor) < 0.006 and of_single_labels is None
assert abs(verdict.brier - verdict.brier_floor) < 0.012
assert 0.4 < (by_four.high - by_four.low) / (by_one.high - by_one.low) < 0.7

# %% Two exercises
# Exercise 1. Turn a fifth of all single votes round before they are counted. What shows it, and
#             could it not have been the people?
# Exercise 2. Four votes on 1,000 pairs cost as much as one label on 4,000. Which of the two teaches
#             a head more? By which of them would you rather be judged?
