"""Best of n without drawing: the same as the mean over all subsets, and as known expectations."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from minimore.lab.best_of import (
    averaged_over_ties,
    choices,
    chosen,
    curve,
    expected_best,
    powers_of_two,
    weights_of_ranks,
)

RANDOM = np.random.default_rng(0)


def over_all_subsets(proxy, value, n):
    """The mean over all subsets of n of the value of their best; of equal ones, of all of these."""
    best = []
    for places in combinations(range(len(proxy)), n):
        top = [place for place in places if proxy[place] == max(proxy[p] for p in places)]
        best.append(np.mean(value[top]))
    return np.mean(best)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("n", range(1, 8))
def test_expected_best_is_the_mean_over_all_subsets(n, has_ties):
    proxy, value = RANDOM.standard_normal((2, 5, 7))
    if has_ties:
        proxy = np.round(proxy)
    expected = [over_all_subsets(p, v, n) for p, v in zip(proxy, value)]
    np.testing.assert_allclose(expected_best(proxy, value, n), expected, rtol=1e-12)


@pytest.mark.parametrize("N, n", [(1, 1), (5, 2), (64, 1), (64, 4), (64, 32), (64, 64)])
def test_weights_are_shares_of_subsets(N, n):
    expected = [comb(i - 1, n - 1) / comb(N, n) for i in range(1, N + 1)]
    np.testing.assert_allclose(weights_of_ranks(N, n), expected, rtol=1e-12, atol=1e-300)


def test_the_best_of_n_ranks_has_the_expectation_of_order_statistics():
    """The largest of n out of 1 ... N drawn without replacement is n (N + 1) / (n + 1)."""
    ranks = np.arange(1.0, 65)[None]
    for n in (1, 2, 4, 8, 16, 32, 64):
        assert expected_best(ranks, ranks, n)[0] == pytest.approx(n * 65 / (n + 1), rel=1e-12)


def test_best_of_n_of_many_samples_is_that_of_their_distribution():
    """With as many samples as quantiles of a normal, the best of 4 is 1.0294 (David 1981)."""
    from statistics import NormalDist

    quantiles = [NormalDist().inv_cdf((i + 0.5) / 20_000) for i in range(20_000)]
    assert expected_best([quantiles], [quantiles], 4)[0] == pytest.approx(1.02938, abs=1e-3)
    assert expected_best([quantiles], [quantiles], 2)[0] == pytest.approx(np.pi**-0.5, abs=1e-3)


def test_a_useless_proxy_gains_nothing_and_a_reversed_one_loses():
    value = RANDOM.standard_normal((3, 64))
    constant = np.zeros((3, 64))
    for n in (1, 4, 64):
        np.testing.assert_allclose(expected_best(constant, value, n), value.mean(1), rtol=1e-9)
    worst = expected_best(-value, value, 64)
    np.testing.assert_allclose(worst, value.min(1))
    rising = curve(value, value, powers_of_two(64))
    assert (np.diff(rising) > 0).all() and rising[-1] == pytest.approx(value.max(1).mean())


def test_rows_do_not_share_their_ties():
    ordered = np.array([[0.0, 0.0], [0.0, 1.0]])
    weights = np.array([[1.0, 3.0], [5.0, 7.0]])
    assert averaged_over_ties(weights, ordered).tolist() == [[2, 2], [5, 7]]


def test_more_than_there_are_is_refused():
    for n in (0, 5):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            weights_of_ranks(4, n)


def test_the_first_of_equal_ones_is_chosen():
    places = choices([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert places.tolist() == [1, 0]
    assert chosen([[10, 11, 12], [20, 21, 22]], places).tolist() == [11, 20]
