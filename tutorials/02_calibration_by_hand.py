"""Tutorial 2: calibration by hand.

Question      A reward model says .7. What did it promise, and how do we find out whether it kept
              its word?
You will see  an expected calibration error (ECE) counted with pencil and paper; the paper's way of
              counting and the usual one agree; a model that is too sure of itself; and the error
              that even a perfect model shows on few pairs.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import numpy as np

from minimore import accuracy, expected_calibration_error, pair_ece, reliability
from minimore.calibration import brier, negative_log_likelihood, pair_reliability, probability
from minimore.figures.sketch import show_curves
from minimore.tables import Table, number

# %% What a probability promises
# One prediction of .7 can be neither right nor wrong. A thousand can: about 700 of them should come
# true. So we sort the predictions into M bins. In each bin we compare the mean probability (what
# the model said) with the share that came true (what happened):
#
#     ECE = Σ_m  n_m / n  |share that came true in bin m - mean probability in bin m|

# %% Six predictions, with pencil and paper
# Four predictions say .65, and two of these come true: .50 instead of .65, a gap of .15. Two say
# .95, and both come true: a gap of .05. Weighted by how many predictions there are,
#
#     ECE = 4/6 × .15 + 2/6 × .05 = .1167

predictions = [0.65, 0.65, 0.65, 0.65, 0.95, 0.95]
came_true = [1, 1, 0, 0, 1, 1]
bins = reliability(predictions, came_true, bins=10)
filled = np.flatnonzero(bins.count)

table = Table("bin", "predictions", "said", "happened")
for m in filled:
    interval = f"({bins.edges[m]:.1f}, {bins.edges[m + 1]:.1f}]"
    table.add(interval, bins.count[m], number(bins.confidence[m]), number(bins.accuracy[m]))
print(table)

by_pencil = 4 / 6 * 0.15 + 2 / 6 * 0.05
by_minimore = expected_calibration_error(predictions, came_true)
print(f"ECE by pencil {by_pencil:.4f}, by minimore {by_minimore:.4f}")

# %% A reward model that keeps its word
# Nature draws the margin between a first and a second response. Then people prefer the first with
# probability σ(margin). A model that reports this very margin is perfectly calibrated. With
# Gaussian margins of standard deviation 1 it is right on about 67% of the pairs, much like the
# paper's smaller models. Its ECE on 50,000 pairs is below .01.

random = np.random.default_rng(0)


def calibrated_margins(pairs):
    """Margins, chosen minus rejected, of a perfectly calibrated model on so many pairs."""
    first_minus_second = random.standard_normal(pairs)
    first_is_chosen = random.random(pairs) < probability(first_minus_second)
    return np.where(first_is_chosen, first_minus_second, -first_minus_second)


margins = calibrated_margins(50_000)
share_right = accuracy(margins)
ece = pair_ece(margins)
print(f"\ncalibrated model: accuracy {share_right:.3f}, ECE {ece:.4f}")

# %% One order alone is meaningless
# In a file of pairs the chosen response always stands first. If we only ask "is the chosen one
# preferred?", then the answer is always yes. Every bin has accuracy 1, and the ECE is 1 minus the
# mean probability. It scolds the honest model: .414. It praises a model that reports a margin of 20
# for every pair: .000.

promised = probability(margins)  # of the chosen response
one_order = expected_calibration_error(promised, np.ones(len(margins)))
one_minus_mean = 1 - promised.mean()
shouted = probability(np.full(1000, 20.0))
one_order_shouted = expected_calibration_error(shouted, np.ones(1000))
print(f"\none order only, honest model: {one_order:.3f}")
print(f"1 - mean probability:         {one_minus_mean:.3f}")
print(f"one order only, margin of 20: {one_order_shouted:.3f}")

# %% Every pair enters twice
# So the paper's code lets every pair enter in both orders, as (p, 1) and as (1 - p, 0), into 10
# bins over [0, 1]. This is `pair_ece`.
#
# The usual way takes the predicted winner only, with its probability max(p, 1 - p) in [.5, 1], and
# asks whether it won. The two orders are mirror images, so both ways agree, and the paper's 10 bins
# are 5 bins of the usual kind. Here the 5 bins are counted by hand. The first is (.5, .6].

confidence = probability(np.abs(margins))
has_won = margins > 0
bin_of_pair = np.ceil((confidence - 0.5) * 10).astype(int) - 1
gaps = []
for m in range(5):
    is_here = bin_of_pair == m
    gaps.append(abs((has_won[is_here] - confidence[is_here]).sum()))
winner_only = sum(gaps) / len(margins)
both_orders = pair_ece(margins, bins=10)
print(f"\nboth orders, 10 bins over [0, 1]:  {both_orders:.6f}")
print(f"winner only, 5 bins over [.5, 1]:  {winner_only:.6f}")

# %% Over-confidence: the same accuracy, other promises
# Multiply every margin by 3. No pair changes sides, so the accuracy stays to the last digit. But a
# probability of .73 (a margin of 1) has become .95 (a margin of 3), and the ECE has gone from
# almost 0 to about .16. Divide by 3, and it is back: this is temperature scaling. Accuracy sees
# nothing of all this.

loud = 3 * margins
print(f"\nmargins × 3: accuracy {accuracy(loud):.3f}, ECE {pair_ece(loud):.3f}")
print(f"divided by 3: ECE {pair_ece(loud / 3):.4f}")
diagram = {"a promise that is kept": (np.linspace(0, 1, 11), np.linspace(0, 1, 11))}
for name, m in {"margins": margins, "margins × 3": loud}.items():
    of_bins = pair_reliability(m)
    diagram[f"{name}, ECE {pair_ece(m):.3f}"] = (of_bins.confidence, of_bins.accuracy)
show_curves("02_reliability", "Said and happened", "predicted probability", "share", diagram)

# %% Brier score and log loss: two figures that need no bins
# Let p be the probability of the chosen response. Then
#
#     Brier = mean of (1 - p)²          NLL = mean of -log p     (the log loss)
#
# A model that always says .5 gets .25 and .693. Both figures are lowest where the model is
# calibrated. Look for the smallest number in either column: it stands beside the scale of 1.

table = Table("margins ×", "accuracy", "ECE", "Brier", "NLL")
scales = [0.25, 0.5, 1.0, 2.0, 4.0]
briers, nlls = [], []
for scale in scales:
    scaled = scale * margins
    briers.append(brier(scaled))
    nlls.append(negative_log_likelihood(scaled))
    figures = (accuracy(scaled), pair_ece(scaled), briers[-1], nlls[-1])
    table.add(scale, *map(number, figures))

# %% Calibrated is not informative
# Brier score and NLL also see what ECE does not. A dull model picks the winner of each pair as well
# as ours, but cannot tell which pairs are hard: it says .67 for all of them. Its promises hold, so
# its ECE is 0. And yet its Brier score and its NLL are worse than ours. Compare the last row with
# the row of scale 1.

dull = np.sign(margins) * np.log(share_right / (1 - share_right))
dull_brier, dull_nll = brier(dull), negative_log_likelihood(dull)
table.add("dull", *map(number, (accuracy(dull), pair_ece(dull), dull_brier, dull_nll)))
print(f"\n{table}\n")

# %% The noise floor
# A promise of .7 means 700 of 1000 only on average. ECE counts the random error of every bin, and
# takes absolute values, so these errors do not cancel. Even the perfect model's ECE is above 0: on
# the mean about .029 on 656 pairs (the paper's Webgpt test set without label ties), and half of
# that on four times as many. Tutorial 7 goes on from here.

floors = {}
for pairs in (164, 656, 2624, 10496):
    floors[pairs] = np.mean([pair_ece(calibrated_margins(pairs)) for _ in range(300)])
    print(f"mean ECE of the perfect model on {pairs:5} pairs: {floors[pairs]:.4f}")

# %% What was claimed
assert np.isclose(by_minimore, by_pencil) and np.isclose(by_pencil, 0.1167, atol=5e-5)
assert len(filled) == 2
assert 0.66 < share_right < 0.69 and ece < 0.01
assert np.isclose(one_order, one_minus_mean) and one_order > 0.3 and one_order_shouted < 1e-6
assert np.isclose(both_orders, winner_only, atol=1e-12)
assert accuracy(loud) == share_right and 0.14 < pair_ece(loud) < 0.18
assert np.isclose(pair_ece(loud / 3), ece)
assert [round(float(probability(margin)), 2) for margin in (1, 3)] == [0.73, 0.95]
assert brier([0.0]) == 0.25 and np.isclose(negative_log_likelihood([0.0]), 0.693, atol=5e-4)
assert scales[np.argmin(briers)] == scales[np.argmin(nlls)] == 1.0
assert accuracy(dull) == share_right and pair_ece(dull) < 1e-9
assert dull_brier > briers[2] and dull_nll > nlls[2]
assert abs(floors[656] - 0.029) < 0.003 and 0.4 < floors[2624] / floors[656] < 0.6

# %% Two exercises
# Exercise 1. Give the perfect model 20 bins, and 100, on 656 pairs. How does its mean ECE move, and
#             why? Then try bins of equal count: `expected_calibration_error` of the predicted
#             winner with strategy="quantile".
# Exercise 2. Two models are compared on the same 2,000 pairs: the perfect one, and the same with
#             margins × 1.1. In what share of 500 tries has the perfect one the lower ECE? The lower
#             NLL? Which figure would you trust?
