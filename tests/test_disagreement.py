"""What annotators disagree about: unbiased to the last digit, over all votes that may be."""

import math

import numpy as np
import pytest

from minimore.calibration import (
    accuracy,
    brier,
    expected_calibration_error,
    fit_temperature,
    majority,
    negative_log_likelihood,
    pair_ece,
    probability,
)
from minimore.disagreement import disagreement, entropy_bounds, power_of_lead
from minimore.uncertainty import debiased_ece, intervals, prompt_sums


def mean_over_votes(function, p, n):
    """The exact mean of a function of (votes for, votes against) when each is for with p."""
    return sum(
        math.comb(n, a) * p**a * (1 - p) ** (n - a) * function(a, n - a) for a in range(n + 1)
    )


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_estimates_of_the_annotators_part_are_unbiased(p, n):
    entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q)
    lower, upper = (
        mean_over_votes(lambda a, b, i=i: entropy_bounds(a, b)[i], p, n) for i in (0, 1)
    )
    assert lower <= entropy + 1e-12 and entropy <= upper + 1e-12
    if p in (0, 0.5, 1):
        assert lower == pytest.approx(entropy, abs=1e-12)
    for power in range(n + 1):
        estimate = mean_over_votes(lambda a, b, k=power: power_of_lead(a, b, k), p, n)
        assert estimate == pytest.approx((2 * p - 1) ** power, abs=1e-12)

    def floor(a, b):
        return disagreement([0.3], [a / n], [n]).brier_floor

    assert mean_over_votes(floor, p, n) == pytest.approx(p * (1 - p), abs=1e-12)


def test_bounds_close_in_with_votes():
    gaps = [
        np.subtract(
            *(mean_over_votes(lambda a, b, i=i: entropy_bounds(a, b)[i], 0.8, n) for i in (1, 0))
        )
        for n in (2, 4, 10)
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    uppers = [entropy_bounds(n, 0)[1] for n in (8, 10, 12)]
    assert uppers[0] > uppers[1] == uppers[2]  # five terms of the series at most


def test_the_scores_of_a_model_split_into_both_parts():
    """Of a model that is wrong by a known amount, on many pairs of few votes."""
    random = np.random.default_rng(0)
    true = random.normal(0, 1.2, 20_000)
    p, q = probability(true), probability(2 * true)
    figures = disagreement(2 * true, random.binomial(4, p) / 4, np.full(20_000, 4.0))
    assert figures.brier - figures.brier_floor == pytest.approx(np.mean((p - q) ** 2), abs=0.004)
    kl = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    low, high = (figures.nll - floor for floor in reversed(figures.nll_floor))
    assert low - 0.006 < kl < high + 0.006 and high - low < 0.05
    assert figures.model_agrees == pytest.approx(np.mean(np.maximum(p, 1 - p)), abs=0.006)
    assert figures.annotators_agree == pytest.approx(np.mean(p**2 + (1 - p) ** 2), abs=0.006)
    assert figures.annotators_agree < figures.model_agrees < figures.ceiling


def test_pairs_without_two_whole_votes_are_not_used():
    assert disagreement([1.0, 2.0, 0.5, 1.0], [1, 0.5, 0.6, 0.4], [1, 1, 2.5, 2.5]) is None
    figures = disagreement([1.0, 2.0], [1, 2 / 3], [1, 3])
    assert (figures.pairs, figures.votes) == (1, 3)
    assert figures.brier_floor == pytest.approx(1 / 3)


# ---- outcomes in [0, 1] --------------------------------------------------------------------------

MARGINS = np.random.default_rng(1).normal(0.4, 1.3, 200)
VOTES = np.random.default_rng(2).integers(0, 4, 200)  # of three, for the chosen response


@pytest.mark.parametrize("score", [accuracy, brier, negative_log_likelihood])
def test_a_score_on_shares_is_its_mean_over_single_votes(score):
    single = np.concatenate([[m] * a + [-m] * (3 - a) for m, a in zip(MARGINS, VOTES)])
    assert score(MARGINS, VOTES / 3) == pytest.approx(score(single), abs=1e-12)
    assert score(MARGINS, 1.0) == score(MARGINS)


def test_calibration_on_shares_is_that_of_single_votes():
    single = np.concatenate([[m] * a + [-m] * (3 - a) for m, a in zip(MARGINS, VOTES)])
    assert pair_ece(MARGINS, outcomes=VOTES / 3) == pytest.approx(pair_ece(single), abs=1e-12)
    p = probability(MARGINS)
    outcomes = np.concatenate([[1] * a + [0] * (3 - a) for a in VOTES])
    assert expected_calibration_error(p, VOTES / 3) == pytest.approx(
        expected_calibration_error(np.repeat(p, 3), outcomes), abs=1e-12
    )
    temperature = fit_temperature(MARGINS, VOTES / 3)
    assert temperature == fit_temperature(single) or temperature == pytest.approx(
        fit_temperature(single), abs=1e-9
    )


def test_temperatures_of_votes():
    shares = probability(MARGINS)
    assert fit_temperature(3 * MARGINS, shares) == pytest.approx(3)
    assert fit_temperature(np.abs(MARGINS), 1.0) == 0
    assert fit_temperature(MARGINS, (MARGINS > 0).astype(float)) == 0
    assert fit_temperature(MARGINS, 0.5) == np.inf


def test_the_majority_and_its_even_splits():
    assert majority([0, 0.4, 0.5, 0.75, 1]).tolist() == [0, 0, 0.5, 1, 1]
    sums = prompt_sums([1.0, 1.0, -1.0, 1.0], outcomes=[1, 0.25, 0.25, 0.5])
    assert sums.right.tolist() == [1, 0, 1, 0.5]
    turned = prompt_sums([-1.0, -1.0, 1.0, -1.0], outcomes=[0, 0.75, 0.75, 0.5])
    assert turned.right.tolist() == sums.right.tolist()
    assert np.allclose(turned.gaps, sums.gaps)


def test_one_vote_a_pair_changes_no_digit():
    assert intervals(MARGINS, outcomes=np.ones(200)) == intervals(MARGINS)
    assert debiased_ece(MARGINS, outcomes=1.0) == debiased_ece(MARGINS)


@pytest.mark.parametrize("wrong", [[0.5] * 3, [1.5] * 200, [np.nan] * 200, -0.1])
def test_outcomes_that_are_none_are_refused(wrong):
    for call in (accuracy, brier, fit_temperature, negative_log_likelihood):
        with pytest.raises(ValueError):
            call(MARGINS, wrong)
    with pytest.raises(ValueError):
        pair_ece(MARGINS, outcomes=wrong)
