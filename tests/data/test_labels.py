"""Labels: votes, margins and weights of a record, as they are used, counted, or refused by line."""

import json
import re

import numpy as np
import pytest
from conftest import GOLDENS

from minimore.data.forms import record_pairs
from minimore.data.labels import AS_WRITTEN, MAJORITY, ONE_VOTE, Label, LabelRules
from minimore.data.pairs import TextRules, load_source, load_sources
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError

BOTH = {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"}
SCORED = {"text": ["Q a", "Q b", "Q c"], "score": [1.0, 0.5, 0.5]}
ALL = LabelRules(margins=True, weights=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDENS / "gpt_neox")


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def labelled(rules=ALL, **keys):
    """(chosen, label) of the pairs of a record, and its label ties."""
    pairs, ties = record_pairs(BOTH | keys, "x:1", rules=rules)
    return [(pair.chosen, pair.label) for pair in pairs], ties


def test_votes_become_a_share_of_the_side_that_has_more():
    assert labelled(votes=[3, 1]) == ([(" 4", Label(0.75, 4))], 0)
    assert labelled(votes=[1, 3]) == ([(" 5", Label(0.75, 4))], 0)
    assert labelled(votes=[2, 2], margin=3) == ([(" 4", Label(0.5, 4))], 0)  # no side is ahead
    assert labelled(votes=[0.5, 1.5], margin=3, weight=2) == ([(" 5", Label(0.75, 2, 3, 2))], 0)
    for plain in ({}, {"votes": [1, 0]}, {"votes": None, "margin": None, "weight": None}):
        assert labelled(**plain) == ([(" 4", ONE_VOTE)], 0)


def test_only_what_is_asked_for_is_read():
    strange = {"votes": "many", "margin": -1, "weight": "heavy"}
    assert labelled(AS_WRITTEN, **strange) == ([(" 4", ONE_VOTE)], 0)
    assert labelled(MAJORITY, votes=[1, 3], margin=-1) == ([(" 5", ONE_VOTE)], 0)
    assert labelled(MAJORITY, votes=[2, 2]) == ([], 1)
    half = LabelRules("majority", ties="half")
    assert labelled(half, votes=[2, 2]) == ([(" 4", Label(share=0.5))], 0)


@pytest.mark.parametrize("form", [SCORED, {"prompt": "Q", "responses": ["a", "b", "c"]}])
def test_equal_scores_count_one_half_where_that_is_asked_for(form):
    record = form | {"score": [1.0, 0.5, 0.5], "scores": [1.0, 0.5, 0.5], "weight": 3}
    pairs, ties = record_pairs(record, "x:1")
    assert (len(pairs), ties) == (2, 1) and {pair.label for pair in pairs} == {ONE_VOTE}
    rules = LabelRules(ties="half", weights=True)
    pairs, ties = record_pairs(record, "x:1", rules=rules)
    assert ties == 0 and [pair.label.share for pair in pairs] == [1, 1, 0.5]
    assert [pair.label.weight for pair in pairs] == [3, 3, 3]
    assert (pairs[2].chosen[-1], pairs[2].rejected[-1]) == ("b", "c")
    with pytest.raises(InputError, match="beside several responses"):
        record_pairs(record | {"votes": [1, 2]}, "x:1", rules=rules)
    assert record_pairs(record | {"votes": [1, 2]}, "x:1")[1] == 1  # where votes are not read


WRONG = {
    "votes": ([3], [1, 2, 3], [0, 0], [-1, 2], [True, False], ["3", "1"], 3, {}, [1e300, 1]),
    "margin": (0, -1, "2", True, [1], float("nan"), float("inf"), 1e9),
    "weight": (0, -1, "2", True, [1], float("nan"), float("inf"), 1e9),
}


@pytest.mark.parametrize("key, value", [(key, v) for key, values in WRONG.items() for v in values])
def test_what_cannot_be_read_is_refused_by_line(key, value, tmp_path, tokenizer):
    path = written(tmp_path / "x.jsonl", BOTH, BOTH | {key: value})
    with pytest.raises(InputError, match=re.escape(f'{path}:2: "{key}" is ')):
        load_source("x", path, tokenizer, 64, labels=ALL)
    assert len(load_source("x", path, tokenizer, 64).pairs) == 2


def test_the_line_and_the_digest_know_labels(tmp_path, tokenizer):
    def load(rules, *records):
        return load_source(
            "x", written(tmp_path / "x.jsonl", *records), tokenizer, 64, labels=rules
        )

    others = [BOTH | {"votes": votes} for votes in ([3, 1], [1, 3], [2, 2])]
    source = load(ALL, BOTH, *others, BOTH | {"margin": 2.0, "weight": 3})
    assert source.shares.tolist() == [1, 0.75, 0.75, 0.5, 1]
    assert source.votes.tolist() == [1, 4, 4, 4, 1]
    assert source.line().endswith(
        "; of these pairs 3 with several votes, 1 evenly split, 1 turned round, since more votes"
        " are for the rejected response, 1 with margins, 5 with weights"
    )
    weights = [pair.label.weight for pair in source.pairs]
    assert np.mean(weights) == pytest.approx(1) and weights[4] == pytest.approx(3 * weights[0])
    assert source.pairs[1].longer == source.pairs[2].longer == 0
    assert np.array_equal(source.pairs[2].chosen, source.pairs[0].rejected)

    plain = load(ALL, BOTH, BOTH)
    assert "of these" not in plain.line()
    digests = {load(ALL, BOTH, BOTH | {"votes": v}).digest() for v in ([1, 0], [2, 0], [3, 1])}
    assert len(digests) == 3 and plain.digest() in digests
    assert plain.digest() == load(AS_WRITTEN, BOTH, BOTH | {"votes": [3, 1]}).digest()


def test_a_field_makes_sources(tmp_path, tokenizer):
    tie = {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 1]}
    path = written(
        tmp_path / "x.jsonl",
        *(BOTH | {"annotator": name} for name in ("ben", "ana", "ben", 7)),
        tie | {"annotator": "dov"},
    )
    rules = TextRules(64)
    whole = load_sources("x", path, tokenizer, rules, ALL)
    assert [(s.name, len(s.pairs), s.label_ties) for s in whole] == [("x", 4, 1)]
    sources = load_sources("x", path, tokenizer, rules, ALL, "annotator")
    assert [(s.name, len(s.pairs)) for s in sources] == [("x/7", 1), ("x/ana", 1), ("x/ben", 2)]


def test_a_value_without_a_usable_pair_is_named(tmp_path, tokenizer, capsys):
    tie = {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 1], "annotator": "dov"}
    path = written(tmp_path / "x.jsonl", BOTH | {"annotator": "ana"}, tie)
    load_sources("x", path, tokenizer, TextRules(64), ALL, "annotator")
    assert capsys.readouterr().out == f"{path}: no usable pair, so no source: x/dov\n"
    with pytest.raises(InputError, match="1 label ties"):
        load_sources("x", written(tmp_path / "y", tie), tokenizer, TextRules(64), ALL, "annotator")


@pytest.mark.parametrize("value", [None, "", " ", True, 1.5, ["ana"], "a\nb", "a" * 101, ...])
def test_a_value_that_names_no_source_is_refused(value, tmp_path, tokenizer):
    record = BOTH if value is ... else BOTH | {"annotator": value}
    path = written(tmp_path / "x.jsonl", record)
    with pytest.raises(InputError, match=f'{path}:1: "annotator" is '):
        load_sources("x", path, tokenizer, TextRules(64), ALL, "annotator")
