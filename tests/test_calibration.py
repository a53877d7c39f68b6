"""Calibration against independent formulas."""

import math

import numpy as np
import pytest

from minimore import calibration as cal


def naive_ece(p, y, bins):
    """Loop over bins ((m - 1) / M, m / M], zero in the first."""
    total = 0.0
    for m in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[m : m + 2]
        inside = [i for i in range(len(p)) if (low < p[i] <= high) or (m == 0 and p[i] == 0)]
        if inside:
            total += abs(sum(y[i] for i in inside) - sum(p[i] for i in inside)) / len(p)
    return total


def margins(n=500, seed=0):
    return np.random.default_rng(seed).normal(0.5, 1.5, n)


@pytest.mark.parametrize("bins", [1, 5, 10, 20, 37])
def test_ece_equals_a_loop_over_bins(bins):
    rng = np.random.default_rng(bins)
    p = np.concatenate([rng.random(300), [0, 1, 0.1, 0.2, 0.5, 0.7, 1]])
    y = (rng.random(len(p)) < p).astype(float)
    assert cal.expected_calibration_error(p, y, bins) == pytest.approx(
        naive_ece(p, y, bins), abs=1e-12
    )


@pytest.mark.parametrize("bins", [2, 4, 10, 20])
def test_pair_ece_is_the_ece_of_the_winner(bins):
    m = margins()
    winner = 1 / (1 + np.exp(-np.abs(m)))
    right = (m > 0).astype(float)
    half = bins // 2
    index = np.ceil((winner - 0.5) * 2 * half).astype(int) - 1  # bins of [.5, 1], right-closed
    usual = sum(abs(right[index == b].sum() - winner[index == b].sum()) for b in range(half)) / len(
        m
    )
    assert cal.pair_ece(m, bins) == pytest.approx(usual, abs=1e-12)


def test_pair_ece_does_not_depend_on_which_side_was_written_first():
    m = margins()
    both = np.concatenate([1 / (1 + np.exp(-m)), 1 / (1 + np.exp(m))])
    assert cal.pair_ece(m) == pytest.approx(
        naive_ece(both, [1] * len(m) + [0] * len(m), 10), abs=1e-12
    )


def test_known_values():
    p, y = [0.95] * 20, [1] * 12 + [0] * 8
    assert cal.expected_calibration_error(p, y) == pytest.approx(0.35)
    m = [math.log(0.9 / 0.1)] * 10  # says .9, always right
    assert cal.pair_ece(m) == pytest.approx(0.1)
    assert cal.pair_ace(m) == pytest.approx(0.1) and cal.pair_mce(m) == pytest.approx(0.1)
    assert cal.brier(m) == pytest.approx(0.01) and cal.negative_log_likelihood(m) == pytest.approx(
        -math.log(0.9)
    )


def test_ace_and_mce_weigh_bins_not_pairs():
    m = np.array(
        [math.log(0.8 / 0.2)] * 8 + [math.log(0.6 / 0.4)] * 2
    )  # gaps .2 and .4, twice each by symmetry
    assert cal.pair_ace(m) == pytest.approx(0.3) and cal.pair_mce(m) == pytest.approx(0.4)
    assert cal.pair_ece(m) == pytest.approx(0.2 * 0.8 + 0.4 * 0.2)


def test_a_reward_tie_counts_one_half():
    assert cal.accuracy([0.0, 0.0, 1.0, -1.0]) == 0.5
    assert cal.accuracy([0.0]) == 0.5 and cal.pair_ece([0.0] * 9) == 0


def test_quantile_bins_hold_equal_counts():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(95) ** 3, [0.5] * 8])  # with ties, cut by a stable sort
    y = (rng.random(len(p)) < p).astype(float)
    r = cal.reliability(p, y, 10, "quantile")
    order = sorted(range(len(p)), key=lambda i: (p[i], i))
    parts = np.array_split(order, 10)
    assert r.count.tolist() == [len(part) for part in parts]
    expected = sum(abs(y[part].sum() - p[part].sum()) for part in parts) / len(p)
    assert cal.expected_calibration_error(p, y, 10, "quantile") == pytest.approx(
        expected, abs=1e-12
    )
    assert np.all(np.diff(r.edges) >= 0) and r.edges[-1] == p.max()


def test_more_quantile_bins_than_predictions():
    assert cal.expected_calibration_error([0.2, 0.9], [0, 1], 10, "quantile") == pytest.approx(0.15)


def test_reliability_is_symmetric_for_pairs():
    r = cal.pair_reliability(margins())
    assert np.array_equal(r.count, r.count[::-1]) and r.count.sum() == 1000
    assert np.allclose(r.accuracy + r.accuracy[::-1], 1)
    assert np.allclose(r.confidence + r.confidence[::-1], 1)


def test_extreme_margins_do_not_overflow():
    m = np.array([1e4, -1e4, 800.0, -800.0])
    assert cal.probability(m).tolist() == [1, 0, 1, 0]
    assert cal.negative_log_likelihood(m) == pytest.approx(10800 / 4)
    assert cal.brier(m) == pytest.approx(0.5)


def test_a_calibrated_model_has_the_finite_sample_floor():
    """With 656 pairs and an accuracy of 65 to 70%, a calibrated model shows about .028."""
    rng = np.random.default_rng(0)
    eces = []
    for _ in range(300):
        true = rng.normal(0, 1.1, 656)
        flip = rng.random(656) < 1 / (1 + np.exp(-true))
        eces.append(cal.pair_ece(np.where(flip, true, -true)))
    assert 0.024 < np.mean(eces) < 0.032


@pytest.mark.parametrize(
    "call",
    [
        lambda: cal.accuracy([]),
        lambda: cal.pair_ece([[1.0]]),
        lambda: cal.pair_ece([float("nan")]),
        lambda: cal.expected_calibration_error([0.5], [1, 0]),
        lambda: cal.expected_calibration_error([1.5], [1]),
        lambda: cal.expected_calibration_error([0.5], [2]),
        lambda: cal.expected_calibration_error([0.5], [1], 0),
        lambda: cal.expected_calibration_error([0.5], [1], 10, "log"),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):
        call()
