"""How often 95% intervals hold the truth, and how often a calibrated model is called miscalibrated. About two minutes on one core.

    python tests/bench/coverage.py [--samples 1000]

A model says `confidence` times the true log odds, which are normal(0, spread) over pairs; 1 is calibrated. Clustered: 30 pairs a prompt, whose
log odds share a normal(0, 1) term.
"""

import argparse

import numpy as np

from minimore.calibration import accuracy, pair_ece, probability
from minimore.uncertainty import intervals, is_miscalibrated, noise_floor


def margins_of(random, count, confidence=1.0, spread=1.0, shared=0.0):
    odds = random.normal(0, spread, count)
    right = random.random(count) < probability(odds + shared * np.sign(odds))
    return confidence * np.where(right, odds, -odds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000)
    samples, random = parser.parse_args().samples, np.random.default_rng(0)
    print(
        "  pairs  confidence  spread   true ECE  floor   accuracy covered  ECE covered  called miscalibrated"
    )
    for count in (133, 500, 2000):
        for confidence, spread in (
            (1.0, 0.5),
            (1.0, 1.0),
            (1.0, 2.0),
            (2.0, 1.0),
            (3.0, 1.0),
            (0.4, 1.0),
        ):
            large = [margins_of(random, 300_000, confidence, spread) for _ in range(3)]
            right, ece = (
                np.mean([accuracy(m) for m in large]),
                np.mean([pair_ece(m) for m in large]),
            )
            found = []
            for seed in range(samples):
                m = margins_of(random, count, confidence, spread)
                a, e = intervals(m, replicates=400, seed=seed)
                floor = noise_floor(m, replicates=200, seed=seed)
                found.append(
                    (
                        a.low <= right <= a.high,
                        e.low <= ece <= e.high,
                        is_miscalibrated(pair_ece(m), floor),
                        floor.mean,
                    )
                )
            a, e, called, floor = np.mean(found, 0)
            shown = f"{e:11.3f}" if ece >= 2 * floor else " " * 6 + "below"
            print(
                f"{count:7d}{confidence:12.1f}{spread:8.1f}{ece if confidence != 1 else 0:11.3f}{floor:7.3f}{a:19.3f}{shown:>13}{called:22.3f}",
                flush=True,
            )
    for prompts in (6, 20, 100):
        sample = lambda n: (
            margins_of(random, 30 * n, shared=np.repeat(random.normal(0, 1, n), 30)),
            np.repeat(np.arange(n), 30),
        )
        right = np.mean([accuracy(sample(20_000)[0]) for _ in range(2)])
        found = [
            [
                i.low <= right <= i.high
                for i in (intervals(m, p, 400, seed)[0], intervals(m, None, 400, seed)[0])
            ]
            for seed, (m, p) in enumerate(sample(prompts) for _ in range(samples))
        ]
        by_prompt, by_pair = np.mean(found, 0)
        print(
            f"{prompts} prompts of 30 pairs: accuracy covered by intervals by prompt {by_prompt:.3f}, by pair {by_pair:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
