"""Reading, tokenising, packing and sampling of pairs."""

import gzip
import json

import numpy as np
import pytest

from minimore.data import records
from minimore.data.dialogues import prompt_end
from minimore.data.forms import Pair, record_pairs
from minimore.data.pairs import encode, load_source, pack_pairs, shared_length, split_by_tokens
from minimore.data.records import read_records
from minimore.data.sampling import epoch_steps
from minimore.data.world import train_tokenizer
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["\n\nHuman: a question about amber and basil\n\nAssistant: an answer"], path)
    return Tokenizer(path.parent)


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_formats_give_the_same_pair():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    expected = [Pair(prompt, " yes", " no")]
    assert record_pairs(
        {"prompt": prompt, "chosen": " yes", "rejected": " no", "margin": 1}, ""
    ) == (expected, 0)
    assert record_pairs({"chosen": prompt + " yes", "rejected": prompt + " no"}, "") == (
        expected,
        0,
    )
    assert record_pairs({"text": [prompt + " no", prompt + " yes"], "score": [0.5, 1.5]}, "") == (
        expected,
        0,
    )


def test_k_responses_become_their_ordered_pairs_and_ties_are_kept_apart():
    pairs, ties = record_pairs(
        {"text": ["## Assistant: a", "## Assistant: b", "## Assistant: c"], "score": [1, 2, 1]}, ""
    )
    assert [(p.chosen, p.rejected) for p in pairs] == [(" b", " a"), (" b", " c")] and ties == 1


def test_the_implicit_prompt_is_cut_inside_the_common_prefix():
    """One side has extra turns: its own last mark lies outside the common beginning."""
    short = "\n\nHuman: hi\n\nAssistant: well"
    assert (
        short[: prompt_end([short, short + "\n\nHuman: and\n\nAssistant: so"])]
        == "\n\nHuman: hi\n\nAssistant:"
    )
    assert prompt_end(["no mark here", "no mark there"]) == 0


def test_counts(tmp_path, tokenizer):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": " a", "rejected": " b"},
        {"prompt": "q", "chosen": " a", "rejected": " a"},  # identical
        {"prompt": "", "chosen": "a", "rejected": ""},  # nothing to read on one side
        {"prompt": "q", "chosen": " a", "rejected": " "},  # blank
        {"prompt": "long " * 200, "chosen": " a", "rejected": " b"},  # truncated
        {"text": ["x", "y"], "score": [1.0, 1.0]},
    )  # label tie
    s = load_source("s", path, tokenizer, 64)
    assert (len(s.pairs), s.label_ties, s.identical, s.truncated, s.dropped, s.blank) == (
        3,
        1,
        1,
        1,
        1,
        1,
    )
    assert s.line().startswith(
        "s: 3 pairs, 1 label ties, 1 identical, 1 truncated, 1 blank, 1 dropped, "
    )
    assert all(len(side) <= 64 for p in s.pairs for side in p[:2])


def test_prompt_and_response_are_tokenised_as_one_text(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"prompt": "an ans", "chosen": "wer", "rejected": "wers"})
    pair = load_source("s", path, tokenizer, 64).pairs[0]
    assert pair.chosen.tolist() == tokenizer.encode(["an answer"])[0]
    assert pair.longer == -1


def test_truncation_is_on_the_left_and_keeps_bos(tokenizer):
    full = tokenizer.encode(["a question about amber"])[0]
    tokenizer.bos = [0]
    try:
        ids, cut = encode(["a question about amber", "a"], tokenizer, 4)
        assert ids[0].tolist() == [0] + full[-3:] and cut == [True, False] and ids[1][0] == 0
        with pytest.raises(InputError):
            encode(["a"], tokenizer, 1)
    finally:
        tokenizer.bos = []


def test_cutting_together_keeps_the_sides_aligned(tmp_path, tokenizer):
    record = {
        "prompt": "a question about amber and basil " * 9,
        "chosen": " an answer",
        "rejected": " and a long answer about amber and basil",
    }
    path = write(
        tmp_path / "p.jsonl", record, {"prompt": "", "chosen": "a", "rejected": "a question" * 50}
    )
    each, together = (
        load_source("s", path, tokenizer, 40, truncate).pairs for truncate in ("each", "together")
    )
    whole = load_source("s", path, tokenizer, 4000).pairs
    lost = len(whole[0].rejected) - 40
    assert together[0].shared == whole[0].shared - lost > each[0].shared
    assert (
        len(together[0].rejected) == 40
        and together[0].chosen.tolist() == whole[0].chosen.tolist()[lost:]
    )
    assert [len(side) for side in together[1][:2]] == [1, 40]  # the shorter side keeps a token


@pytest.mark.parametrize(
    "a, b, shared",
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 1), ([1], [1, 2], 0), ([5, 6], [7, 6], 0)],
)
def test_sharing_leaves_each_side_a_token(a, b, shared):
    assert (
        shared_length(np.array(a), np.array(b)) == shared == shared_length(np.array(b), np.array(a))
    )


def test_gzip_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}'))
    assert list(read_records(str(path))) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


def test_json_lists_and_directories(tmp_path):
    (tmp_path / "b.json").write_text('[{"a": 1},\n  {"a": 2}]\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 0}'))
    (tmp_path / "notes.txt").write_text("not data")
    assert [r["a"] for _, r in read_records(str(tmp_path))] == [0, 1, 2]
    assert list(read_records(str(tmp_path)))[2][0] == f"{tmp_path}/b.json:2"
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(InputError, match="holds training and test files"):
        list(read_records(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    for wrong, content in (
        ("empty", None),
        ("c.json", '[{"a": 1}, 2]'),
        ("d.json", '[{"a": 1}'),
        ("e.json", "[1]\n{}"),
    ):
        if content is not None:
            (tmp_path / wrong).write_text(content)
        with pytest.raises(InputError, match=wrong):
            list(read_records(str(tmp_path / wrong)))


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_a_list_is_decoded_item_by_item(tmp_path, monkeypatch, indent, count):
    """Whatever the part of it is that is looked at, it holds what json finds in it."""
    monkeypatch.setattr(records, "LONGEST_LINE", 150)
    monkeypatch.setattr(records, "READ_AT_ONCE", 16)
    items = [{"a": "é\\ ]" * (i % 4), "b": [i, {"c": None}]} for i in range(count)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(items, indent=indent) + " \n")
    assert [record for _, record in read_records(str(path))] == items


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"a": 1}, {"a": "' + "x" * 200 + '"}]', "list.json:2: an item of more than"),
        ('[{"a": 1}, {"a": ' + "[]," * 70 + "1}]", "list.json:2: an item of more than"),
        ('[{"a": 1}, {"a" 2}]', "list.json:2: not JSON .Expecting ':' delimiter.; expected an"),
        ('[{"a": 1}, ]', "list.json:2: not JSON"),
        ('[{"a": 1} {"a": 2}]', "list.json:2: not JSON .'{' instead of ','"),
        ('[{"a": 1}]]', "list.json: goes on behind its list"),
        ('[{"a": 1}', "list.json:2: not JSON .'' instead of ','"),
        ("[1]", "list.json:1: a JSON int"),
        ("[" * 100_000, "list.json:1: an item of more than"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(records, "LONGEST_LINE", 60)
    monkeypatch.setattr(records, "READ_AT_ONCE", 16)
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(InputError, match=words):
        list(read_records(str(tmp_path / "list.json")))


def test_pack_pairs_lays_out_the_stream(tmp_path, tokenizer):
    path = write(
        tmp_path / "p.jsonl", {"prompt": "an answer", "chosen": " about", "rejected": " and"}
    )
    pair = load_source("s", path, tokenizer, 64).pairs[0]
    shared, apart = pack_pairs([pair, pair], [3, 1]), pack_pairs([pair], share=False)
    assert shared.source.tolist() == [3, 1] and len(shared.stream.tokens) == 2 * pair.tokens
    assert len(apart.stream.tokens) == len(pair.chosen) + len(pair.rejected)
    assert (
        shared.stream.tokens[shared.stream.last].tolist()
        == [pair.chosen[-1], pair.rejected[-1]] * 2
    )


def test_split_by_tokens():
    assert split_by_tokens([5, 5, 5], 10) == [range(0, 2), range(2, 3)]
    assert split_by_tokens([50, 5, 5], 10) == [range(0, 1), range(1, 3)]
    assert split_by_tokens([3, 3, 3, 3], 7, unit=2) == [range(0, 2), range(2, 4)]
    assert split_by_tokens([3], 1) == [range(0, 1)]


def test_equal_sampling_repeats_small_sources_and_samples_large_ones():
    steps = epoch_steps([3, 10, 7], "equal", None, 6, seed=1, epoch=0)  # 20 // 3 = 6 each
    pool = np.concatenate(steps)
    assert [len(s) for s in steps] == [6, 6, 6] and all(
        (s[:, 0] == [0, 1, 2, 0, 1, 2]).all() for s in steps
    )
    of = {k: sorted(pool[pool[:, 0] == k, 1].tolist()) for k in range(3)}
    assert of[0] == [0, 0, 1, 1, 2, 2] and len(set(of[1])) == 6 and len(set(of[2])) == 6


def test_sampling_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, sampling="equal"):
        return np.concatenate(epoch_steps([5, 8], sampling, None, 4, seed, epoch)).tolist()

    assert order(1, 0) == order(1, 0) and order(1, 0) != order(2, 0) and order(1, 0) != order(1, 1)
    mixed = order(1, 0, "proportional")
    assert sorted(map(tuple, mixed)) == [(0, i) for i in range(5)] + [(1, i) for i in range(8)]
    assert len(np.concatenate(epoch_steps([5, 8], "proportional", 10, 4, 0, 0))) == 20


def test_digest_sees_order_and_sides(tmp_path, tokenizer):
    a, b = (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    )
    paths = [
        write(tmp_path / f"{i}.jsonl", *records)
        for i, records in enumerate(([a, b], [b, a], [a, b | {"chosen": "d", "rejected": "c"}]))
    ]
    digests = [load_source("s", p, tokenizer, 64).digest() for p in paths]
    assert len(set(digests)) == 3
