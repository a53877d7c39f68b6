"""The conversion on the public files themselves, where they are at hand.

MINIMORE_DATA names their directory (default ../shared/data).
"""

import os
from pathlib import Path

import pytest
from conftest import ROOT

from minimore.data.foreign.convert import Tally, converted
from minimore.data.forms import record_pairs
from minimore.data.records import read_records

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
NATIVE = DATA / "native"
UKP = "ban-plastic-water-bottles"
pytestmark = pytest.mark.skipif(
    not NATIVE.is_dir(), reason=f"no preference data in {DATA}; set MINIMORE_DATA"
)


def read(path):
    """By taste, the pairs of a converted file; and what was counted."""
    pairs, tally = {}, Tally()
    for where, record in converted(str(NATIVE / path), tally=tally):
        here = pairs.setdefault(record.get("taste"), [])
        here += [pair[:3] for pair in record_pairs(record, where)[0]]
    return pairs, tally


def normalised(name):
    """Every (prompt, chosen, rejected) of a source, train and test."""
    return {
        (record["prompt"], record["chosen"], record["rejected"])
        for split in ("train", "test")
        for _, record in read_records(str(DATA / "pairs" / f"{name}.{split}.jsonl.gz"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, name, records, pairs, ties, left_out",
    [
        ("hh-rlhf/harmless-base/test.jsonl.gz", "hh_harmless", 2312, 2308, 0, {"blank": 4}),
        ("text-score/helpful.test.json.gz", "hh_helpful", 2352, 2348, 0, {"blank": 4}),
        ("text-score/webgpt.test.json.gz", "webgpt", 901, 656, 245, {}),
        ("oasst1/messages.jsonl.gz", "oasst1", 2022, 1025, 0, {"no rank": 113, "equal": 1}),
    ],
)
def test_the_published_counts_and_pairs(path, name, records, pairs, ties, left_out):
    by_taste, tally = read(path)
    total = tally.total()
    assert (tally.records, total.pairs, total.ties) == (records, pairs, ties)
    assert total.left_out == left_out
    assert len(by_taste[None]) == pairs and set(by_taste[None]) == normalised(name)


@pytest.mark.slow
def test_the_four_tastes_of_dsp():
    by_taste, tally = read("text-score/domain_specific_preference.test.json.gz")
    counts = dict(academy=2599, business=2600, entertainment=2614, literature=2615)
    assert {name: counts.pairs for name, counts in tally.files.items()} == counts
    for taste, pairs in by_taste.items():
        assert set(pairs) == normalised(f"dsp_{taste}")
    assert all(c.pairs + c.left_out.total() == 661 * 4 for c in tally.files.values())


@pytest.mark.parametrize(
    "side, count", [("no-bad-for-the-economy", 288), ("yes-emergencies-only", 400)]
)
def test_arguments_of_one_side_of_a_debate(side, count):
    by_taste, tally = read(f"ukp/{UKP}_{side}.csv")
    pairs = by_taste[None]
    prompt = pairs[0][0]
    assert len(pairs) == count and not tally.total().left_out
    assert set(pairs) == {pair for pair in normalised("ukp_convarg") if pair[0] == prompt}


def ranked_pairs(message):
    """Every two ranked siblings with different texts, the better first: a naive loop."""
    replies = message.get("replies", [])
    ranked = [r for r in replies if r["role"] == "assistant" and r["rank"] is not None]
    here = {(a["text"], b["text"]) for a in ranked for b in ranked if a["rank"] < b["rank"]}
    return here.union(*map(ranked_pairs, replies))


@pytest.mark.slow
def test_trees_of_many_languages():
    by_taste, tally = read("oasst2/trees.jsonl.gz")
    total = tally.total()
    assert (tally.records, total.pairs, total.left_out) == (551, 521, {"no rank": 169})
    trees = [tree for _, tree in read_records(str(NATIVE / "oasst2/trees.jsonl.gz"))]
    expected = set().union(*(ranked_pairs(tree["prompt"]) for tree in trees))
    assert {pair[1:] for pair in by_taste[None]} == expected
