"""Intervals cover, the floor is where it should be, and noise alone gives no verdict.

Seeds are fixed; bench/coverage.py has the long run.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from runs import slow_but

from minimore.calibration import (
    accuracy,
    fit_temperature,
    negative_log_likelihood,
    pair_ece,
    probability,
)
from minimore.uncertainty import (
    Floor,
    Interval,
    _erf,
    _interval,
    debiased_ece,
    difference_intervals,
    intervals,
    is_miscalibrated,
    may_rank,
    mean_interval,
    noise_floor,
    prompt_sums,
    student_t,
)


def margins_of(random, count, confidence=1.0, spread=1.0, group=None):
    """Margins of a model that says `confidence` times the log odds, which are normal.

    group: what the true log odds have in addition, the same for all pairs of a prompt.
    """
    odds = random.normal(0, spread, count)
    true_odds = odds if group is None else odds + group * np.sign(odds)
    right = random.random(count) < probability(true_odds)
    return confidence * np.where(right, odds, -odds)


def test_the_floor_is_what_calibrated_models_show():
    random = np.random.default_rng(0)
    for count, spread in ((133, 1.0), (500, 2.0), (2000, 0.5)):
        shown = [pair_ece(margins_of(random, count, spread=spread)) for _ in range(300)]
        floors = [
            noise_floor(margins_of(random, count, spread=spread), replicates=200, seed=i)
            for i in range(10)
        ]
        assert np.mean([f.mean for f in floors]) == pytest.approx(np.mean(shown), rel=0.08)
        assert np.mean([f.high for f in floors]) == pytest.approx(
            np.quantile(shown, 0.95), rel=0.12
        )


def test_the_floor_of_certain_margins_is_zero_and_of_none_a_coin():
    assert noise_floor([800.0, -900.0]).mean == 0
    coin = noise_floor(np.zeros(400), replicates=2000)
    # With a probability of exactly 1/2 in both orders the two mirror images cancel.
    assert coin.mean == pytest.approx(0, abs=1e-12)
    assert noise_floor(np.full(400, 0.1), replicates=2000).mean == pytest.approx(
        math.sqrt(2 / math.pi) * 0.5 / 20, rel=0.05
    )


@pytest.mark.parametrize("count", slow_but([133], [133, 500]))
def test_calibrated_models_are_seldom_called_miscalibrated(count):
    random = np.random.default_rng(1)
    alarms = [
        is_miscalibrated(pair_ece(m), noise_floor(m, replicates=200))
        for m in (margins_of(random, count, spread=0.7) for _ in range(200))
    ]
    assert np.mean(alarms) <= 0.05
    assert is_miscalibrated(
        pair_ece(margins_of(random, 2000, 3.0)),
        noise_floor(margins_of(random, 2000, 3.0), replicates=200),
    )


@pytest.mark.parametrize(
    "count, confidence",
    [
        (133, 3.0),
        pytest.param(500, 0.4, marks=pytest.mark.slow),
        pytest.param(500, 2.0, marks=pytest.mark.slow),
    ],
)
def test_intervals_cover(count, confidence):
    """200 samples: a share of .95 has a standard error of .015."""
    random = np.random.default_rng(2)
    large = [margins_of(random, 400_000, confidence) for _ in range(3)]
    true = np.mean([accuracy(m) for m in large]), np.mean([pair_ece(m) for m in large])
    estimates = [
        intervals(margins_of(random, count, confidence), replicates=300, seed=i) for i in range(200)
    ]
    covered = [
        np.mean([i[which].low <= true[which] <= i[which].high for i in estimates])
        for which in (0, 1)
    ]
    assert 0.91 <= covered[0] <= 0.985 and covered[1] >= 0.90
    assert abs(np.mean([ece.value for _, ece in estimates]) - true[1]) < 0.1 * true[1]


@pytest.mark.slow
def test_intervals_by_prompt_cover_where_intervals_by_pair_do_not():
    random, intervals_by = np.random.default_rng(3), {"prompt": [], "pair": []}

    def sample(prompts):
        """Margins of 30 pairs a prompt that go together, and the prompt of each."""
        group = np.repeat(random.normal(0, 1.0, prompts), 30)
        return margins_of(random, prompts * 30, group=group), np.repeat(np.arange(prompts), 30)

    true = np.mean([accuracy(sample(20_000)[0]) for _ in range(2)])
    for i in range(200):
        m, prompts = sample(20)
        intervals_by["prompt"].append(intervals(m, prompts, 300, i)[0])
        intervals_by["pair"].append(intervals(m, None, 300, i)[0])
    covered = {
        kind: np.mean([a.low <= true <= a.high for a in of_kind])
        for kind, of_kind in intervals_by.items()
    }
    assert covered["prompt"] > 0.90 and covered["pair"] < 0.80, covered


@pytest.mark.parametrize("prompts, each", [(20, 36), pytest.param(6, 100, marks=pytest.mark.slow)])
def test_prompts_whose_pairs_go_together_do_not_raise_false_alarms(prompts, each):
    """Calibrated on the whole, but the outcomes of one prompt's pairs are drawn together.

    They are drawn by a Gaussian copula with a correlation of .3.
    """
    random, alarms = np.random.default_rng(8), {"prompt": 0, "pair": 0}
    for _ in range(120):
        odds = np.abs(random.normal(0, 1, prompts * each))
        latent = np.repeat(random.normal(0, math.sqrt(0.3), prompts), each) + random.normal(
            0, math.sqrt(0.7), prompts * each
        )
        m = np.where([NormalDist().cdf(x) for x in latent] < probability(odds), odds, -odds)
        for kind, groups in (("prompt", np.repeat(np.arange(prompts), each)), ("pair", None)):
            alarms[kind] += is_miscalibrated(pair_ece(m), noise_floor(m, groups, replicates=100))
    assert alarms["prompt"] <= 12 and alarms["pair"] > 2 * alarms["prompt"]


@pytest.mark.slow
def test_debiasing_takes_off_what_noise_adds():
    random = np.random.default_rng(4)
    for confidence in (2.0, 0.4):
        true = pair_ece(margins_of(random, 400_000, confidence))
        m = [margins_of(random, 300, confidence) for _ in range(400)]
        plain, less = np.mean([pair_ece(x) for x in m]), np.mean([debiased_ece(x) for x in m])
        assert abs(less - true) < 0.4 * abs(plain - true) + 0.002
    large = margins_of(random, 300_000, 2.0)
    assert debiased_ece(large) == pytest.approx(pair_ece(large), abs=1e-3)


def test_paired_differences():
    random = np.random.default_rng(5)
    m = margins_of(random, 600)
    same = difference_intervals(m, m)
    assert all(i == Interval(0, 0, 0) and not i.excludes_zero for i in same)
    accuracies, ece = difference_intervals(3 * m, m)
    assert (
        accuracies == Interval(0, 0, 0) and ece.low > 0.05
    )  # margins three times too large, the same ranking
    worse = np.where(random.random(600) < 0.2, -m, m)
    difference, _ = difference_intervals(worse, m)
    assert difference.value == pytest.approx(accuracy(worse) - accuracy(m)) and difference.high < 0
    apart = [intervals(x)[0] for x in (worse, m)]
    assert difference.high - difference.low < sum(i.high - i.low for i in apart)
    with pytest.raises(ValueError, match="same pairs"):
        difference_intervals(m, m[1:])


@pytest.mark.slow
def test_eces_within_the_floor_are_not_ranked():
    floor = Floor(0.06, 0.1)
    assert not may_rank(Interval(0.05, 0.01, 0.09), (0.11, 0.05), (floor, floor))
    assert may_rank(Interval(0.05, 0.01, 0.09), (0.20, 0.05), (floor, floor))
    assert not may_rank(Interval(0.05, -0.01, 0.09), (0.20, 0.05), (floor, floor))
    random, ranked = np.random.default_rng(6), 0
    for _ in range(60):  # two calibrated models on 133 pairs
        odds = random.normal(0, 1, 133)
        sign = np.where(random.random(133) < probability(odds), 1, -1)
        a, b = odds * sign, (odds + random.normal(0, 0.3, 133)) * sign
        _, ece = difference_intervals(a, b, replicates=200)
        ranked += may_rank(
            ece,
            (pair_ece(a), pair_ece(b)),
            (noise_floor(a, replicates=200), noise_floor(b, replicates=200)),
        )
    assert ranked <= 3


def test_prompts_are_summed():
    m = np.array([1.0, -2.0, 0.0, 0.5])
    sums = prompt_sums(m, [7, 3, 7, 3])
    assert sums.pairs.tolist() == [2, 2] and sums.right.tolist() == [1, 1.5]
    assert np.abs(sums.gaps.sum(0)).sum() / 8 == pytest.approx(pair_ece(m))
    assert len(prompt_sums(m, [1, 1, 1, 1]).pairs) == 4  # one prompt cannot be resampled
    assert math.isnan(intervals(m[:2])[0].low)  # two prompts leave no interval
    assert intervals(np.ones(10))[0] == Interval(1, 0.7, 1) and intervals(-np.ones(10))[
        0
    ] == Interval(0, 0, 0.3)
    assert intervals(m, [0, 0, 1, 2])[0].low == pytest.approx(0.25, abs=0.26)


def test_few_prompts_have_wider_intervals():
    replicates = np.random.default_rng(0).standard_normal(400_000)
    for prompts, half in ((6, 2.571 * math.sqrt(6 / 5)), (1000, 1.962)):
        interval = _interval(0.0, replicates, prompts)
        assert interval.high == pytest.approx(half, rel=0.02) and interval.low == pytest.approx(
            -half, rel=0.02
        )


def test_prompts_that_all_say_the_same_leave_nothing_to_take_off():
    m = np.tile([0.3, -0.3, 0.3], 5)
    assert debiased_ece(m, np.repeat(np.arange(5), 3)) == pytest.approx(pair_ece(m), abs=1e-9)
    assert debiased_ece(m) < pair_ece(m) - 0.01  # as 15 pairs of 15 prompts they might be chance


def test_small_tools():
    x = np.linspace(0, 5, 200)
    assert np.abs(_erf(x) - torch.erf(torch.tensor(x)).numpy()).max() < 2e-7
    for freedom, t in ((2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert student_t(freedom) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_temperature_minimises_the_loss(scale):
    m = scale * margins_of(np.random.default_rng(7), 300, 2.0)
    t = torch.zeros(
        (), dtype=torch.float64, requires_grad=True
    )  # log of 1 / T, in units of the scale
    optimizer = torch.optim.LBFGS(
        [t],
        lr=1,
        max_iter=500,
        tolerance_grad=1e-15,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-t.exp() / scale * torch.tensor(m)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert fit_temperature(m) == pytest.approx(scale / math.exp(t.item()), rel=1e-6)
    best = fit_temperature(m)
    assert negative_log_likelihood(m / best) < min(
        negative_log_likelihood(m / (best * f)) for f in (0.99, 1.01)
    )


def test_temperatures_that_do_not_exist_are_flagged():
    assert fit_temperature([1.0, 0.5, 0.0]) == 0  # separable
    assert fit_temperature([1.0, -2.0]) == fit_temperature([0.0, 0.0]) == math.inf
    assert 0 < fit_temperature([1e8, 1e8, -1e-8]) < math.inf
    assert fit_temperature([0.1, 0.2, -0.3]) == math.inf  # their mean is 0 but for rounding
    with np.errstate(all="raise"):
        assert 0 < fit_temperature([1e308, 1e308, -1e307]) < math.inf


def test_the_interval_of_a_mean_covers_it_when_pairs_of_a_prompt_go_together():
    random, covered = np.random.default_rng(0), 0
    prompts = np.repeat(np.arange(40), 3)
    for _ in range(400):
        values = 1 + random.normal(size=40)[prompts] + 0.3 * random.normal(size=120)
        interval = mean_interval(values, prompts)
        covered += interval.low <= 1 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98
    assert mean_interval([1.0, 3.0], [0, 1])[0] == 2 and math.isnan(mean_interval([1.0, 3.0])[1])
    alone = mean_interval(values)
    assert alone.high - alone.low < 0.7 * (interval.high - interval.low)
