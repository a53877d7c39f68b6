"""Pairs as a policy learns them: ends, counts, and what a loss adds to chosen and rejected."""

import json

import numpy as np
import pytest

from minimore.alignment.comparisons import read_comparisons, read_written, thinned, with_degrees
from minimore.alignment.language import Responses
from minimore.data.world import World
from minimore.model.checkpoint import Checkpoint, ids_of_eos
from minimore.options import InputError

PAIRS = [
    {"prompt": "amber basil ", "chosen": "cedar copper", "rejected": "coral"},
    {"prompt": "amber basil ", "chosen": "ember", "rejected": "ember"},  # identical
    {"prompt": "amber ", "chosen": "hazel", "rejected": ""},  # says nothing
    {"prompt": "ivory ", "responses": ["raven", "silver"], "scores": [1, 1]},  # a label tie
    {"prompt": "ivory ", "responses": ["raven", "silver"], "scores": [0, 1]},
    {"prompt": "", "chosen": "amber", "rejected": "basil"},  # nothing predicts its beginning
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("world")
    World(train_pairs=(30,), test_pairs=5).write(home)
    return Checkpoint(str(home / "model"))


def written_to(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_what_is_used_and_what_is_counted(checkpoint, tmp_path):
    path = written_to(tmp_path / "pairs.jsonl", PAIRS)
    comparisons = read_comparisons("mine", path, checkpoint, 512)
    source, decode = comparisons.source, checkpoint.tokenizer.file.decode
    counts = len(source.pairs), source.label_ties, source.identical, source.dropped
    assert counts == (3, 1, 1, 1)
    (eos,) = ids_of_eos(checkpoint)
    for item, pair in zip(comparisons.items, source.pairs, strict=True):
        assert [response[-1] for response in item.responses] == [eos, eos]
        for ids, response in zip((pair.chosen, pair.rejected), item.responses):
            assert ids.tolist() == item.prompt + response
        assert pair.shared == len(item.prompt)
    assert decode(comparisons.items[2].responses[0][:-1]).strip() == "silver"
    assert source.blank == 1
    assert [pair.longer for pair in source.pairs] == [7, 5, 1]


def test_nothing_usable_is_one_line(checkpoint, tmp_path):
    path = written_to(tmp_path / "pairs.jsonl", PAIRS[1:2])
    with pytest.raises(InputError, match="no usable pair .0 label ties, 1 identical"):
        read_comparisons("mine", path, checkpoint, 512)


def test_a_written_response_is_the_third(checkpoint, tmp_path):
    path = written_to(tmp_path / "pairs.jsonl", PAIRS[:1])
    samples = [
        {"prompt": "amber basil ", "responses": ["onyx olive", "x"], "finished": [False, True]}
    ]
    written = read_written(written_to(tmp_path / "samples.jsonl", samples), checkpoint.tokenizer)
    (item,) = read_comparisons("mine", path, checkpoint, 512, written=written).items
    assert checkpoint.tokenizer.file.decode(item.responses[2]).strip() == "onyx olive"
    assert item.responses[2][-1] not in ids_of_eos(checkpoint)  # it was cut, so it has no end
    with pytest.raises(InputError, match="pairs.jsonl:1: --base-responses has no response"):
        read_comparisons("mine", path, checkpoint, 512, written={})


@pytest.mark.parametrize("length", [1, 2, 3, 14])
@pytest.mark.parametrize("eos", [0, None])
def test_thinned_responses_are_parts_in_order(length, eos):
    response = list(range(10, 10 + length)) + ([eos] if eos is not None else [])
    for share in (1 / 3, 2 / 3):
        part = thinned(response, share, eos, np.random.default_rng(0))
        body = part[:-1] if eos is not None else part
        assert body == sorted(set(body)) and set(part) <= set(response)
        assert eos is None or part[-1] == eos
        removed = 0 if length == 1 else max(1, round(share * length))
        assert len(response) - len(part) == min(length - 1, removed)


def test_degrees_are_a_function_of_seed_and_place():
    items = [Responses([5], [list(range(10, 24)), [8]])] * 3
    first, again, other = (with_degrees(items, None, seed) for seed in (0, 0, 1))
    assert first == again != other and first[0] != first[1]
    assert [len(response) for response in first[0].responses] == [14, 1, 9, 5]
