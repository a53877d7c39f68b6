"""Tutorial 7: what ECE can and cannot say.

Question      A reward model shows an ECE of .030 on 500 pairs and another .045. Is either of them
              miscalibrated? Is the first one better?
You will see  how large the ECE of a perfectly calibrated model is on 133 to 2,352 pairs; what
              is left of an ECE when noise is taken off, with an interval; why pairs of one prompt
              are not independent; and that a temperature mends an ECE and no ranking.
Takes         about 7 seconds on a laptop CPU.
"""

import numpy as np

from minimore.calibration import accuracy, fit_temperature, pair_ece, probability
from minimore.figures.sketch import show_curves
from minimore.uncertainty import (
    debiased_ece,
    difference_intervals,
    intervals,
    is_miscalibrated,
    may_rank,
    noise_floor,
)

random = np.random.default_rng(0)


def model(count, confidence=1.0, spread=0.8):
    """Margins of a model that says `confidence` times the true log odds; 1 is calibrated."""
    odds = random.normal(0, spread, count)
    chosen_is_first = random.random(count) < probability(odds)
    return confidence * np.where(chosen_is_first, odds, -odds)


# %% A perfect model is not at zero
# ECE adds up absolute values, so noise cannot cancel. A model that is right about every probability
# still shows an ECE, and a larger one on fewer pairs.

COUNTS = 133, 500, 656, 2352
draws = {count: [pair_ece(model(count)) for _ in range(300)] for count in COUNTS}
means = [np.mean(draws[count]) for count in COUNTS]
highs = [np.quantile(draws[count], 0.95) for count in COUNTS]
print("ECE of 300 perfect models\npairs    mean   95% lie below")
for count, mean_ece, high in zip(COUNTS, means, highs):
    print(f"{count:5d}   {mean_ece:.4f}   {high:.4f}")
curves = {"95% lie below": (np.log2(COUNTS), highs), "mean": (np.log2(COUNTS), means)}
show_curves("07_floor", "ECE of a model that is calibrated", "log2 pairs", "ECE", curves)

# So the question above is answered: on 500 pairs .030 is less than a perfect model shows on the
# mean, and .045 no more than it may. Neither is miscalibrated, as far as 500 pairs can tell. Nor is
# the first one better: two perfect models differ by more than this in two of five tries.
#
# The paper's Table 1 has ECEs of .0177 (MultiTask) and .0109 (MORE) at 1.4B, means over two test
# sets of 2,352 and 2,312 pairs. A perfect model lands there between about .009 and .022 in nine of
# ten tries. LLaMa2-7B with MultiTask, .0284, is above that.

gaps = [abs(a - b) for a, b in zip(draws[500][::2], draws[500][1::2])]
as_large = np.mean(np.array(gaps) > 0.015)
tries = [(pair_ece(model(2352)) + pair_ece(model(2312))) / 2 for _ in range(300)]
low, high = np.quantile(tries, [0.05, 0.95])
print(f"\ntwo perfect models on 500 pairs differ by more than .015 in {as_large:.0%} of tries")
print(f"perfect models on the paper's two test sets: 90% between {low:.4f} and {high:.4f}")

# %% The floor of one model
# In practice there is one model and no second draw of the labels. `noise_floor` draws outcomes from
# the model's own probabilities, so it needs that model's margins only.

perfect = model(500)
bold = model(500, confidence=3.0)
for name, margins in (("perfect", perfect), ("three times too bold", bold)):
    floor, ece = noise_floor(margins), pair_ece(margins)
    verdict = (
        "miscalibrated" if is_miscalibrated(ece, floor) else "indistinguishable from calibrated"
    )
    print(f"\n{name}: ECE {ece:.3f}, floor {floor.mean:.3f} (95% lie below {floor.high:.3f})")
    print(f"    {verdict}")

# %% Less noise, with an interval
# What noise adds can be taken off on average. For an interval the test set is drawn anew, with
# replacement, many times (a bootstrap), and each time the figure is computed again: how far these
# replicates scatter makes the interval. Below twice the floor none is given, because there such
# intervals hold the truth too seldom.

true = np.mean([pair_ece(model(200_000, 3.0)) for _ in range(3)])
_, ece_of_bold = intervals(bold)
hits = []
for seed in range(60):
    _, ece = intervals(model(500, 3.0), replicates=200, seed=seed)
    hits.append(ece.low <= true <= ece.high)
covered = np.mean(hits)
print(f"\nthe bold model: ECE less noise {ece_of_bold.value:.3f}", end=" ")
print(f"[{ece_of_bold.low:.3f}, {ece_of_bold.high:.3f}], truly {true:.3f}")
print(f"such intervals held the truth in {covered:.0%} of 60 samples")

# %% Pairs of one prompt are not independent
# Take 20 prompts with 36 pairs each, as in a summary benchmark. If prompts differ in difficulty,
# 720 pairs are worth far fewer: another test set would have 20 other prompts, some of them easier.
# Whoever draws single pairs anew keeps all 20 prompts, and misses that. So whole prompts are drawn,
# with all their pairs. Compare the widths of the two intervals.

prompts = np.repeat(np.arange(20), 36)
ease = np.repeat(random.normal(0.7, 0.6, 20), 36)
margins = np.where(random.random(720) < probability(ease), 1.0, -1.0)
by_pair, _ = intervals(margins)
by_prompt, _ = intervals(margins, prompts)
print(f"\naccuracy {by_pair.value:.3f}")
print(f"    resampled by pair   [{by_pair.low:.3f}, {by_pair.high:.3f}]")
print(f"    resampled by prompt [{by_prompt.low:.3f}, {by_prompt.high:.3f}]")

# %% Two models
# Two calibrated models on 133 pairs, as many as a small test set has. Their ECEs differ. They may
# not be ranked: both lie near their floors.

a, b = model(133), model(133)
_, difference = difference_intervals(a, b)
eces, floors = (pair_ece(a), pair_ece(b)), (noise_floor(a), noise_floor(b))
ranked = may_rank(difference, eces, floors)
print(f"\ntwo perfect models on 133 pairs: ECE {eces[0]:.3f} and {eces[1]:.3f}")
print(f"may they be ranked? {ranked}")

# %% A temperature
# One number T, fitted on held-out pairs, mends the bold model. It divides every margin alike,
#
#     P(chosen preferred) = σ(m / T)
#
# so no pair changes sides. If rewards are only used to choose the best of several responses, a
# lower ECE that is reached like this changes nothing.

T = fit_temperature(model(500, confidence=3.0))
print(f"\ntemperature {T:.2f}")
print(f"    ECE      {pair_ece(bold):.3f} -> {pair_ece(bold / T):.3f}")
print(f"    accuracy {accuracy(bold):.3f} -> {accuracy(bold / T):.3f}")

# A model that knows nothing, and says so, is perfectly calibrated, too: on 500 pairs its ECE is the
# chance by which a coin misses one half, on the mean of 300 tries.
silent = np.where(random.random((300, 500)) < 0.5, 1e-9, -1e-9)
ece_of_silent = np.mean([pair_ece(margins) for margins in silent])
print(f"a model that always says 50%: ECE {ece_of_silent:.3f}, which is noise; accuracy .5")

# %% What was claimed
assert 0.8 < means[1] / noise_floor(perfect).mean < 1.25
assert means[1] > 0.030 - 0.002 and highs[1] > 0.045 and 0.2 < as_large < 0.6
assert abs(low - 0.009) < 0.003 and abs(high - 0.022) < 0.003 and high < 0.0284
assert abs(ece_of_silent - 0.018) < 0.003  # sqrt(2 / π) times .5 / sqrt(500)
assert not is_miscalibrated(pair_ece(perfect), noise_floor(perfect))
assert is_miscalibrated(pair_ece(bold), noise_floor(bold))
assert ece_of_bold.low < true < ece_of_bold.high and covered >= 0.88
assert abs(debiased_ece(bold) - true) < 0.05
assert by_prompt.high - by_prompt.low > 1.5 * (by_pair.high - by_pair.low)
assert not ranked
assert abs(T - 3) < 0.9 and pair_ece(bold / T) < pair_ece(bold) / 2
assert accuracy(bold / T) == accuracy(bold)

# %% Two exercises
# Exercise 1. Simulate two perfect models with an accuracy of .65 on the paper's two test sets. How
#             often do their ECEs differ as much as those of MultiTask and MORE?
# Exercise 2. Bend the margins instead of scaling them (m -> m^3). What does a temperature mend now,
#             and what not? Draw the reliability diagram.
