"""Splits by prompt: every line once, byte for byte, and no prompt in two parts."""

import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

from minimore.checksums import read_checked_json
from minimore.cli import main
from minimore.data import split as split_module
from minimore.data.dialogues import opening_of
from minimore.data.foreign.readers import _plain_text
from minimore.data.inspection.word_rule import LIST_ITEM
from minimore.data.records import read_records
from minimore.data.split import group_of

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
SHARES = ("--validation", "0.2", "--test", "0.3")


def split(path, output, *more):
    return main(["data", "split", str(path), "--output", str(output), *map(str, more)])


def parts_of(output):
    return {path.stem: path.read_bytes().splitlines(True) for path in output.glob("*.jsonl")}


def record(prompt, i):
    return {"prompt": prompt, "chosen": f" yes {i}", "rejected": f" no {i}"}


@pytest.fixture
def file(tmp_path):
    """200 prompts, of which the first has many pairs; odd bytes, which must stay as they are."""
    prompts = ["\n\nHuman: the first\n\nAssistant:"] * 30
    prompts += [f"\n\nHuman: Question {i}\n\nAssistant:" for i in range(200)]
    lines = [json.dumps(record(prompt, i)) for i, prompt in enumerate(prompts)]
    lines[5] = lines[5].replace("the first", "The  First")  # is the same prompt
    lines[7] = '  {"prompt":"caf\\u00e9 \u00e9", "chosen":"a" ,"rejected":"b"}  '
    lines[9] = lines[9] + "\r"
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())  # no line's end at the last
    return path


def test_every_line_is_in_one_part_as_it_was(file, tmp_path):
    assert split(file, tmp_path / "a", *SHARES) == 0
    parts = parts_of(tmp_path / "a")
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [line + b"\n" for line in lines if line]
    assert sorted(sum(parts.values(), [])) == sorted(expected)
    for lines in parts.values():  # in the order of the file
        places = [expected.index(line) for line in lines]
        assert places == sorted(places)
    prompts = {
        name: {" ".join(json.loads(line)["prompt"].casefold().split()) for line in lines}
        for name, lines in parts.items()
    }
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    counts = read_checked_json(tmp_path / "a" / "split.json")["parts"]
    assert {name: len(found) for name, found in prompts.items()} == {
        name: count["prompts"] for name, count in counts.items()
    }
    assert len(prompts["test"]) == pytest.approx(61, abs=20)
    assert len(prompts["validation"]) == pytest.approx(40, abs=18)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(file, tmp_path):
    zipped = tmp_path / "in.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    for name, path, seed in (("a", file, 1), ("b", zipped, 1), ("c", file, 2)):
        assert split(path, tmp_path / name, *SHARES, "--seed", seed) == 0
    assert parts_of(tmp_path / "a") == parts_of(tmp_path / "b") != parts_of(tmp_path / "c")


def test_a_prompt_falls_to_the_same_part_in_every_file(file, tmp_path):
    grown = tmp_path / "grown.jsonl"
    more = "".join(json.dumps(record(f"another {i}", i)) + "\n" for i in range(50))
    grown.write_bytes(more.encode() + file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert split(file, tmp_path / "a") == split(grown, tmp_path / "b") == 0
    small, large = parts_of(tmp_path / "a"), parts_of(tmp_path / "b")
    assert all(set(small[name]) <= set(large[name]) for name in small)
    assert sorted(small) == ["test", "train"]  # no share, no file


def test_dialogues_with_one_opening_stay_together(tmp_path):
    dialogues = [
        f"\n\nHuman: Question {i}\n\nAssistant: Yes.\n\nHuman: {turn}\n\nAssistant:"
        for i in range(60)
        for turn in ("And then?", "Really?", "Why?")
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record(p, i)) + "\n" for i, p in enumerate(dialogues)))
    crossing = {}
    for by in ("prompt", "opening"):
        assert split(path, tmp_path / by, "--test", "0.4", "--by", by) == 0
        openings = [
            {json.loads(line)["prompt"].split("\n\n")[1] for line in lines}
            for lines in parts_of(tmp_path / by).values()
        ]
        crossing[by] = len(openings[0] & openings[1])
    assert crossing["opening"] == 0 < crossing["prompt"]


def test_forms_of_every_kind_and_label_ties_are_split_by_their_prompt(tmp_path):
    turns = [{"role": "user", "content": "Hi"}]
    records = [
        {"prompt": turns, "chosen": "a", "rejected": "b"},
        {"prompt": turns, "responses": ["a", "b"], "scores": [1, 1]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        {"text": ["\n\nHuman: Hi\n\nAssistant: a"] * 2, "score": [2.0, 2.0]},
    ] + [record(f"other {i}", i) for i in range(40)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert split(path, tmp_path / "out", "--test", "0.5") == 0
    first = {json.dumps(r).encode() + b"\n" for r in records[:4]}
    assert any(first <= set(lines) for lines in parts_of(tmp_path / "out").values())


def refused(capsys, *arguments):
    assert main(["data", "split", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_test_file_may_be_split_without_a_training_part(file, tmp_path):
    """Half of it to fit a temperature on, say. In floating point .9 + .1 is 1, and .7 + .3, too."""
    for validation, test in ((0.5, 0.5), (0.9, 0.1), (0.7, 0.3)):
        output = tmp_path / f"{test}"
        assert split(file, output, "--validation", validation, "--test", test) == 0
        parts = parts_of(output)
        assert set(parts) == {"validation", "test"} and sum(map(len, parts.values())) == 230


def test_what_cannot_be_split_is_one_line_and_leaves_nothing(file, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([record("a", 0)]))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(record("a", 0)) + "\n{nope\n")
    assert "has no lines" in refused(capsys, listed, *out)
    assert "bad.jsonl:2: not JSON" in refused(capsys, bad, *out)
    assert "not a file" in refused(capsys, tmp_path, *out)
    assert "not a file" in refused(capsys, tmp_path / "absent.jsonl", *out)
    assert "nothing to do" in refused(capsys, file, *out, "--test", 0)
    assert "at most 1" in refused(capsys, file, *out, "--test", 0.5, "--validation", 0.6)
    lone = tmp_path / "lone.jsonl"
    lone.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert "prompts in it: 1; expected one for each of 2" in refused(capsys, lone, *out)
    assert "falls to test" in refused(capsys, file, *out, "--test", 1e-9)
    assert "FILE is missing" in refused(capsys, *out)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(capsys, file, *out)


@pytest.mark.skipif(
    not (DATA / "pairs").is_dir(), reason=f"no preference data in {DATA}; set MINIMORE_DATA"
)
def test_four_tastes_on_the_same_questions_do_not_leak_into_each_other(tmp_path):
    prompts = {"train": set(), "test": set()}
    for taste in ("academy", "business"):
        path = DATA / "pairs" / f"dsp_{taste}.test.jsonl.gz"
        assert split(path, tmp_path / taste, "--test", "0.3") == 0
        for name, found in prompts.items():
            found |= {r["prompt"] for _, r in read_records(str(tmp_path / taste / f"{name}.jsonl"))}
    assert len(prompts["train"]) + len(prompts["test"]) == 139
    assert not prompts["train"] & prompts["test"]


def test_a_foreign_record_falls_where_its_house_record_falls():
    """A shape that one line holds whole is split as it lies; one with several prompts is not."""
    foreign = {"instruction": "P", "input": "", "output_1": "a", "output_2": "b", "preference": 2}
    house = {"prompt": "P", "chosen": "b", "rejected": "a"}
    assert group_of(foreign, "x:1", "prompt") == group_of(house, "x:1", "prompt")
    unequal = {"text": ["a", "b", "c"], "score": [1, 2, 3]}  # three pairs without a prompt
    assert group_of(unequal, "x:1", "prompt") == "b"


@pytest.mark.parametrize("tie", ([1, 1.0], [0.0, -0.0], [2, 2]))
def test_a_tie_stays_with_the_other_comparisons_of_its_prompt(tie, tmp_path):
    """Also one of numbers that are equal and written differently."""
    path = tmp_path / "in.jsonl"
    pairs = [{"prompt": f"p {i}", "responses": ["a", "b"], "scores": [1, 0]} for i in range(40)]
    ties = [pair | {"scores": tie} for pair in pairs]
    path.write_text("".join(json.dumps(each) + "\n" for each in pairs + ties))
    assert split(path, tmp_path / "out", "--test", 0.5) == 0
    parts = parts_of(tmp_path / "out")
    train, test = ({json.loads(x)["prompt"] for x in parts[name]} for name in ("train", "test"))
    assert not train & test and sum(map(len, parts.values())) == 80


def test_scores_that_are_none_are_refused_also_where_they_are_alike(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "scores": [True, True]}))
    assert split(path, tmp_path / "out", "--test", 0.5) == 2
    assert 'in.jsonl:1: "scores" is [true, true]' in capsys.readouterr().err


@pytest.mark.parametrize("blank", ("\u3000", "\x1c", "\u2028", " "))
def test_a_line_of_any_white_space_is_blank(blank, tmp_path):
    lines = [json.dumps(record(f"p {i}", i)) for i in range(40)]
    path = tmp_path / "in.jsonl"
    path.write_bytes("\n".join([blank, *lines[:20], blank, *lines[20:], blank]).encode())
    assert split(path, tmp_path / "out", "--test", 0.5) == 0
    assert sum(map(len, parts_of(tmp_path / "out").values())) == 40


@pytest.mark.parametrize("change", ("append", "reorder", "cut"))
def test_a_file_that_changes_while_it_is_split_is_refused(
    change, file, tmp_path, monkeypatch, capsys
):
    first_pass = split_module.parts_of_lines

    def changing(options):
        parts = first_pass(options)
        lines = file.read_bytes().splitlines(True)
        changed = {"append": lines + lines, "reorder": lines[::-1], "cut": lines[:9]}[change]
        file.write_bytes(b"".join(changed))
        return parts

    monkeypatch.setattr(split_module, "parts_of_lines", changing)
    assert split(file, tmp_path / "out", *SHARES) == 2
    assert "was changed while it was split" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_white_space_without_end_takes_no_time():
    """A regular expression that tries every beginning would take hours here."""
    assert opening_of("\n" * 10**6 + "## Human: Hi.\n\nAssistant:") == " Hi."
    assert opening_of("\n" * 10**6) == "\n" * 10**6
    assert LIST_ITEM.findall("\n" * 10**6 + " \t- a\n2) b\n") == [" \t- ", "2) "]
    assert _plain_text(" " * 10**6 + "x <br/> y<br/><br/>  z ") == " " * 10**6 + "x\ny\n\nz "


def test_a_table_is_converted_first(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    assert main(["data", "split", str(tmp_path / "a.csv"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "a.csv: is a table; expected JSON lines, which `minimore data convert` makes" in error
