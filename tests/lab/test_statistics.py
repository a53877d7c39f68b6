"""Derived schemes, intervals, flags and tables say what the margins say."""

import math

import numpy as np
import pytest

from minimore.calibration import accuracy, fit_temperature
from minimore.lab import published
from minimore.lab.cells import SourceMargins
from minimore.lab.scheme_tables import calibration_table, cell_text, difference_text
from minimore.lab.statistics import figures_of, noise_of_pairs, outliers, with_derived
from minimore.uncertainty import detectable, over_seeds


def seed_figures(margins, prompts):
    """The figures of one source."""
    return figures_of({"a": margins}, {"a": prompts})


# ---- derived schemes -----------------------------------------------------------------------------


@pytest.fixture
def models():
    """Two single models of different scale and one shared one, on sources a and b."""
    random, prompts = np.random.default_rng(0), np.arange(40)

    def model(spread, factor=1):
        return {
            name: SourceMargins(factor * random.normal(0.5, spread, 40), prompts % 4 != 0, prompts)
            for name in "ab"
        }

    return {"single a": model(1), "single b": model(9), "uniform": model(1, factor=3)}


def test_derived_schemes(models):
    derived = with_derived(models)
    is_test = models["uniform"]["a"].is_test
    a, b = (models[f"single {name}"] for name in "ab")
    assert np.array_equal(derived["top"]["b"], b["b"].margins[is_test])
    mean = (a["a"].margins + b["a"].margins)[is_test] / 2
    assert np.allclose(derived["averaging"]["a"], mean)
    scaled = np.zeros(is_test.sum())
    for model in (a, b):
        held_out = np.concatenate([model[name].margins[~is_test] for name in "ab"])
        scaled += model["a"].margins[is_test] / np.sqrt((held_out**2).mean()) / 2
    assert np.allclose(derived["averaging scaled"]["a"], scaled)


def test_one_temperature_is_fitted_for_all_sources_of_a_shared_model(models):
    derived = with_derived(models)
    uniform, tempered = derived["uniform"], derived["uniform + T"]
    assert len(tempered["a"]) == models["uniform"]["a"].is_test.sum()
    assert accuracy(tempered["a"]) == accuracy(uniform["a"])
    temperature = uniform["a"][0] / tempered["a"][0]
    assert 0 < temperature == pytest.approx(uniform["b"][3] / tempered["b"][3])
    assert temperature != 1
    assert "single a + T" not in derived
    assert fit_temperature([1.0, -0.5]) > 0


# ---- intervals and flags -------------------------------------------------------------------------


def test_a_cell_has_the_interval_over_seeds_and_pairs():
    half = over_seeds([0.5, 0.6, 0.7])[1]
    assert cell_text([0.5, 0.6, 0.7]) == f"0.600 ± {half:.3f}"
    assert cell_text([0.5]) == "0.500"
    assert cell_text([0.5], 0.03) == "0.500 ± 0.030"
    assert cell_text([0.5, 0.6, 0.7], 0.1) == f"0.600 ± {math.hypot(0.1, half):.3f}"


def test_a_difference_has_a_sign_and_a_flag():
    clear = [0.1, 0.1001, 0.0999]
    assert difference_text(clear).endswith("!")
    assert not difference_text([0.1, -0.1, 0.05]).endswith("!")
    assert not difference_text(clear, may_flag=False).endswith("!")
    assert not difference_text(clear, 0.2).endswith("!")
    assert difference_text([0.1], 0.02).strip() == "+0.100 ± 0.020"
    assert difference_text([0.1, 0.2]).strip() == "+0.150"  # too few seeds to flag
    assert difference_text([-0.1, -0.2]).strip() == "-0.150"


def test_flags_have_the_power_that_detectable_promises():
    random, flags, samples = np.random.default_rng(0), 0, 2000
    for _ in range(samples):
        sample = random.normal(0, 1, 10)
        shift = (2.262 + 0.842) / math.sqrt(10)
        flags += difference_text(sample + shift).endswith("!")
        assert detectable(sample) == pytest.approx(shift * sample.std(ddof=1), rel=0.01)
    assert flags / samples == pytest.approx(0.79, abs=0.04)


def test_noise_of_test_pairs():
    margins = np.random.default_rng(0).normal(0.5, 1, 900)
    row, share = seed_figures(margins, np.arange(900)), accuracy(margins)
    expected = 1.96 * math.sqrt(share * (1 - share) / 900)
    assert noise_of_pairs([row])["accuracy"][0] == pytest.approx(expected, rel=0.1)
    assert noise_of_pairs([row], [row])["accuracy"][0] == 0
    clustered = seed_figures(margins, np.arange(900) // 9)
    assert noise_of_pairs([clustered])["accuracy"][0] > 0


@pytest.mark.slow
def test_equally_calibrated_schemes_are_not_ranked_by_sharpness():
    """Two calibrated models, one sharp and one blunt, whose plain ECEs differ by noise alone."""
    random, prompts = np.random.default_rng(0), dict.fromkeys("abc", np.arange(400))
    for _ in range(40):
        schemes = {"uniform": [], "more": []}
        for _ in range(5):
            odds = random.normal(0, 1, (2, 3, 400)) * np.array([0.1, 1])[:, None, None]
            is_right = random.random(odds.shape) < 1 / (1 + np.exp(-odds))
            for rows, margins in zip(schemes.values(), np.where(is_right, odds, -odds)):
                rows.append(figures_of(dict(zip("abc", margins)), prompts))
        header, *_, row = calibration_table(schemes, list("abc"), real=False).rows
        assert row[0] == "more"
        assert "!" not in row[header.index("ECE less noise")]


def test_outliers_lie_beyond_the_whiskers():
    margins = np.array([0.0, 1, 2, 3, 4, 100])
    assert outliers(margins)[:2] == [1 / 6, 100]
    assert outliers(margins)[2] == 0 and math.isnan(outliers(margins)[3])


def test_the_papers_table():
    text = published.table_2()
    assert text.count("*") == 5 + 1 and text.count("\n") == 1 + 20
    for schemes in published.TABLE_2.values():
        for row in schemes.values():
            assert len(row) == 7 and min(row[:6]) > 40 and row[6] < 0.2
