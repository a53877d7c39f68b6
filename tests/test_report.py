"""The report's verdicts, and that two models are compared on the same pairs."""

import numpy as np
import pytest

from minimore.comparison import mean_difference, places_of_common_pairs, temperature_table
from minimore.data.pairs import Source, TokenPair
from minimore.report import is_at_chance, source_report, verdict


def source_of(indices):
    """A source whose pairs stand at these places of their file, every one on its own prompt."""
    ids = np.array([1, 2], dtype=np.int32)
    pairs = [TokenPair(ids, ids, 1, 0, prompt=index, index=index) for index in indices]
    return Source("ana", pairs=pairs)


def test_a_pair_is_compared_with_itself_where_each_model_dropped_others():
    mine, theirs = source_of([0, 2, 3, 5]), source_of([2, 1, 5, 0])
    places, their_places = places_of_common_pairs(mine, theirs)
    assert places == [0, 1, 3]
    assert [mine.pairs[place].index for place in places] == [0, 2, 5]
    assert [theirs.pairs[place].index for place in their_places] == [0, 2, 5]


def test_the_verdict_says_in_which_direction_probabilities_are_wrong():
    random = np.random.default_rng(0)
    odds = random.normal(0, 1.5, 3000)
    true = np.where(random.random(3000) < 1 / (1 + np.exp(-odds)), odds, -odds)
    source = source_of(range(3000))
    verdicts = {scale: source_report(scale * true, source)["calibration"] for scale in (3, 1, 0.3)}
    assert verdicts == {3: "over-confident", 1: "indistinguishable", 0.3: "under-confident"}


def test_a_report_is_at_chance_where_no_interval_excludes_it():
    random = np.random.default_rng(0)
    by_chance = source_report(random.normal(0, 1, 200), source_of(range(200)))
    better = source_report(random.normal(1, 1, 200), source_of(range(200)))
    worse = source_report(random.normal(-1, 1, 200), source_of(range(200)))
    tiny = source_report(np.ones(2), source_of(range(2)))  # has no interval
    rows = {"chance": by_chance, "better": better, "worse": worse, "tiny": tiny}
    at_chance = {
        names: is_at_chance({"sources": {name: rows[name] for name in names.split()}})
        for names in ("chance", "chance tiny", "chance better", "worse", "tiny")
    }
    assert [names for names in at_chance if at_chance[names]] == ["chance", "chance tiny"]


def test_margins_that_are_rounding_are_called_so():
    """An accuracy of 1 on margins of 1e-16 is no accuracy, and no calibration either."""
    for scale in (1e-7, 1e-15, 1e-16):
        row = source_report(np.full(40, scale), source_of(range(40)))
        assert row["calibration"] == "no margins" and "tells nothing apart" in verdict(row)
    assert source_report(np.full(40, 1e-3), source_of(range(40)))["calibration"] != "no margins"


def difference(accuracy, half, ece_interval=(-0.1, 0.3)):
    """A row of `compare` with these numbers."""
    interval = [accuracy - half, accuracy + half]
    ece = None if ece_interval is None else list(ece_interval)
    return {
        **{"pairs": 10, "exceeds_noise": [], "accuracy": accuracy, "accuracy_interval": interval},
        **{"nll": 0.1, "nll_interval": [0.1, 0.1], "ece_debiased": 0.1, "ece_interval": ece},
    }


def test_sources_are_independent_parts_of_a_mean_difference():
    """The half of a mean of two: √(.03² + .04²) / 2 = .025."""
    mean = mean_difference({"a": difference(0.02, 0.03), "b": difference(0.04, 0.04)})
    assert mean["accuracy"] == pytest.approx(0.03) and mean["pairs"] == 20
    assert mean["accuracy_interval"] == pytest.approx([0.005, 0.055])
    assert mean["exceeds_noise"] == ["accuracy", "nll"]
    unranked = mean_difference({"a": difference(0.02, 0.03), "b": difference(0.04, 0.04, None)})
    assert unranked["ece_interval"] is None


@pytest.mark.parametrize("temperature", [1.5, None])
def test_a_missing_temperature_is_explained_whatever_a_source_is_called(temperature):
    figures = {"ece": 0.1, "nll": 0.6}
    row = {"temperature": temperature, **figures, "by_pooled": figures, "by_own": figures}
    text = temperature_table({"pooled": 1.2, "sources": {"nonesuch": row}})
    assert ("none: no such pairs" in text) == (temperature is None)
