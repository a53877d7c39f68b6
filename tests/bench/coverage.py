"""How often 95% intervals hold the truth, and a calibrated model is called miscalibrated.

    python tests/bench/coverage.py [--samples 1000]        about two minutes on one core

A model says `confidence` times the true log odds, which are normal(0, spread) over pairs; 1 is
calibrated. In the second table there are 30 pairs a prompt, whose log odds share a normal(0, 1)
term.
"""

import argparse

import numpy as np

from minimore.calibration import accuracy, pair_ece, probability
from minimore.tables import Table
from minimore.uncertainty import intervals, is_miscalibrated, noise_floor

MODELS = ((1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (3.0, 1.0), (0.4, 1.0))
PAIRS_A_PROMPT = 30


def margins_of(random, count, confidence=1.0, spread=1.0, shared=0.0):
    """Margins of `count` pairs. shared: what is added to the log odds of the likelier side."""
    odds = random.normal(0, spread, count)
    right = random.random(count) < probability(odds + shared * np.sign(odds))
    return confidence * np.where(right, odds, -odds)


def prompt_sample(random, prompts):
    """Margins of clustered pairs, and the prompt of each."""
    shared = np.repeat(random.normal(0, 1, prompts), PAIRS_A_PROMPT)
    margins = margins_of(random, PAIRS_A_PROMPT * prompts, shared=shared)
    return margins, np.repeat(np.arange(prompts), PAIRS_A_PROMPT)


def is_within(value, interval):
    return interval.low <= value <= interval.high


def coverage(random, count, confidence, spread, samples):
    """True ECE, mean floor, and the shares of samples that cover accuracy, ECE, or are called."""
    large = [margins_of(random, 300_000, confidence, spread) for _ in range(3)]
    true_accuracy = np.mean([accuracy(m) for m in large])
    true_ece = np.mean([pair_ece(m) for m in large])
    rows = []
    for seed in range(samples):
        margins = margins_of(random, count, confidence, spread)
        accuracies, eces = intervals(margins, replicates=400, seed=seed)
        floor = noise_floor(margins, replicates=200, seed=seed)
        called = is_miscalibrated(pair_ece(margins), floor)
        covered = is_within(true_accuracy, accuracies), is_within(true_ece, eces)
        rows.append((floor.mean, *covered, called))
    return true_ece, *np.mean(rows, 0)


def pairs_table(random, samples):
    table = Table(
        "pairs",
        "confidence",
        "spread",
        "true ECE",
        "floor",
        "accuracy covered",
        "ECE covered",
        "called miscalibrated",
    )
    for count in (133, 500, 2000):
        for confidence, spread in MODELS:
            ece, floor, by_accuracy, by_ece, called = coverage(
                random, count, confidence, spread, samples
            )
            table.add(
                count,
                confidence,
                spread,
                f"{ece if confidence != 1 else 0:.3f}",
                f"{floor:.3f}",
                f"{by_accuracy:.3f}",
                f"{by_ece:.3f}" if ece >= 2 * floor else "below",
                f"{called:.3f}",
            )
    return table


def prompts_table(random, samples):
    """How often the accuracy is covered by intervals that resample prompts, or pairs."""
    table = Table("prompts", "covered by prompt", "covered by pair")
    for prompts in (6, 20, 100):
        large = [prompt_sample(random, 20_000)[0] for _ in range(2)]
        true_accuracy = np.mean([accuracy(margins) for margins in large])
        rows = []
        for seed in range(samples):
            margins, prompt = prompt_sample(random, prompts)
            by_prompt, by_pair = (intervals(margins, unit, 400, seed)[0] for unit in (prompt, None))
            rows.append((is_within(true_accuracy, by_prompt), is_within(true_accuracy, by_pair)))
        table.add(prompts, *(f"{share:.3f}" for share in np.mean(rows, 0)))
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000)
    samples, random = parser.parse_args().samples, np.random.default_rng(0)
    print(pairs_table(random, samples), flush=True)
    print()
    print(prompts_table(random, samples))


if __name__ == "__main__":
    main()
