"""Public files become pairs; every comparison is a pair, a tie, or left out and counted.

Rows of every shape are in foreign.py.
"""

import copy
import gzip
import json
import re
import sys
import types

import pytest
from conftest import GOLDENS
from foreign import (
    HELPSTEER,
    MESSAGES,
    ROWS,
    THREAD,
    TREE,
    UKP,
    UNPAIRED,
    USER,
    A,
    B,
    Q,
    pair,
    scored,
)

from minimore.cli import main
from minimore.data.foreign import convert as conversion
from minimore.data.foreign.convert import Rules, Tally, converted
from minimore.data.foreign.shapes import SHAPES, house_records, shape_of
from minimore.data.foreign.trees import TreeRules
from minimore.data.pairs import load_source
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError

ALL = [(name, place) for name, rows in ROWS.items() for place in range(len(rows))]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def run(tmp_path, capsys, path, *options, output="out"):
    """Convert; returns the exit code, what was printed, and the records of every file."""
    code = main(["data", "convert", str(path), "--output", str(tmp_path / output), *options])
    said = capsys.readouterr()
    files = {
        file.stem: [json.loads(line) for line in file.read_text("utf-8").rstrip("\n").split("\n")]
        for file in sorted((tmp_path / output).glob("*.jsonl"))
    }
    return code, said.out + said.err, files


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, place", ALL)
def test_a_record_of_every_shape_becomes_house_records(name, place):
    row = ROWS[name][place]
    assert shape_of(row.record).name == name
    expected = [row.record] if shape_of(row.record).is_house else row.house
    assert house_records(row.record, "x:1") == expected


def test_every_shape_has_a_row():
    grouped = {shape.name for shape in SHAPES if shape.read is None}
    assert {shape.name for shape in SHAPES} == set(ROWS) | grouped | {"ukp"}
    assert shape_of(MESSAGES[0]).name == "oasst-messages"
    assert shape_of(HELPSTEER[0]).name == "helpsteer"
    assert shape_of(UNPAIRED[0]).name == "unpaired"


@pytest.mark.parametrize("name, place", ALL)
def test_what_is_written_is_counted_and_can_be_trained_on(name, place, tmp_path):
    """Counts are those of the pairs that training reads, and they add up."""
    row, tally = ROWS[name][place], Tally()
    located = list(converted(write(tmp_path / "in.jsonl", row.record), tally=tally))
    path = write(tmp_path / "out.jsonl", *(record for _, record in located))
    total = tally.total()
    assert total.pairs + total.ties + total.left_out.total() == row.comparisons
    if total.pairs:
        source = load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)
        assert (len(source.pairs), source.label_ties) == (total.pairs, total.ties)


@pytest.mark.parametrize(
    "name", [n for n in ROWS if n not in ("domains", "pku-saferlhf", "ultrafeedback")]
)
def test_training_reads_every_shape_of_one_record_a_line(name, tmp_path):
    """The pairs of a file that is read as it lies, and of what the conversion makes of it."""
    row = ROWS[name][0]
    tokenizer, house = Tokenizer(GOLDENS / "gpt_neox"), ROWS[name][0].house
    direct = load_source("s", write(tmp_path / "a.jsonl", row.record), tokenizer, 200)
    through = load_source("s", write(tmp_path / "b.jsonl", *house), tokenizer, 200)
    assert sorted(map(texts_of, direct.pairs)) == sorted(map(texts_of, through.pairs))
    assert direct.unlabelled.total() == (2 if name == "oasst-tree" else 0)
    assert ("2 comparisons left out: no rank" in direct.line()) == (name == "oasst-tree")


def texts_of(pair):
    return pair.chosen.tolist(), pair.rejected.tolist()


@pytest.mark.parametrize("name", ["domains", "pku-saferlhf", "ultrafeedback"])
def test_training_refuses_several_tastes_in_one_file(name, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS[name][0].record)
    with pytest.raises(InputError, match="a.jsonl:1: .* several tastes .*minimore data convert"):
        load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)


@pytest.mark.parametrize("records", [MESSAGES, HELPSTEER, UNPAIRED])
def test_records_that_make_pairs_together_are_converted_first(records, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *records)
    expected = "a.jsonl:1: has the shape .*; `minimore data convert` the file first"
    with pytest.raises(InputError, match=expected):
        load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)
    for arguments in (["look", path], ["split", path, "--output", str(tmp_path / "out")]):
        assert main(["data", *arguments]) == 2
        assert re.search(expected, capsys.readouterr().err)


def test_comparisons_without_a_label_are_counted_by_training_and_by_score(tmp_path, capsys):
    row = ROWS["shp"][0].record
    path = write(tmp_path / "a.jsonl", row | {"labels": None})
    with pytest.raises(InputError, match="no usable pair.* 1 comparisons without a label"):
        load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)
    arguments = ["--model", str(GOLDENS / "gpt_neox"), "--output", str(tmp_path / "out")]
    assert main(["score", *arguments, "--input", path]) == 2
    assert "has no comparison with a label" in capsys.readouterr().err
    path = write(tmp_path / "b.jsonl", row | {"labels": None}, row)
    assert main(["score", *arguments, "--input", path]) == 0
    assert "1 comparisons without a label are not scored: no label" in capsys.readouterr().out
    person = copy.deepcopy(ROWS["prism"][0].record)
    person["conversation_history"][1]["score"] = None  # of three replies: two comparisons
    path = write(tmp_path / "c.jsonl", person, person)
    source = load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)
    assert source.unlabelled == {"no score": 4}


def test_score_reads_foreign_shapes(tmp_path, capsys):
    for name in ("shp", "webgpt"):
        path = write(tmp_path / f"{name}.jsonl", ROWS[name][0].record)
        output = tmp_path / f"{name}.out"
        arguments = ["--model", str(GOLDENS / "gpt_neox"), "--input", path, "--output", str(output)]
        assert main(["score", *arguments]) == 0
        (line,) = map(json.loads, output.read_text("utf-8").splitlines())
        house = ROWS[name][0].house[0]
        assert {key: line[key] for key in house} == house
        assert {"chosen_reward", "rejected_reward"} <= set(line) or len(line["rewards"]) == 2


def test_forms_that_were_read_before_are_read_as_before(tmp_path):
    """What holds "chosen" is taken for its pairs, whatever other keys stand beside it."""
    beside = ROWS["shp"][0].record | ROWS["pku-saferlhf"][0].record
    for record in (
        beside | pair("P ", A, B),
        pair("P ", A, B) | {"instruction": "P", "input": ""},
        {"question": "P ", "chosen": A, "rejected": B},
        {"chosen": THREAD + A, "rejected": THREAD + B, "instruction": "x", "input": "y"},
        {"prompt": "P", "response": "R", "helpfulness": 1},
        {"unknown": 1},
    ):
        assert house_records(record, "x:1") == [record]


# ---- OASST ---------------------------------------------------------------------------------------


def test_ranks_become_ordered_pairs_of_siblings_with_their_thread(tmp_path):
    tally = Tally()
    located = converted(write(tmp_path / "m.jsonl", *MESSAGES), tally=tally)
    longer = THREAD + f" {A}\n\nHuman: And 3+3?\n\nAssistant:"
    assert [record for _, record in located] == [
        pair(THREAD, A, B, margin=1),
        pair(longer, "Six.", "6", margin=1),
    ]
    assert tally.total().left_out == {"no rank": 2}
    assert tally.notes == {"comparisons with a deleted message in them, which are used": 1}


def test_rules_of_trees(tmp_path, capsys):
    path = write(tmp_path / "m.jsonl", *MESSAGES, MESSAGES[1] | {"message_id": "x", "lang": "de"})
    code, said, files = run(tmp_path, capsys, path, "--skip-deleted", "--language", "en")
    assert code == 0 and "1 pairs, 0 label ties, 6 left out (1 deleted, 2 no rank, 3 of an" in said
    options = ("--turns", "messages")
    code, said, files = run(tmp_path, capsys, path, *options, output="messages")
    good, bad = ([{"role": "assistant", "content": text}] for text in (A, B))
    assert pair([USER], good, bad, margin=1) in files["pairs"]
    assert scored([USER], [good, good], [0, 0]) not in files["pairs"]  # equal, so left out
    path = write(tmp_path / "p.jsonl", pair(Q, A, B))
    code, said, _ = run(tmp_path, capsys, path, "--language", "en", output="no")
    assert code == 2 and "are for OASST" in said


def test_trees_and_messages_give_the_same_pairs(tmp_path):
    tree = {"message_tree_id": "p", "prompt": TREE}
    flat = [m for m in MESSAGES if m["message_id"] in "pabc"]
    rules = Rules(TreeRules(turns="messages"))
    both = [
        [r for _, r in converted(write(tmp_path / f"{len(records)}.jsonl", *records), rules=rules)]
        for records in ([tree], flat)
    ]
    assert both[0] == both[1] and len(both[0]) == 1


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda m: m.update(parent_id="e"), r"m.jsonl:\d+: message \w is its own ancestor"),
        (lambda m: m.update(message_id="a"), "m.jsonl:5: message a is in the file twice"),
        (lambda m: m.update(rank="0"), 'm.jsonl:5: "rank" is "0"'),
        (lambda m: m.update(rank=True), 'm.jsonl:5: "rank"'),
        (lambda m: m.update(rank=-1), 'm.jsonl:5: "rank"'),
        (lambda m: m.update(rank=0.5), 'm.jsonl:5: "rank"'),
        (lambda m: m.update(rank=float("inf")), 'm.jsonl:5: "rank"'),
        (lambda m: m.update(role="bot"), 'm.jsonl:5: "role"'),
        (lambda m: m.update(role=[]), 'm.jsonl:5: "role"'),
        (lambda m: m.update(text=None), 'm.jsonl:5: "text"'),
        (lambda m: m.update(deleted=1), 'm.jsonl:5: "deleted"'),
        (lambda m: m.update(parent_id=7), 'm.jsonl:5: "parent_id"'),
        (lambda m: m.update(lang=7), 'm.jsonl:5: "lang"'),
        (lambda m: m.pop("parent_id"), "m.jsonl:5: has not the shape 'oasst-messages'"),
    ],
)
def test_malformed_messages_are_refused_by_line(change, expected, tmp_path):
    messages = [dict(message) for message in MESSAGES]
    change(messages[4])
    with pytest.raises(InputError, match=expected):
        list(converted(write(tmp_path / "m.jsonl", *messages)))


def test_orphans_are_counted(tmp_path):
    tally = Tally()
    path = write(tmp_path / "m.jsonl", MESSAGES[1], MESSAGES[2], *MESSAGES[4:])
    assert list(converted(path, tally=tally)) == []
    assert tally.total().left_out == {"below a message whose parent is missing": 2}
    assert tally.notes["messages whose parent is not in the file"] == 2


def test_equal_ranks_are_a_label_tie(tmp_path):
    messages = [*MESSAGES[:2], MESSAGES[2] | {"rank": 0.0}]
    records = [r for _, r in converted(write(tmp_path / "m.jsonl", *messages))]
    assert records == [scored(THREAD, [A, B], [0, 0])]


# ---- rows and tables -----------------------------------------------------------------------------


def test_helpsteer_rows_of_one_prompt_are_compared_in_every_attribute(tmp_path, capsys):
    alone = HELPSTEER[0] | {"prompt": "alone"}
    path = write(tmp_path / "h.jsonl", HELPSTEER[0], alone, HELPSTEER[1])
    code, said, files = run(tmp_path, capsys, path)
    assert code == 0 and "1 prompts with a single response" in said
    assert "1 pairs, 4 label ties, 0 left out" in said
    assert files["helpfulness"] == [scored(Q, [A, B], [4, 0], taste="helpfulness")]
    assert len(files) == 5


def test_unpaired_completions_of_one_prompt_are_compared_by_their_label(tmp_path, capsys):
    other = {"prompt": "other", "completion": A, "label": None}
    path = write(tmp_path / "u.jsonl", *UNPAIRED, other, other | {"completion": B, "label": True})
    code, said, files = run(tmp_path, capsys, path)
    assert "2 pairs, 1 label ties, 1 left out (1 no score)" in said
    assert files == {"pairs": [scored(Q, [A, B, "Four."], [1, 0, 1])]}
    messages = [
        {key: value if key == "label" else [{"role": role, "content": value}]
         for (key, value), role in zip(row.items(), ("user", "assistant", ""))}
        for row in UNPAIRED
    ]  # fmt: skip
    files = run(tmp_path, capsys, write(tmp_path / "m.jsonl", *messages), output="m")[2]
    assert files["pairs"][0]["scores"] == [1, 0, 1]
    path = write(tmp_path / "bad.jsonl", UNPAIRED[0], UNPAIRED[1] | {"label": "good"})
    code, said, _ = run(tmp_path, capsys, path, output="no")
    assert code == 2 and 'bad.jsonl:2: "label" is "good"; expected a number' in said


def test_ukp_is_tab_separated_and_its_debate_stands_in_the_name(tmp_path, capsys):
    path = tmp_path / "ban-it_no-bad.csv"
    path.write_text(UKP, "utf-8")
    prompt = "Debate: ban it. Side: no bad. Give an argument."
    expected = [pair(prompt, "Yes & no.", '"No"\nit is.')]
    assert run(tmp_path, capsys, path)[2]["pairs"] == expected
    source = load_source("s", str(path), Tokenizer(GOLDENS / "gpt_neox"), 200)
    assert len(source.pairs) == 1
    path = path.rename(tmp_path / "unnamed.csv")
    code, said, _ = run(tmp_path, capsys, path, output="no")
    assert code == 2 and "unnamed.csv:2: the topic and its side" in said


def test_a_folder_of_ukp_is_converted_looked_at_and_trained_on(tmp_path, capsys):
    (tmp_path / "ukp").mkdir()
    for name in ("ban-it_yes.csv", "ban-it_no.csv"):
        (tmp_path / "ukp" / name).write_text(UKP, "utf-8")
    code, said, files = run(tmp_path, capsys, tmp_path / "ukp")
    sides = [record["prompt"].split()[4] for record in files["pairs"]]
    assert code == 0 and sides == ["no.", "yes."]
    assert main(["data", "look", str(tmp_path / "ukp")]) == 0
    assert ": 2 pairs, " in capsys.readouterr().out
    source = load_source("s", str(tmp_path / "ukp"), Tokenizer(GOLDENS / "gpt_neox"), 200)
    assert len(source.pairs) == 2
    code, said, _ = run(tmp_path, capsys, tmp_path / "ukp")
    assert code == 0 and "is finished" in said
    (tmp_path / "ukp" / "more_yes.csv").write_text(UKP, "utf-8")
    assert "with other files" in run(tmp_path, capsys, tmp_path / "ukp")[1]


def test_tables_are_read_by_their_columns(tmp_path, capsys):
    plain = tmp_path / "a.csv"
    plain.write_text('prompt,chosen,rejected\r\n"P, ""x""","a\nb",c\r\n', "utf-8-sig")
    assert run(tmp_path, capsys, plain)[2]["pairs"] == [pair('P, "x"', "a\nb", "c")]
    semicolons = tmp_path / "c.csv"
    semicolons.write_text('prompt;chosen;"rejected"\n"P; x";a, b;"""c"""\n')
    assert run(tmp_path, capsys, semicolons, output="c")[2]["pairs"] == [
        pair("P; x", "a, b", '"c"')
    ]
    labels = tmp_path / "b.tsv.gz"
    text = f"history\thuman_ref_A\thuman_ref_B\tlabels\n{Q}\t{A}\t{B}\t0\n{Q}\t{A}\t{B}\t\n"
    labels.write_bytes(gzip.compress(text.encode()))
    code, said, files = run(tmp_path, capsys, labels, output="b")
    assert files["pairs"] == [pair(Q, B, A)] and "1 left out (1 no label)" in said


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"a\n1\n", "t.csv:1: has one column only, 'a'; expected several, separated by commas,"),
        (b"a|b\n1|2\n", "t.csv:1: has one column only, 'a|b'"),
        (b"a;b\n1\n", "t.csv:2: has 1 fields; expected 2"),
        (b"a,b\n1\n", "t.csv:2: has 1 fields; expected 2"),
        (b"a,a\n1,2\n", "t.csv:1: the header"),
        (b"a,\n1,2\n", "t.csv:1: the header"),
        (b'a,b\n"1,2\n', "t.csv:2: no row of a table"),
        (b'a,b\n"1"x,2\n', "t.csv:2: no row of a table"),
        (b"a,b\n\xff,2\n", "not UTF-8"),
        (b"", "is empty"),
        (b"a,b\n", "is empty"),
        (b"a,b\n1,2\n", "t.csv:2: has no known shape; found keys: a, b."),
    ],
)
def test_malformed_tables_are_refused_by_line(text, expected, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(text)
    code, said, _ = run(tmp_path, capsys, tmp_path / "t.csv")
    assert code == 2 and expected in said and said.count("\n") == 1


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch, capsys):
    """pyarrow itself is not needed here: a stand-in gives rows as it does, in batches."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 2 and "a.parquet: Parquet files need pyarrow" in said

    class ParquetFile:
        def __init__(self, path):
            self.path = path

        def iter_batches(self, batch_size):
            for text in ("a", "c"):
                yield types.SimpleNamespace(to_pylist=lambda text=text: [pair(Q, text, "b")])

    module = types.ModuleType("pyarrow")
    module.parquet = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", module)
    assert [r["chosen"] for r in run(tmp_path, capsys, path)[2]["pairs"]] == ["a", "c"]


# ---- named fields --------------------------------------------------------------------------------

NAMED = ("--prompt-field", "q", "--chosen-field", "x")
TWO = (*NAMED, "--rejected-field", "y")


@pytest.mark.parametrize(
    "record, options, expected",
    [
        ({"q": Q, "x": A, "y": B}, TWO, [pair(Q, A, B)]),
        ({"q": Q, "x": A, "y": B, "w": "b"}, (*TWO, "--winner-field", "w"), [pair(Q, B, A)]),
        ({"q": Q, "x": A, "y": B, "w": "X"}, (*TWO, "--winner-field", "w"), [pair(Q, A, B)]),
        (
            {"q": Q, "x": A, "y": B, "w": "tie"},
            (*TWO, "--winner-field", "w"),
            [scored(Q, [A, B], [0, 0])],
        ),
        ({"q": Q, "x": A, "y": B, "w": 0}, (*TWO, "--winner-field", "w=1,0"), [pair(Q, B, A)]),
        ({"q": Q, "x": A, "y": B, "w": True}, (*TWO, "--winner-field", "w=true,false"),
         [pair(Q, A, B)]),
        (
            {"q": Q, "x": A, "y": B, "s": 1, "t": "2"},
            (*TWO, "--score-field", "s,t"),
            [scored(Q, [A, B], [1, 2])],
        ),
        (
            {"q": Q, "x": [A, B, "c"], "s": [1, 2, 2]},
            (*NAMED, "--score-field", "s"),
            [scored(Q, [A, B, "c"], [1, 2, 2])],
        ),
        (
            {"q": Q, "x": [A, B, "c"], "s": [True, False, True]},
            (*NAMED, "--score-field", "s"),
            [scored(Q, [A, B, "c"], [1, 0, 1])],
        ),
        (
            {"q": Q, "x": A, "y": B, "s": False, "t": "TRUE"},
            (*TWO, "--score-field", "s,t"),
            [scored(Q, [A, B], [0, 1])],
        ),
        (
            {"x": THREAD + A, "y": THREAD + B},
            ("--chosen-field", "x", "--rejected-field", "y"),
            [pair(THREAD, A, B)],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_fields_are_read_by_name(record, options, expected, tmp_path, capsys):
    assert run(tmp_path, capsys, write(tmp_path / "f.jsonl", record), *options)[2] == {
        "pairs": expected
    }


def test_rows_of_one_response_are_compared_by_prompt(tmp_path, capsys):
    rows = [{"q": Q, "x": text, "s": score} for text, score in ((A, 3), (B, 1), ("c", None))]
    path = write(tmp_path / "f.jsonl", *rows)
    code, said, files = run(tmp_path, capsys, path, *NAMED, "--score-field", "s")
    assert files == {"pairs": [scored(Q, [A, B], [3, 1])]} and "2 left out (2 no score)" in said


@pytest.mark.parametrize(
    "record, options, expected",
    [
        ({"q": Q, "x": A, "y": B, "w": 1}, (*TWO, "--winner-field", "w"), "may mean either"),
        ({"q": Q, "x": A, "y": B, "w": 3}, (*TWO, "--winner-field", "w=1,2,0"), 'f.jsonl:1: "w"'),
        ({"q": Q, "x": A}, TWO, "f.jsonl:1: has not the shape 'fields'"),
        ({"q": Q, "x": A, "y": 5}, TWO, "f.jsonl:1"),
        ({"q": Q, "x": A, "y": B}, ("--prompt-field", "q"), "--chosen-field is missing"),
        ({"q": Q, "x": A, "y": B}, NAMED, "--rejected-field is missing"),
        ({"q": Q, "x": A, "y": B}, (*TWO, "--score-field", "s"), "--score-field s"),
        ({"q": Q, "x": A}, (*NAMED, "--winner-field", "w"), "--rejected-field is missing"),
        ({"q": Q}, (*TWO, "--winner-field", "w", "--score-field", "a,b"), "give one"),
        ({"q": Q}, (*TWO, "--winner-field", "w=1"), "--winner-field w=1: expected"),
        ({"q": Q}, (*TWO, "--shape", "shp"), "give one"),
        ({"q": Q, "x": [A, B], "s": [1]}, (*NAMED, "--score-field", "s"), "same length"),
        ({"x": A, "s": 1}, ("--chosen-field", "x", "--score-field", "s"), "need --prompt-field"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused(record, options, expected, tmp_path, capsys):
    code, said, files = run(tmp_path, capsys, write(tmp_path / "f.jsonl", record), *options)
    assert code == 2 and expected in said and said.count("\n") == 1 and not files


# ---- the verb ------------------------------------------------------------------------------------


def test_an_unknown_shape_is_refused_with_the_command_that_would_read_it(tmp_path, capsys):
    path = write(tmp_path / "u.jsonl", {"id": 1, "user_question": Q, "winning": A, "bad_one": B})
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 2 and "found keys: id, user_question, winning, bad_one" in said
    assert "if a field says which response is better, add --winner-field KEY" in said
    assert run(tmp_path, capsys, path, *proposed(said))[2] == {"pairs": [pair(Q, A, B)]}


def proposed(said):
    """The options of fields that a message proposes."""
    return said[said.index("--prompt-field") : said.index("; if a field")].split()


@pytest.mark.parametrize(
    "keys, values",
    [
        (("prompt", "answer_a", "answer_b", "winner"), ("answer_a", "answer_b", "tie")),
        (("frage", "antwort_a", "antwort_b", "sieger"), ("a", "b", "tie")),
        (("lang", "query", "y1", "y2", "better_one"), ("y1", "y2", "neither")),
    ],
)
def test_a_proposal_never_takes_a_label_for_a_response(keys, values, tmp_path, capsys):
    """What is proposed gives the true labels when it is followed, also where one side comes first.

    The first records all prefer the first response.
    """
    says = [values[0]] * 3 + [values[1]] * 4 + [values[2]] * 3
    texts = [f"text number {i}" for i in range(3 * len(says))]
    lines = [
        dict(zip(keys, (*["en"] * (len(keys) - 4), *texts[3 * i : 3 * i + 3], value)))
        for i, value in enumerate(says)
    ]
    path = write(tmp_path / "u.jsonl", *lines)
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 2 and f"--winner-field {keys[-1]};" in said
    code, said, files = run(tmp_path, capsys, path, *proposed(said))
    assert code == 0 and "7 pairs, 3 label ties, 0 left out" in said
    firsts = [record["chosen"] == line[keys[-3]] for record, line in zip(files["pairs"], lines[:7])]
    assert firsts == [True] * 3 + [False] * 4
    assert ("fields not used: lang" in said) == (keys[0] == "lang")


def test_a_proposal_leaves_open_what_only_the_user_knows(tmp_path, capsys):
    path = write(tmp_path / "u.jsonl", {"question": Q, "one": A, "another": B, "id": 7})
    said = run(tmp_path, capsys, path)[1]
    assert "--prompt-field question --chosen-field KEY --rejected-field KEY --winner" in said


def test_few_short_words_may_be_the_winner_and_are_refused_where_they_are_not(tmp_path, capsys):
    winners = ["links", "rechts", "gleich"] * 3
    lines = [
        {"frage": f"Q{i}", "antwort_a": f"x {i}", "antwort_b": f"y {i}", "sieger": winner}
        for i, winner in enumerate(winners)
    ]
    path = write(tmp_path / "u.jsonl", *lines)
    said = run(tmp_path, capsys, path)[1]
    assert "--winner-field sieger;" in said
    code, said, _ = run(tmp_path, capsys, path, *proposed(said))
    assert code == 2 and "as in --winner-field sieger=1,2,0" in said


def test_a_name_of_another_field_is_no_response(tmp_path, capsys):
    record = {"prompt": Q, "a": A, "b": B, "winner": "b"}
    options = ("--prompt-field", "prompt", "--chosen-field", "winner", "--rejected-field", "b")
    code, said, files = run(tmp_path, capsys, write(tmp_path / "u.jsonl", record), *options)
    assert code == 2 and not files and said.count("\n") == 1
    assert 'u.jsonl:1: "winner" is "b", the name of another field' in said
    assert "give --winner-field winner" in said


def test_fields_that_are_not_used_are_printed(tmp_path, capsys):
    record = {"q": Q, "x": A, "y": B, "sieger": "y", "note": 1}
    code, said, _ = run(tmp_path, capsys, write(tmp_path / "u.jsonl", record), *TWO)
    assert code == 0 and "fields not used: sieger, note" in said


def test_a_shape_can_be_forced_and_is_then_expected(tmp_path, capsys):
    row = ROWS["pku-saferlhf"][0]
    path = write(tmp_path / "a.jsonl", row.record | {"chosen": A, "rejected": B})
    assert [r["chosen"] for r in run(tmp_path, capsys, path)[2]["pairs"]] == [A]
    files = run(tmp_path, capsys, path, "--shape", "pku-saferlhf", output="b")[2]
    assert [files["better"], files["safer"]] == [[house] for house in row.house]
    code, said, _ = run(tmp_path, capsys, path, "--shape", "webgpt", output="c")
    assert code == 2 and "a.jsonl:1: has not the shape 'webgpt'" in said


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_file_of_mixed_shapes_is_refused_by_line(name, tmp_path, capsys):
    other = ROWS["webgpt" if name != "webgpt" else "shp"][0].record
    path = write(tmp_path / "x.jsonl", ROWS[name][0].record, other)
    code, said, files = run(tmp_path, capsys, path)
    assert code == 2 and f"x.jsonl:2: has not the shape {name!r}" in said and not files
    with pytest.raises(InputError, match="x.jsonl:"):
        load_source("s", path, Tokenizer(GOLDENS / "gpt_neox"), 200)


def test_blank_and_equal_responses_are_left_out_and_counted(tmp_path, capsys):
    four = scored(Q, [A, " ", A, B], [3, 2, 1, 1])
    code, said, files = run(tmp_path, capsys, write(tmp_path / "s.jsonl", four))
    assert "1 pairs, 1 label ties, 4 left out (3 blank, 1 equal)" in said
    assert files["pairs"] == [scored(Q, [A, B], [3, 1]), scored(Q, [A, B], [1, 1])]


def test_splits_and_tastes_are_files(tmp_path, capsys):
    first = ROWS["summarize"][0].record
    path = write(tmp_path / "s.jsonl", first, first | {"split": "train", "choice": 0})
    code, said, files = run(tmp_path, capsys, path)
    assert {name: len(records) for name, records in files.items()} == {"train": 1, "valid1": 1}
    tokenizer = Tokenizer(GOLDENS / "gpt_neox")
    with pytest.raises(InputError, match="several splits or tastes"):
        load_source("s", str(tmp_path / "out"), tokenizer, 200)
    path = write(tmp_path / "p.jsonl", pair(Q + "\n", A, B))
    run(tmp_path, capsys, path, output="single")
    assert len(load_source("s", str(tmp_path / "single"), tokenizer, 200).pairs) == 1
    path = write(tmp_path / "s.jsonl", first | {"split": "../x"})
    code, said, _ = run(tmp_path, capsys, path, output="no")
    assert code == 2 and "s.jsonl:1: '../x' names a split" in said


def test_a_second_run_says_that_it_is_finished_and_other_ones_are_refused(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", pair(Q, A, B), pair(Q, B, A))
    assert run(tmp_path, capsys, path)[0] == 0
    file = tmp_path / "out" / "pairs.jsonl"
    before = file.read_bytes(), file.stat().st_mtime_ns
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 0 and "is finished" in said
    assert before == (file.read_bytes(), file.stat().st_mtime_ns)
    run(tmp_path, capsys, path, output="again")
    for name in ("pairs.jsonl", "converted.json"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "out" / name).read_bytes()
    code, said, _ = run(tmp_path, capsys, path, "--shape", "pairs")
    assert code == 2 and "with other options" in said
    file.write_bytes(before[0] + b"\n")
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 2 and "pairs.jsonl: is not as it was written" in said
    write(tmp_path / "p.jsonl", pair(Q, A, B))
    code, said, _ = run(tmp_path, capsys, path)
    assert code == 2 and "with other files" in said
    (tmp_path / "mine").mkdir()
    code, said, _ = run(tmp_path, capsys, path, output="mine")
    assert code == 2 and "exists already" in said


def test_an_interrupted_conversion_leaves_nothing_and_begins_again(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.jsonl", *[pair(Q, A, B)] * 3)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_checked_json", killed)
        assert run(tmp_path, capsys, path)[0] == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl"]
    (tmp_path / "out.partial").mkdir()  # of a process that was killed and could not clean up
    (tmp_path / "out.partial" / "pairs.jsonl").write_text("half")
    assert run(tmp_path, capsys, path)[2]["pairs"] == [pair(Q, A, B)] * 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "p.jsonl"]


def test_a_file_without_a_usable_pair_is_refused_with_the_counts(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", pair(Q, A, " "), pair(Q, A, A))
    code, said, _ = run(tmp_path, capsys, path)
    assert (
        code == 2 and "of 2 records, 0 pairs, 0 label ties, 2 left out (1 blank, 1 equal)" in said
    )
    assert not (tmp_path / "out").exists()


def test_texts_that_no_utf8_is_are_refused(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps(pair(Q, "\ud800", B)))
    code, said, _ = run(tmp_path, capsys, tmp_path / "p.jsonl")
    assert code == 2 and "surrogate" in said


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("webgpt", {"score_0": "high"}, '"score_0" is "high"; expected a number'),
        ("webgpt", {"question": {"id": 1}}, '"full_text" is missing'),
        ("summarize", {"choice": 2}, '"choice" is 2; expected 0 or 1'),
        ("summarize", {"summaries": [{"text": "x"}]}, '"summaries"'),
        ("summarize", {"info": {"title": "x"}}, 'has no "post"'),
        ("shp", {"labels": "A"}, '"labels"'),
        ("shp", {"labels": True}, '"labels"'),
        ("pku-saferlhf", {"better_response_id": -1}, '"better_response_id"'),
        ("helpsteer3", {"overall_preference": 4}, '"overall_preference" is 4'),
        ("helpsteer3", {"individual_preference": 3}, '"individual_preference"'),
        ("pandalm", {"annotator2": 3}, '"annotator2" is 3; expected 0 or 1 or 2'),
        ("two-outputs", {"preference": 3}, '"preference" is 3'),
        ("arena", {"winner": "model_c"}, '"winner" is model_c'),
        ("arena", {"conversation_a": [{"role": "user", "content": "other"}]}, "same turns"),
        ("ultrafeedback", {"completions": [{"response": "x"}]}, '"fine-grained_score" is missing'),
        ("ultrafeedback", {"completions": "x"}, '"completions"'),
        ("openai", {"preferred_output": ["a", "b"]}, "a response is a list of several"),
        ("pairs", {"chosen": [A, B], "votes": [2, 1]}, '"votes" beside several responses'),
        ("openai", {"input": []}, '"input" is []'),
        ("domains", {"responses": {"a": 5, "b": "x"}}, '"chosen" is 5'),
        ("orca", {"system": 5}, '"system" is 5'),
        ("alpaca", {"input": 5}, '"input" is 5'),
        ("scored", {"scores": [1]}, '"scores"'),
        ("text-score", {"text": "x"}, '"text"'),
    ],
)
def test_malformed_values_are_refused_by_line(name, change, expected, tmp_path, capsys):
    row = ROWS[name][0].record
    code, said, _ = run(tmp_path, capsys, write(tmp_path / "x.jsonl", row, row | change))
    assert code == 2 and "x.jsonl:2" in said and expected in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "name, change, count",
    [
        ("webgpt", {"score_0": None}, {"no score": 1}),
        ("summarize", {"choice": None}, {"no label": 1}),
        ("shp", {"labels": None}, {"no label": 1}),
        ("pku-saferlhf", {"safer_response_id": None}, {"no label": 1}),
        ("helpsteer3", {"overall_preference": None}, {"no label": 1}),
        ("pandalm", dict.fromkeys(("annotator1", "annotator2", "annotator3")), {"no label": 1}),
        ("two-outputs", {"preference": None}, {"no label": 1}),
        ("arena", {"winner": None}, {"no label": 1}),
        ("domains", {"responses": {"a": "x", "b": "", "c": "x"}}, {"blank": 4, "equal": 2}),
    ],
)
def test_missing_labels_are_counted(name, change, count, tmp_path):
    row, tally = ROWS[name][0], Tally()
    list(converted(write(tmp_path / "x.jsonl", row.record, row.record | change), tally=tally))
    assert tally.total().left_out == count


def test_an_aspect_that_was_not_rated_is_not_compared(tmp_path):
    row = json.loads(json.dumps(ROWS["ultrafeedback"][0].record))
    row["completions"][0]["annotations"]["honesty"]["Rating"] = "N/A"
    tally = Tally()
    records = [r for _, r in converted(write(tmp_path / "x.jsonl", row), tally=tally)]
    assert {r["taste"] for r in records} == {
        "overall", "instruction_following", "truthfulness", "helpfulness",
    }  # fmt: skip
    assert tally.files["honesty"].left_out == {"no rating": 1}
