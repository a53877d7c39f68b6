"""The report's verdicts, and that two models are compared on the same pairs."""

import numpy as np

from minimore.comparison import places_of_common_pairs
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
