"""A threshold, a penalty: the truth itself is best at both, at its own scale and at no other."""

import numpy as np
import pytest

from minimore.calibration import probability
from minimore.lab.scale_matters import (
    THRESHOLD,
    divergence_of,
    is_sure,
    preferences,
    tilted,
    use_of_penalty,
    use_of_threshold,
)

RANDOM = np.random.default_rng(0)


def test_sure_is_a_probability_over_the_threshold():
    rewards = 3 * RANDOM.standard_normal((50, 4))
    expected = probability(rewards[:, 1:] - rewards[:, :1]) > THRESHOLD
    assert (is_sure(rewards) == expected).all() and 0 < expected.mean() < 1


def test_preferences_are_those_of_an_annotator_drawn_at_random():
    values = RANDOM.standard_normal((6, 3, 2))
    p = preferences(values, (2.0, 0.5))
    for prompt in range(6):
        for sample in (1, 2):
            margins = values[prompt, sample] - values[prompt, 0]
            expected = np.mean([1 / (1 + np.exp(-b * m)) for b, m in zip((2.0, 0.5), margins)])
            assert p[prompt, sample - 1] == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2, 4])
def test_only_the_right_scale_uses_all_of_the_truth(temperature):
    log_odds = 2 * RANDOM.standard_normal((400, 16))
    preferred = probability(log_odds[:, 1:] - log_odds[:, :1])
    best = use_of_threshold(is_sure(log_odds), preferred)
    assert best == pytest.approx(np.maximum(preferred - THRESHOLD, 0).mean())
    assert use_of_threshold(is_sure(log_odds / temperature), preferred) < best
    best = use_of_penalty(tilted(log_odds), log_odds)
    assert best > 0 and use_of_penalty(tilted(log_odds / temperature), log_odds) < best


def test_tilted_weights_are_the_best_ones():
    """No weights have more reward minus KL, and the maximum is the log of the mean exponential."""
    truth, beta = RANDOM.standard_normal((1, 6)), 0.7
    best = use_of_penalty(tilted(truth, beta), truth, beta)
    known = beta * np.log(np.exp(truth / beta).mean()) - truth.mean()
    assert best == pytest.approx(known)
    for _ in range(200):
        assert use_of_penalty(RANDOM.dirichlet(np.ones(6), 1), truth, beta) <= best
    one = np.eye(6)[:1]
    assert divergence_of(one)[0] == pytest.approx(np.log(6))
    assert use_of_penalty(np.full((1, 6), 1 / 6), truth) == pytest.approx(0)
