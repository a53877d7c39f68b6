"""Rank correlations against their definitions, and partial ones against regressions."""

from itertools import combinations

import numpy as np
import pytest

from minimore.lab.association import kendall, partial, pearson, ranks, spearman

RANDOM = np.random.default_rng(0)


def test_ranks_of_equal_values_are_shared():
    assert ranks([5, 1, 5, 5]).tolist() == [3, 1, 3, 3]
    rows = RANDOM.standard_normal((4, 9))
    expected = rows.argsort(1).argsort(1) + 1
    assert (ranks(rows) == expected).all()


def test_spearman_sees_order_only():
    x = RANDOM.standard_normal((3, 20))
    np.testing.assert_allclose(spearman(x, np.exp(x)), 1)
    np.testing.assert_allclose(spearman(x, -(x**3)), -1)
    y = RANDOM.standard_normal((3, 20))
    differences = ranks(x) - ranks(y)
    expected = 1 - 6 * (differences**2).sum(1) / (20 * (20**2 - 1))
    np.testing.assert_allclose(spearman(x, y), expected)


@pytest.mark.parametrize("has_ties", [False, True])
def test_kendall_counts_pairs(has_ties):
    x, y = RANDOM.standard_normal((2, 12))
    if has_ties:
        x, y = np.round(x), np.round(2 * y)
    same = apart_in_x = apart_in_y = 0
    for i, j in combinations(range(12), 2):
        dx, dy = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        same, apart_in_x, apart_in_y = same + dx * dy, apart_in_x + dx**2, apart_in_y + dy**2
    assert kendall(x, y) == pytest.approx(same / np.sqrt(apart_in_x * apart_in_y))


def test_without_ties_kendall_is_the_accuracy_of_pairs():
    x, y = RANDOM.standard_normal((2, 12))
    right = [(x[i] > x[j]) == (y[i] > y[j]) for i, j in combinations(range(12), 2)]
    assert kendall(x, y) == pytest.approx(2 * np.mean(right) - 1)


def test_constants_have_no_correlation():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3])) and np.isnan(kendall([1, 2], [0, 0]))
    assert np.isnan(partial([1, 2, 3, 4], [4, 1, 3, 2], [[2, 4, 6, 8]]))


def test_partial_is_the_sign_and_share_of_a_regression():
    """Its square is what x explains of what z leaves of y; its sign is that of x's coefficient."""
    z = RANDOM.standard_normal(40)
    x, y = z + RANDOM.standard_normal(40), 2 * z + RANDOM.standard_normal(40)
    one, (x_ranks, y_ranks, z_ranks) = np.ones(40), map(ranks, (x, y, z))

    def rest(*columns):
        X = np.stack([one, *columns], 1)
        coefficients, squares, _, _ = np.linalg.lstsq(X, y_ranks, rcond=None)
        return squares[0], coefficients[-1]

    without, _ = rest(z_ranks)
    with_x, coefficient = rest(z_ranks, x_ranks)
    value = partial(x, y, [z])
    assert value**2 == pytest.approx(1 - with_x / without)
    assert np.sign(value) == np.sign(coefficient)


def test_partial_is_the_formula_for_one_other():
    x, y, z = RANDOM.standard_normal((3, 25))
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial(x, y, [z]) == pytest.approx(float(expected))
    assert partial(x, y, []) == pytest.approx(float(pearson(ranks(x), ranks(y))))


def test_what_a_third_causes_is_explained_away():
    z = RANDOM.standard_normal(4000)
    x, y = z + 0.5 * RANDOM.standard_normal((2, 4000))
    assert spearman(x, y) > 0.7 and abs(partial(x, y, [z])) < 0.1
