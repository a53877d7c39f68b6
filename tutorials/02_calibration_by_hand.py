"""Tutorial 2: calibration by hand.

Question      A reward model says .7. What did it promise, and how do we find out whether it kept
              its word?
You will see  an expected calibration error (ECE) counted with pencil and paper; the paper's way of
              counting and the usual one agree; a model that cries too loudly; and the error that
              even a perfect model shows on few pairs.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import numpy as np

from minimore import accuracy, expected_calibration_error, pair_ece, reliability
from minimore.calibration import brier, negative_log_likelihood, probability

# %% What a probability promises
# One prediction of .7 can be neither right nor wrong. A thousand can: about 700 of them should
# come true. So we sort the predictions into bins and compare, in each, the mean probability (what
# was said) with the share that came true (what happened).
#
# Six predictions. Four say .65, and two of these come true: .50 instead of .65, a gap of .15. Two
# say .95, and both come true: a gap of .05. Weighted by how many there are, ECE = 4/6 x .15 + 2/6
# x .05 = .1167.

said, happened = [0.65, 0.65, 0.65, 0.65, 0.95, 0.95], [1, 1, 0, 0, 1, 1]
table = reliability(said, happened, bins=10)
for m in np.flatnonzero(table.count):
    print(
        f"bin ({table.edges[m]:.1f}, {table.edges[m + 1]:.1f}]: {table.count[m]} predictions, said "
        f"{table.confidence[m]:.2f}, happened {table.accuracy[m]:.2f}"
    )
by_pencil = 4 / 6 * 0.15 + 2 / 6 * 0.05
print(
    f"ECE by pencil {by_pencil:.4f}, by minimore {expected_calibration_error(said, happened):.4f}"
)

# %% A reward model that keeps its word
# Nature draws the margin between a first and a second response, then people prefer the first with
# probability sigmoid(margin). A model that reports this very margin is perfectly calibrated. With
# Gaussian margins of standard deviation 1 it is right on about 67% of the pairs, much like the
# paper's smaller models.

random = np.random.default_rng(0)


def calibrated_margins(pairs):
    """Margins, chosen minus rejected, of a perfectly calibrated model on so many pairs."""
    first_minus_second = random.standard_normal(pairs)
    first_is_chosen = random.random(pairs) < probability(first_minus_second)
    return np.where(first_is_chosen, first_minus_second, -first_minus_second)


margins = calibrated_margins(50_000)
print(
    f"calibrated model: accuracy {accuracy(margins):.3f}, ECE {pair_ece(margins):.4f}"
)  # about .67, under .01

# %% Why every pair enters twice
# In a file of pairs the chosen response stands first, always. Ask only "is the chosen one
# preferred?" and the answer is always yes: every bin has accuracy 1, and the ECE is 1 - mean
# probability. It then scolds the honest model, and praises one that shouts a margin of 20 at
# everything. One order alone is meaningless.

one_order = expected_calibration_error(probability(margins), np.ones(len(margins)))
shouted = expected_calibration_error(probability(np.full(1000, 20.0)), np.ones(1000))
print(
    f"one order only: honest model {one_order:.3f}"
    f" = 1 - mean probability {1 - probability(margins).mean():.3f}, "
    f"shouting model {shouted:.3f}"
)

# So the paper's code lets every pair enter in both orders, (p, 1) and (1 - p, 0), in 10 bins over
# [0, 1]: that is `pair_ece`. The usual way takes the predicted winner only, with probability
# max(p, 1 - p) in [.5, 1], and asks whether it won. Both orders are mirror images, so the two
# agree, and the paper's 10 bins are 5 bins of the usual kind. Here are the 5, counted by hand.

confidence, won = probability(np.abs(margins)), margins > 0
bin_of = np.ceil((confidence - 0.5) * 10).astype(int) - 1  # (.5, .6] is bin 0
usual = sum(abs((won[bin_of == m] - confidence[bin_of == m]).sum()) for m in range(5)) / len(
    margins
)
print(
    f"both orders, 10 bins over [0, 1]: {pair_ece(margins, bins=10):.6f};"
    f" winner only, 5 bins over [.5, 1]: {usual:.6f}"
)

# %% Over-confidence: same accuracy, other promises
# Multiply every margin by 3. No pair changes sides, so the accuracy stays to the last digit; but
# .73 has become .95, and the ECE has gone from almost 0 to about .16. Divide by 3 (temperature
# scaling) and it is back. Accuracy sees nothing of this.

loud = 3 * margins
print(
    f"margins x 3: accuracy {accuracy(loud):.3f}, ECE {pair_ece(loud):.3f},"
    f" divided by 3 again {pair_ece(loud / 3):.4f}"
)

# %% Brier score and log loss: two figures that need no bins
# The Brier score is the mean of (1 - p)^2, the log loss (NLL) the mean of -log p, with p the
# probability of the chosen response. Who always says .5 gets .25 and .693. Both are lowest where
# the model is calibrated: of the five scales below, at 1.

scales = [0.25, 0.5, 1.0, 2.0, 4.0]
briers = [brier(scale * margins) for scale in scales]
losses = [negative_log_likelihood(scale * margins) for scale in scales]
for scale, brier_score, loss in zip(scales, briers, losses):
    scaled = scale * margins
    print(
        f"margins x {scale:<4}: accuracy {accuracy(scaled):.3f}  ECE {pair_ece(scaled):.3f}"
        f"  Brier {brier_score:.3f}  NLL {loss:.3f}"
    )

# They also see what ECE does not. A dull model picks the winner of each pair as well as ours, but
# cannot tell which pairs are hard: it says .67 to all. Its promises hold, its ECE is 0, and yet
# its Brier and NLL are worse. Calibrated is not informative.

share = accuracy(margins)
dull = np.sign(margins) * np.log(share / (1 - share))
print(
    f"dull model: accuracy {accuracy(dull):.3f}  ECE {pair_ece(dull):.3f}"
    f"  Brier {brier(dull):.3f}  "
    f"NLL {negative_log_likelihood(dull):.3f}"
)

# %% The noise floor
# A kept promise of .7 is 700 of 1000 only on average. ECE takes every bin's wobble for an error,
# and errors do not cancel, so even the perfect model's ECE is above 0. On 656 pairs (the paper's
# Webgpt test set without label ties) it is about .029, and on four times as many about half of
# that.

floors = {n: np.mean([pair_ece(calibrated_margins(n)) for _ in range(500)]) for n in (656, 4 * 656)}
print(
    "mean ECE of the perfect model:",
    ", ".join(f"{floor:.4f} on {n} pairs" for n, floor in floors.items()),
)

# Now read the paper with this in mind. Its Table 1 gives Pythia-1.4B an ECE of .0177 with
# MultiTask and of .0109 with MORE, means over two test sets of 2352 and 2312 pairs. The perfect
# model lands between .009 and .022 in nine of ten tries, so by this figure alone neither can be
# told from perfect. LLaMa2-7B with MultiTask, .0284, can.

tries = [
    (pair_ece(calibrated_margins(2352)) + pair_ece(calibrated_margins(2312))) / 2
    for _ in range(500)
]
low, high = np.quantile(tries, [0.05, 0.95])
print(f"perfect model on the paper's two test sets: 90% of tries between {low:.4f} and {high:.4f}")

# %% What was claimed
assert np.isclose(expected_calibration_error(said, happened), by_pencil) and np.isclose(
    by_pencil, 0.1167, atol=5e-5
)
assert 0.66 < accuracy(margins) < 0.69 and pair_ece(margins) < 0.01
assert np.isclose(one_order, 1 - probability(margins).mean()) and one_order > 0.3 and shouted < 1e-6
assert np.isclose(pair_ece(margins, bins=10), usual, atol=1e-12) and (table.count > 0).sum() == 2
assert (
    accuracy(loud) == accuracy(margins)
    and 0.14 < pair_ece(loud) < 0.18
    and np.isclose(pair_ece(loud / 3), pair_ece(margins))
)
assert [round(float(probability(m)), 2) for m in (1, 3)] == [0.73, 0.95]
assert brier([0.0]) == 0.25 and np.isclose(negative_log_likelihood([0.0]), 0.693, atol=5e-4)
assert scales[np.argmin(briers)] == scales[np.argmin(losses)] == 1.0
assert accuracy(dull) == accuracy(margins) and pair_ece(dull) < 1e-9
assert brier(dull) > briers[2] and negative_log_likelihood(dull) > losses[2]
assert abs(floors[656] - 0.029) < 0.002 and 0.45 < floors[4 * 656] / floors[656] < 0.55
assert abs(low - 0.009) < 0.002 and abs(high - 0.022) < 0.002
assert 0 < min(tries) < low < 0.0109 < 0.0177 < high < 0.0284

# %% Two exercises
# Exercise 1. Give the perfect model 20 bins, and 100, on 656 pairs. How does its mean ECE move,
#             and why? Then try bins of equal count: `expected_calibration_error` of the predicted
#             winner with strategy="quantile".
# Exercise 2. Two models are compared on the same 2,000 pairs: the perfect one, and the same with
#             margins x 1.1. In what share of 500 tries has the perfect one the lower ECE? The
#             lower NLL? Which figure would you trust?
