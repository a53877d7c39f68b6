"""Tutorial 8: what ECE can and cannot say.

Question      A reward model shows an ECE of .030 on 500 pairs and another .045. Is either miscalibrated? Is the first one better?
You will see  the noise floor of an ECE; how a perfectly calibrated model looks on 133, 500 and 2,300 pairs; what is left of an ECE when noise
              is taken off, with an interval; why pairs of one prompt are not independent; and that a temperature mends an ECE and no ranking.
Takes         about 10 seconds on a laptop CPU.
"""

import numpy as np

from minimore.calibration import accuracy, fit_temperature, pair_ece, probability
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
    """Margins of a model that says `confidence` times the true log odds: 1 is perfectly calibrated."""
    odds = random.normal(0, spread, count)
    chosen = random.random(count) < probability(odds)
    return confidence * np.where(chosen, odds, -odds)


# %% A perfect model is not at zero
# ECE adds up absolute values, so noise cannot cancel: a model that is right about every probability still shows one. The paper compares ECEs of
# .005 to .05 on 656 to 2,352 pairs.

print("pairs   ECE of perfect models: mean   95% below")
for count in (133, 500, 656, 2352):
    shown = [pair_ece(model(count)) for _ in range(400)]
    print(f"{count:5d}   {np.mean(shown):27.4f}   {np.quantile(shown, 0.95):9.4f}")

# %% The floor of one model
# `noise_floor` finds this from the margins of one model alone: it draws outcomes from the model's own probabilities.

perfect, bold = model(500), model(500, confidence=3.0)
for name, m in (("perfect", perfect), ("three times too bold", bold)):
    floor = noise_floor(m)
    print(
        f"\n{name}: ECE {pair_ece(m):.3f}, floor {floor.mean:.3f} (95% below {floor.high:.3f}): "
        + (
            "miscalibrated"
            if is_miscalibrated(pair_ece(m), floor)
            else "indistinguishable from calibrated"
        ),
        end="",
    )
print()

# %% Less noise, with an interval
# What noise adds can be taken off on average, and whole prompts resampled for an interval. Below twice the floor no interval is given: there a
# bootstrap covers the truth far too seldom.

true = np.mean([pair_ece(model(200_000, 3.0)) for _ in range(3)])
_, ece = intervals(bold)
covered = np.mean(
    [
        (i := intervals(model(500, 3.0), replicates=200, seed=s)[1]).low <= true <= i.high
        for s in range(100)
    ]
)
print(
    f"\nthe bold model: ECE less noise {ece.value:.3f} [{ece.low:.3f}, {ece.high:.3f}], truly {true:.3f}; such intervals held the truth in {covered:.0%} of 100 samples"
)

# %% Pairs of one prompt are not independent
# 20 prompts with 36 pairs each, as in a summary benchmark. If prompts differ in difficulty, 720 pairs are worth far fewer.

prompts = np.repeat(np.arange(20), 36)
ease = np.repeat(random.normal(0.7, 0.6, 20), 36)
m = np.where(random.random(720) < probability(ease), 1.0, -1.0)
by_pair, by_prompt = intervals(m)[0], intervals(m, prompts)[0]
print(
    f"\naccuracy {by_pair.value:.3f}: by pair [{by_pair.low:.3f}, {by_pair.high:.3f}], by prompt [{by_prompt.low:.3f}, {by_prompt.high:.3f}]"
)

# %% Two models
# Two calibrated models on 133 pairs, as many as WebGPT's test file here has. Their ECEs differ; they may not be ranked.

a, b = model(133), model(133)
_, gap = difference_intervals(a, b)
ranked = may_rank(gap, (pair_ece(a), pair_ece(b)), (noise_floor(a), noise_floor(b)))
print(
    f"\ntwo perfect models on 133 pairs: ECE {pair_ece(a):.3f} and {pair_ece(b):.3f}; may they be ranked? {ranked}"
)

# %% A temperature
# One number, fitted on held-out pairs, mends the bold model. It divides every margin alike, so no pair changes sides: if rewards are only used to
# choose the best of several responses, a lower ECE reached like this changes nothing.

T = fit_temperature(model(500, confidence=3.0))
print(
    f"\ntemperature {T:.2f}: ECE {pair_ece(bold):.3f} -> {pair_ece(bold / T):.3f}, accuracy {accuracy(bold):.3f} -> {accuracy(bold / T):.3f}"
)

# And a model that knows nothing, and says so, is perfectly calibrated.
silent = np.full(500, 1e-9)
print(
    f"a model that always says 50%: ECE of its margins {pair_ece(np.where(random.random(500) < 0.5, silent, -silent)):.3f}, accuracy .5"
)

# %% What was claimed
assert 0.8 < np.mean([pair_ece(model(500)) for _ in range(200)]) / noise_floor(perfect).mean < 1.25
assert not is_miscalibrated(pair_ece(perfect), noise_floor(perfect)) and is_miscalibrated(
    pair_ece(bold), noise_floor(bold)
)
assert ece.low < true < ece.high and covered >= 0.88 and abs(debiased_ece(bold) - true) < 0.05
assert by_prompt.high - by_prompt.low > 1.5 * (by_pair.high - by_pair.low)
assert not ranked
assert (
    abs(T - 3) < 0.9
    and pair_ece(bold / T) < pair_ece(bold) / 2
    and accuracy(bold / T) == accuracy(bold)
)

# %% Two exercises
# Exercise 1. The paper's Table 1 has H&H ECEs of .0177 (MultiTask) and .0109 (MORE) at 1.4B on about 2,330 pairs each. Simulate two perfect models with an
#             accuracy of .65: how often do they differ as much?
# Exercise 2. Bend the margins instead of scaling them (m -> m^3). What does a temperature mend now, and what not? Draw the reliability diagram.
