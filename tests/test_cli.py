"""The verbs end to end, and what they say to bad input.

That is one line, exit code 2, and nothing half-written.
"""

import dataclasses
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from processes import Command
from safetensors.torch import load_file, save_file

from minimore import calibration
from minimore.checksums import CHECKSUM
from minimore.cli import VERBS, main
from minimore.data.world import World
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError
from minimore.reward import ReadingOptions

GOOD = {"prompt": "amber", "chosen": " basil", "rejected": " cedar"}


def succeed(*arguments):
    """Run a verb that must end well."""
    assert main([str(argument) for argument in arguments]) == 0


def train(model, output, *more):
    succeed("train", "--model", model, "--output", output, *more)


def score(model, path, output, *more):
    succeed("score", "--model", model, "--input", path, "--output", output, *more)


def report_of(model, path, output, *more):
    """What `evaluate` writes of a file, called source a: its part of the report."""
    succeed("evaluate", "--model", model, "--source", f"a={path}", "--json", output, *more)
    return json.loads(output.read_text("utf-8"))["sources"]["a"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    small = World(annotators=("ana", "ben"), train_pairs=(24,), test_pairs=30, ties=0.1)
    return directory, small.write(directory)


@pytest.fixture(scope="module")
def run(world):
    directory, paths = world
    sources = [a for n, (train, _) in paths.items() for a in ("--source", f"{n}={train}")]
    options = "--method more --learning-rate 1e-3 --batch-size 8 --max-length 64 --log-steps 10"
    train(directory / "model", directory / "run", *sources, *options.split())
    return directory / "run"


@pytest.mark.parametrize(
    "arguments, command, said",
    [
        ("train --epchs 3", "minimore train", "unknown option --epchs; did you mean --epochs?"),
        ("train --modle=x", "minimore train", "unknown option --modle; did you mean --model?"),
        ("data convert f --shap shp", "minimore data convert", "unknown option --shap; did you"),
        ("data look f --output x --zzzzzz", "minimore data look", "unknown option --zzzzzz (see"),
        ("train -o x", "minimore train", "unknown option -o (see"),
        ("train more --model x --output y", "minimore train", "unexpected more; expected no"),
        ("--modle x train", "minimore", "unknown option --modle"),
        ("data --shape x convert", "minimore data", "unknown option --shape"),
    ],
)
def test_an_option_that_there_is_not_is_named_by_its_command(arguments, command, said, capsys):
    """It comes before what is missing: here that is --model, --output or FILE."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{command}: {said}") and error.endswith(f"(see {command} --help)\n")


COMPUTING = [
    name for name, verb in VERBS.items() if hasattr(verb.options, "device") and name != "plan"
]


@pytest.mark.parametrize("name", COMPUTING)
def test_a_gpu_that_is_not_there_is_refused_first(name, tmp_path, monkeypatch, capsys):
    """Before any file is read: none of them exists, and nothing is said of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words = [*name.split(), "--device", "cuda"]
    for field in dataclasses.fields(VERBS[name].options):
        if field.default is dataclasses.MISSING:
            words += [f"--{field.name.replace('_', '-')}", (field.metadata["choices"] or "x")[0]]
    assert main(words) == 2
    said = f"minimore {name}: --device cuda: torch sees no CUDA device; use --device cpu\n"
    assert capsys.readouterr().err == said


def test_where_a_held_out_group_has_no_place_it_is_refused(capsys):
    assert "no source has a file to train on" in refused(
        capsys, "train", "--model", "m", "--output", "o", "--source", "a=,t.jsonl"
    )
    for empty in ("a=,", "a=", "=,t.jsonl", "a=,t.jsonl,u.jsonl"):
        said = refused(capsys, "train", "--model", "m", "--output", "o", "--source", empty)
        assert "NAME=TRAIN.jsonl[,TEST.jsonl], or NAME=,TEST.jsonl to test only" in said
    said = refused(capsys, "features", "--model", "m", "--output", "o", "--source", "a=,t.jsonl")
    assert said.endswith("expected NAME=TRAIN.jsonl[,TEST.jsonl]\n")


def test_values_that_look_like_options_are_values(capsys):
    """As argparse has it: negative numbers, texts with a space, and what stands behind --."""
    for command in (["plan", "m", "--pairs", "-5"], ["data", "look", "-a b"]):
        assert main(command) == 2
        assert "unknown option" not in capsys.readouterr().err
    assert main(["data", "look", "--", "--chta"]) == 2
    assert "--chta: no such file" in capsys.readouterr().err


def test_several_responses_are_scored_as_each_alone_and_the_best_is_kept(run, tmp_path, capsys):
    prompt, responses = "\n\nHuman: hi\n\nAssistant:", [" a b c", " d", " a b", ""]
    many = {"prompt": prompt, "responses": responses, "note": 1}
    turns = [{"role": "user", "content": "hi"}]
    chat = {"prompt": turns, "responses": [[{"role": "assistant", "content": "yes"}]]}
    single = [{"prompt": prompt, "response": response} for response in responses]
    single.append({"messages": [*turns, chat["responses"][0][0]]})

    def scored(records, *more):
        path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        out.unlink(missing_ok=True)
        command = ["score", "--model", str(run), "--input", str(path), "--output", str(out)]
        assert main([*command, *more]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    alone = [record["reward"] for record in scored(single)]
    first, second = scored([many, chat])
    assert first["rewards"] == pytest.approx(alone[:4], abs=1e-5) and first["note"] == 1
    assert second["rewards"] == pytest.approx(alone[4:], abs=1e-5)
    best, only = scored([many, chat], "--best")
    ordered = sorted(first["rewards"], reverse=True)
    assert best["response"] == responses[first["rewards"].index(ordered[0])]
    assert best["reward"] == ordered[0] and best["margin"] == ordered[0] - ordered[1]
    assert "responses" not in best and best["note"] == 1 and only["margin"] is None
    path, out = tmp_path / "in.jsonl", tmp_path / "other"
    options = ("--model", run, "--input", path, "--output", out)
    path.write_text(json.dumps(single[0]))
    assert "this record has none" in refused(capsys, "score", *options, "--best")
    answer = {"role": "assistant", "content": "yes"}
    whole = {"prompt": turns, "responses": [[*turns, answer], [answer]]}
    (record,) = scored([whole])
    assert record["rewards"][0] == pytest.approx(record["rewards"][1], abs=1e-5)
    other = [{"role": "user", "content": "no"}, answer]
    path.write_text(json.dumps({"prompt": turns, "response": other}))
    assert "does not begin with" in refused(capsys, "score", *options)
    path.write_text(json.dumps(many | {"responses": []}))
    assert '"responses" is []' in refused(capsys, "score", *options)


def test_a_loop_of_links_is_refused(run, tmp_path, capsys):
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    refused(capsys, "evaluate", "--model", run, "--source", f"a={loop}")


def test_a_deeply_nested_value_is_refused(run, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    for depth in (900, 980, 982, 984, 990):
        nested = "[" * depth + "]" * depth
        path.write_text('{"prompt": ' + nested + ', "chosen": "b", "rejected": "c"}\n')
        refused(capsys, "evaluate", "--model", run, "--source", f"a={path}")


def test_what_is_no_json_is_not_written(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b", "x": 1e999}\n')
    arguments = ("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert "not finite" in refused(capsys, "score", "--model", run, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_is_read_as_it_was_trained_under_every_name(world, run, tmp_path, monkeypatch):
    out = tmp_path / "short"
    sources = ("--source", f"a={world[1]['ana'][0]}", "--max-length", "9", "--batch-size", "6")
    model = str(world[0] / "model")
    assert main(["train", "--model", model, *sources, "--output", str(out)]) == 0
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(out)
    for name in (str(out), ".", str(tmp_path / "link")):
        options = ReadingOptions(model=name)
        assert options.rules(Checkpoint(name)).max_length == 9
    stored = json.loads((out / "options.json").read_text())
    stored["max_length"] = "9"
    (out / "options.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="not as it was written"):
        ReadingOptions(model=str(out)).rules(Checkpoint(str(out)))
    del stored[CHECKSUM]  # as in a run of before there were checksums
    (out / "options.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match='"max_length" or "truncate" is not that of a run'):
        ReadingOptions(model=str(out)).rules(Checkpoint(str(out)))


def test_a_long_line_and_a_long_path_are_refused(world, run, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 9_000_000, "chosen": "b", "rejected": "c"}))
    said = refused(capsys, "evaluate", "--model", run, "--source", f"a={path}")
    assert "a line of more than 8 million bytes" in said
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b"0" * 20_000_000)
    said = refused(capsys, "evaluate", "--model", run, "--source", f"a={tmp_path / 'a.jsonl.gz'}")
    assert "8 million bytes" in said
    deep = tmp_path / "/".join(["a"] * 3000)
    source = ("--source", f"a={world[1]['ana'][0]}")
    refused(capsys, "train", "--model", run, *source, "--output", deep)
    assert not (tmp_path / "a").exists()


def test_a_pair_of_which_both_sides_were_cut_counts_as_one_truncated_line(run, tmp_path, capsys):
    long = " amber anchor basil" * 40
    line = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": long, "rejected": long + " coral"}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    score(run, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "1 lines scored, 1 truncated to 64 tokens" in capsys.readouterr().out


def lines(path, *records):
    """Write a file of one line a record; bytes are written as they are."""
    encoded = [r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records]
    path.write_bytes(b"".join(encoded))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def refused(capsys, *arguments):
    """Run a verb that must be refused; returns the one line it says."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith(("minimore:", f"minimore {arguments[0]}:")), said
    return said


BAD_PAIRS = {
    "empty file": ([], "is empty"),
    "not JSON": ([GOOD, b"{nope\n"], ":2: not JSON"),
    "truncated JSON": ([b'{"prompt": "a", "cho'], ":1: not JSON"),
    "not an object": ([GOOD, b"[1, 2]\n"], ":2: a JSON list; expected an object"),
    "a missing key": (
        [GOOD, {"prompt": "a", "chosen": "b"}],
        ':2: "rejected" is missing; found keys: prompt, chosen',
    ),
    "no known key": ([{"question": "a"}], ':1: "chosen" is missing; found keys: question'),
    "an empty object": ([{}], "found keys: none"),
    "a number": ([GOOD | {"chosen": 3}], '"chosen" is 3; expected a string'),
    "null": ([GOOD | {"prompt": None}], '"prompt" is null; expected a string'),
    "a list that holds no message": ([GOOD | {"chosen": [["x"]]}], "expected a string"),
    "a message without content": (
        [GOOD | {"chosen": [{"role": "user"}]}],
        '"chosen"[0]: "content" is missing; found keys: role',
    ),
    "a message whose content is null": (
        [GOOD | {"chosen": [{"role": "user", "content": None}]}],
        '"content" is null',
    ),
    "a rejected that is a number": (
        [GOOD | {"chosen": [{"role": "user", "content": "x"}], "rejected": 3}],
        "expected a string, or messages",
    ),
    "a rejected that is missing": (
        [{"chosen": [{"role": "user", "content": "x"}]}],
        '"rejected" is missing',
    ),
    "a rejected that holds a number": ([GOOD | {"rejected": ["x", 3]}], '"rejected"[1] is 3'),
    "no rejected response": ([GOOD | {"rejected": []}], '"rejected" is []'),
    "not UTF-8": ([GOOD, b'{"prompt": "\xff"}\n'], ":2: not UTF-8"),
    "half a surrogate pair": (
        [b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n'],
        "surrogate",
    ),
    "deep nesting": ([b"[" * 100000 + b"\n"], ": not JSON"),
    "a huge number": ([b'{"a": ' + b"9" * 5000 + b"}\n"], ":1: not JSON"),
    "only label ties": (
        [{"text": ["a", "b"], "score": [1, 1]}],
        "no usable pair: of 1 records, 1 label ties",
    ),
    "only identical": ([GOOD | {"chosen": "x", "rejected": "x"}], "no usable pair"),
    "text without score": (
        [{"text": ["a", "b"]}],
        '"score" is missing; expected a list of 2 numbers',
    ),
    "scores of another length": ([{"text": ["a", "b"], "score": [1]}], '"score" is [1]'),
    "a score that is a string": ([{"text": ["a", "b"], "score": [1, "2"]}], '"score" is [1, "2"]'),
    "a score that is true": ([{"text": ["a", "b"], "score": [1, True]}], '"score"'),
    "a score that is NaN": ([b'{"text": ["a", "b"], "score": [1, NaN]}\n'], '"score"'),
    "one text": (
        [{"text": ["a"], "score": [1]}],
        '"text" is ["a"]; expected a list of two or more',
    ),
    "a text that is a number": ([{"text": ["a", 2], "score": [1, 2]}], '"text"[1] is 2'),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_refused(name, world, run, tmp_path, capsys):
    content, expected = BAD_PAIRS[name]
    path = lines(tmp_path / "bad.jsonl", *content)
    assert expected in refused(
        capsys, "train", "--model", run, "--source", f"a={path}", "--output", tmp_path / "out"
    )
    assert expected in refused(
        capsys, "evaluate", "--model", run, "--source", f"a={path}", "--json", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "empty file",
        "not JSON",
        "not an object",
        "a missing key",
        "no known key",
        "a number",
        "not UTF-8",
    ],
)
def test_score_refuses_bad_lines_and_leaves_no_output(name, run, tmp_path, capsys):
    path = lines(tmp_path / "bad.jsonl", *BAD_PAIRS[name][0])
    refused(capsys, "score", "--model", run, "--input", path, "--output", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_files_that_cannot_be_read(world, run, tmp_path, capsys):
    good = lines(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() + b"\n")[:-20])
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"a": 1}\n')
    for path, expected in (
        ("absent.jsonl", "no such file"),
        ("cut.jsonl.gz", "cannot be read"),
        ("plain.jsonl.gz", "cannot be read"),
        ("folder", "a directory without"),
    ):
        sources = ("--source", f"a={good}", "--source", f"b={tmp_path / path}")
        output = ("--output", tmp_path / "out")
        said = refused(capsys, "train", "--model", run, *sources, *output)
        assert expected in said and str(tmp_path) in said
        refused(capsys, "score", "--model", run, "--input", tmp_path / path, *output)
    assert not (tmp_path / "out").exists()


def test_bad_options_are_refused(world, run, tmp_path, capsys):
    directory, paths = world
    good, out = lines(tmp_path / "good.jsonl", GOOD), tmp_path / "out"

    def bad(*more, sources=(f"a={good}",)):
        named = [w for s in sources for w in ("--source", s)]
        return refused(capsys, "train", "--model", run, *named, "--output", out, *more)

    assert "'a' is named twice" in bad(sources=(f"a={good}", f"a={good}"))
    assert "--source is missing" in bad(sources=())
    for wrong in ("a", f"={good}", "a=", f"a={good},", f"a={good},b,c"):
        assert "expected NAME=TRAIN.jsonl[,TEST.jsonl]" in bad(sources=(wrong,))
    two = (f"a={good}", f"b={good}")
    assert "expected a multiple of 2" in bad("--batch-size", 3, sources=two)
    assert "needs --sampling equal" in bad(
        "--lambda-scope", "group", "--sampling", "proportional", sources=two
    )
    assert "at most 12" in bad(sources=tuple(f"s{i}={good}" for i in range(13)))
    for flag, value in (
        ("--batch-size", 0),
        ("--batch-size", "many"),
        ("--epochs", 0),
        ("--max-length", 0),
        ("--save-steps", -1),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--warmup", 1.5),
        ("--gradient-average", 0),
        ("--method", "mgda"),
        ("--seed", -1),
        ("--pairs-per-source", 0),
        ("--micro-tokens", 0),
        ("--eval-steps", 5),
        ("--weight-decay", -1),
        ("--label-smoothing", 0.5),
        ("--learning-rat", 1),
    ):
        bad(flag, value)
    if not torch.cuda.is_available():
        assert "--device cuda" in bad("--device", "cuda")
    for flag, value in (("--seed", -1), ("--pairs", 0), ("--pairs", "many")):
        refused(capsys, "demo", "--output", out, flag, value)
    assert not out.exists()
    refused(capsys, "train", "--model", run, "--source", f"a={good}")  # no --output
    refused(capsys, "evaluate", "--model", run, "--source", f"a={good},{good}")


def test_every_message_is_one_short_line_whatever_the_names_hold(world, run, tmp_path, capsys):
    model = world[0] / "model"  # without a head: its notice must not come first
    for path in (
        lines(tmp_path / "a.jsonl", {"a\nb\x1b": 1}),
        lines(tmp_path / "b.jsonl", {f"key{i}": 1 for i in range(100_000)}),
        tmp_path / "no\nfile",
    ):
        for arguments in (
            ("evaluate", "--source", f"a={path}"),
            ("score", "--input", path, "--output", tmp_path / "out"),
        ):
            assert len(refused(capsys, arguments[0], "--model", model, *arguments[1:])) < 1100
    refused(capsys, "evaluate", "--model", run, "--source", f"a\nb={path}")
    refused(capsys, "evaluate", "--model", "x\ny", "--source", f"a={path}", "--wh\nat")
    refused(capsys, "evaluate", "--model", run, "--source", "a=\udcff")
    assert not (tmp_path / "out").exists()


def test_absurd_outputs_are_refused_before_the_work(run, tmp_path, capsys, monkeypatch):
    good = lines(tmp_path / "good.jsonl", GOOD)
    for flag in ("--json", "--figures"):
        refused(capsys, "evaluate", "--model", run, "--source", f"a={good}", flag, "")
    outputs = ("--json", tmp_path / "f" / "j", "--figures", tmp_path / "f")
    refused(capsys, "evaluate", "--model", run, "--source", f"a={good}", *outputs)
    for output in ("", tmp_path / "good.jsonl" / "out"):
        refused(capsys, "score", "--model", run, "--input", good, "--output", output)
    refused(capsys, "train", "--model", run, "--source", f"a={good}", "--output", "")
    assert "no such directory" in refused(capsys, "check", "--model", "")
    assert "MODEL is missing" in refused(capsys, "check")
    refused(capsys, "demo", "--output", "")
    refused(capsys, "demo", "--output", tmp_path / "demo", "--pairs", 10**15)
    if not torch.cuda.is_available():
        refused(capsys, "demo", "--output", tmp_path / "demo", "--device", "cuda")
    assert [p.name for p in tmp_path.iterdir()] == ["good.jsonl"]


def test_a_users_own_partial_file_is_left_alone(run, tmp_path):
    good = lines(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "out.partial").write_text("mine")
    score(run, good, tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} >= {"good.jsonl", "out", "out.crc32"}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_disk_that_fills_ends_in_one_line_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    good = lines(tmp_path / "good.jsonl", GOOD)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert "No space left" in refused(
        capsys, "score", "--model", run, "--input", good, "--output", tmp_path / "out"
    )
    assert "No space left" in refused(
        capsys, "evaluate", "--model", run, "--source", f"a={good}", "--json", tmp_path / "out"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["good.jsonl"]


@pytest.mark.slow
def test_the_kernel_refuses_to_write_and_nothing_is_left(run, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    good, out = lines(tmp_path / "good.jsonl", *[GOOD] * 300), tmp_path / "out"
    for arguments in (
        ("score", "--input", good, "--output", out),
        ("evaluate", "--source", f"a={good}", "--json", out),
        ("evaluate", "--source", f"a={good}", "--figures", out),
        ("check", "--parity", "none", "--json", out),
    ):
        for limit in (0, 500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                said = refused(capsys, arguments[0], "--model", run, *arguments[1:])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert "too large" in said and [p.name for p in tmp_path.iterdir()] == ["good.jsonl"], (
                arguments
            )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_score_leaves_nothing(run, tmp_path, number):
    """The input is a pipe that never ends: the signal comes while score waits."""
    os.mkfifo(tmp_path / "in")
    words = ["score", "--model", run, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    process = Command(words)
    with open(tmp_path / "in", "w") as pipe:
        pipe.write((json.dumps(GOOD) + "\n") * 600)
        pipe.flush()
        while len(list(tmp_path.iterdir())) < 2:
            assert process.is_running
            time.sleep(0.05)
        process.signal(number)
        assert process.wait(60) == 128 + number and "Traceback" not in process.error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_score_reads_a_pipe_and_says_what_it_replaced(run, tmp_path, capsys):
    record = {"prompt": "amber", "response": " basil", "reward": "mine"}
    end_to_read, end_to_write = os.pipe()
    with open(end_to_write, "w") as pipe:
        pipe.write((json.dumps(record) + "\n") * 3)
    score(run, f"/dev/fd/{end_to_read}", tmp_path / "out")
    os.close(end_to_read)
    said = capsys.readouterr().out
    assert "3 lines scored" in said and "3 had such a key already" in said
    assert len(read(tmp_path / "out")) == 3


def test_what_cannot_be_saved_is_refused_before_training(run, tmp_path, capsys):
    good, odd = lines(tmp_path / "good.jsonl", GOOD), tmp_path / "odd"
    for change in ({"note": float("nan")}, {"note": "\ud800"}, {"\ud800": 1}):
        shutil.copytree(run, odd)
        (odd / "options.json").unlink()
        config = json.loads((run / "config.json").read_text()) | change
        (odd / "config.json").write_text(json.dumps(config))
        output = ("--output", tmp_path / "out")
        refused(capsys, "train", "--model", odd, "--source", f"a={good}", *output)
        shutil.rmtree(odd)
    assert not (tmp_path / "out").exists()


def test_existing_outputs_are_refused_and_kept(run, tmp_path, capsys):
    good = lines(tmp_path / "good.jsonl", GOOD)
    before = (tmp_path / "good.jsonl").read_bytes()
    for arguments in (
        ("train", "--model", run, "--source", f"a={good}", "--output", good),
        ("evaluate", "--model", run, "--source", f"a={good}", "--json", good),
        ("score", "--model", run, "--input", good, "--output", good),
        ("demo", "--output", good),
        ("check", "--model", run, "--json", good),
    ):
        assert "exists already" in refused(capsys, *arguments)
    assert (tmp_path / "good.jsonl").read_bytes() == before
    assert "not a directory" in refused(
        capsys, "score", "--model", run, "--input", good, "--output", good + "/x"
    )


def test_bad_models_are_refused_by_every_verb(run, tmp_path, capsys):
    """The whole table is in test_checkpoint.py; this is the way out to the user."""
    good = lines(tmp_path / "good.jsonl", GOOD)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((run / name).read_bytes())
    (broken / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
    for model in (broken, tmp_path / "absent", tmp_path):
        for arguments in (
            ("train", "--source", f"a={good}", "--output", tmp_path / "out"),
            ("evaluate", "--source", f"a={good}"),
            ("score", "--input", good, "--output", tmp_path / "out"),
            ("check", "--json", tmp_path / "out"),
        ):
            refused(capsys, arguments[0], "--model", model, *arguments[1:])
    assert not (tmp_path / "out").exists()


def test_handled_and_counted_never_refused(run, tmp_path, capsys):
    odd = lines(
        tmp_path / "odd.jsonl",
        GOOD,
        GOOD | {"prompt": "amber " * 3000},
        GOOD | {"chosen": "x", "rejected": "x"},
        {"text": ["a", "b", "c"], "score": [1, 1, 0]},
        GOOD | {"rejected": ""},
        GOOD | {"chosen": " ", "margin": 3},
        {"prompt": "", "chosen": "", "rejected": "a"},
    )
    counts = {"pairs": 6, "label_ties": 1, "identical": 1, "truncated": 1, "blank": 2, "dropped": 1}
    report = report_of(run, odd, tmp_path / "r.json")
    assert {name: report[name] for name in counts} == counts
    train(run, tmp_path / "out", "--source", f"odd={odd}")


@pytest.mark.slow
def test_evaluate_writes_the_report(world, run, tmp_path, capsys):
    sources = [a for n, (_, test) in world[1].items() for a in ("--source", f"{n}={test}")]
    outputs = ("--json", tmp_path / "r.json", "--figures", tmp_path / "figures")
    succeed("evaluate", "--model", run, *sources, *outputs)
    report, said = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    proper = ["accuracy", "ece", "ace", "mce", "brier", "nll", "mean_margin"]
    rates = [*proper, "length_accuracy", "random_accuracy", "ece_debiased"]
    assert list(report["mean"]) == rates and list(report["sources"]) == ["ana", "ben"]
    for rate in rates:
        assert report["mean"][rate] == pytest.approx(
            np.mean([r[rate] for r in report["sources"].values()])
        )
    for r in report["sources"].values():
        assert r["pairs"] + r["label_ties"] == 30
        assert f"{r['accuracy']:.3f} [".removeprefix("0") in said
        assert r["accuracy_interval"][0] < r["accuracy"] < r["accuracy_interval"][1]
    assert (tmp_path / "figures" / "margins.png").stat().st_size > 5000


def test_evaluate_compares_and_calibrates(world, run, tmp_path, capsys):
    (name, (train_path, test_path)), *_ = world[1].items()
    source = ("evaluate", "--model", run, "--source", f"{name}={test_path}")
    calibrate = ("--calibrate", f"{name}={train_path}")
    baseline = ("--baseline", world[0] / "model")
    succeed(*source, *baseline, *calibrate, "--allow-overlap", "--json", tmp_path / "r.json")
    report, said = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    row, difference = report["sources"][name], report["differences"][name]
    assert row["calibration"] in ("indistinguishable", "over-confident", "under-confident")
    assert (row["ece_interval"] is None) == (row["calibration"] == "indistinguishable")
    low, high = difference["accuracy_interval"]
    assert difference["pairs"] == row["pairs"] and low <= difference["accuracy"] <= high
    low, high = difference["nll_interval"]
    assert low <= difference["nll"] <= high
    theirs = report["baseline_report"]["sources"][name]
    assert difference["nll"] == pytest.approx(row["nll"] - theirs["nll"])
    assert report["mean_difference"]["nll_interval"] == pytest.approx([low, high])
    assert "exceeds noise" in said and f"{world[0] / 'model'}, the baseline:" in said
    pooled = report["temperatures"]["pooled"]
    assert pooled == report["temperatures"]["sources"][name]["temperature"]
    assert f"{pooled:.3f}" in said
    assert "--baseline" in refused(capsys, *source, "--baseline", tmp_path / "absent")
    assert "is a test file" in refused(capsys, *source, "--calibrate", f"{name}={test_path}")
    assert "is no --source" in refused(capsys, *source, "--calibrate", f"typo={train_path}")


def test_the_length_baseline_prefers_the_longer_response(run, tmp_path):
    longer, alike, shorter = (
        GOOD | {"chosen": " basil and cedar"},
        GOOD,
        GOOD | {"rejected": " copper"},
    )
    path = lines(tmp_path / "in.jsonl", longer, longer, alike, shorter)
    report = report_of(run, path, tmp_path / "r.json")
    assert report["length_accuracy"] == (1 + 1 + 0.5 + 0) / 4


def test_score_agrees_with_evaluate_and_streams_in_order(world, run, tmp_path):
    path = world[1]["ana"][1]
    records = read(path)
    pairs = [r for r in records if "chosen" in r]
    single = {"prompt": "amber", "response": " basil", "id": 7, "note": "\ud800"}
    empty = {"prompt": "amber", "response": ""}
    ranked = {"text": ["amber basil", "amber", "amber basil"], "score": [1, 0, 1]}
    mixed = lines(tmp_path / "in.jsonl", *pairs, single, empty, ranked)
    score(run, mixed, tmp_path / "out.jsonl")
    *scored, scored_single, scored_empty, scored_ranked = read(tmp_path / "out.jsonl")
    reward, rewards = scored_single.pop("reward"), scored_ranked.pop("rewards")
    del scored_empty["reward"]
    assert (scored_single, scored_empty, scored_ranked) == (single, empty, ranked)
    assert rewards[0] == pytest.approx(reward, abs=1e-6) == pytest.approx(rewards[2], abs=1e-6)
    assert [s["prompt"] for s in scored] == [r["prompt"] for r in pairs]
    margins = [s["chosen_reward"] - s["rejected_reward"] for s in scored]
    probabilities = [1 / (1 + math.exp(-margin)) for margin in margins]
    assert [s["probability"] for s in scored] == pytest.approx(probabilities)
    report = report_of(run, path, tmp_path / "r.json")
    assert report["accuracy"] == calibration.accuracy(margins)
    assert report["ece"] == pytest.approx(calibration.pair_ece(margins), abs=1e-6)


def test_scores_do_not_depend_on_company(world, run, tmp_path):
    records = read(world[1]["ana"][1])[:12]
    records = [{"prompt": r["prompt"], "response": r["chosen"]} for r in records if "chosen" in r]
    together = lines(tmp_path / "in.jsonl", *records)
    reversed_ = lines(tmp_path / "reversed.jsonl", *records[::-1])
    for name, path, micro in (("a", together, 8192), ("b", together, 1), ("c", reversed_, 100)):
        score(run, path, tmp_path / name, "--micro-tokens", micro)
    a, b, c = ([r["reward"] for r in read(tmp_path / n)] for n in "abc")
    assert a == pytest.approx(b, abs=1e-5) and a == pytest.approx(c[::-1], abs=1e-5)


def test_max_length_is_the_runs_own_unless_asked(world, run, tmp_path, capsys):
    path = lines(tmp_path / "in.jsonl", {"prompt": "amber " * 100, "response": " basil"})
    score(run, path, tmp_path / "a")
    assert "1 truncated to 64 tokens" in capsys.readouterr().out
    score(run, path, tmp_path / "b", "--max-length", "500")
    assert "0 truncated to 500 tokens" in capsys.readouterr().out


def test_truncation_is_the_runs_own_unless_asked(world, tmp_path, capsys):
    long = lines(
        tmp_path / "in.jsonl",
        {"prompt": "amber " * 100, "chosen": " basil", "rejected": " cedar" * 20},
        {"prompt": "amber " * 100, "response": " basil"},
    )
    options = ("--source", f"a={world[1]['ana'][0]}", "--max-length", 64, "--truncate", "together")
    train(world[0] / "model", tmp_path / "run", *options)
    scored = {}
    for name, more in (
        ("own", ()),
        ("together", ("--truncate", "together")),
        ("each", ("--truncate", "each")),
    ):
        score(tmp_path / "run", long, tmp_path / name, *more)
        scored[name] = read(tmp_path / name)
    assert scored["own"] == scored["together"] != scored["each"]
    assert scored["own"][1] == scored["each"][1]


def test_an_untrained_head_is_said_to_be_one(world, tmp_path, capsys):
    path = lines(tmp_path / "in.jsonl", GOOD)
    succeed("evaluate", "--model", world[0] / "model", "--source", f"a={path}")
    assert "untrained head" in capsys.readouterr().err


def test_a_reward_model_goes_on_with_its_head(run, tmp_path):
    good = lines(tmp_path / "good.jsonl", GOOD)
    train(run, tmp_path / "out", "--source", f"a={good}", "--learning-rate", "1e-30")
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["score.weight"],
        load_file(run / "model.safetensors")["score.weight"],
    )


def test_weights_that_overflow_end_in_one_line_and_exit_code_1(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((run / name).read_bytes())
    good = lines(tmp_path / "good.jsonl", GOOD)

    def code_with(name):
        """The exit code of score when one tensor is 1e38 times as large."""
        tensors = load_file(run / "model.safetensors")
        tensors[name] *= 1e38
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        output = ["--output", str(tmp_path / name)]
        return main(["score", "--model", str(broken), "--input", good, *output])

    assert code_with("score.weight") in (0, 1)
    capsys.readouterr()
    assert code_with("gpt_neox.final_layer_norm.weight") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "gpt_neox.final_layer_norm.weight").exists()


@pytest.mark.slow
def test_the_module_is_the_command_and_needs_no_extras(capsys):
    script = """
import runpy, sys
for name in ("transformers", "matplotlib"):
    sys.modules[name] = None
import minimore.figures.plots
assert not minimore.figures.plots.available()
sys.argv = ["minimore", "--version"]
runpy.run_module("minimore", run_name="__main__")
"""
    command = [sys.executable, "-W", "error", "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert process.stdout == capsys.readouterr().out


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), "--help"])
        assert stop.value.code == 0
        expected = "--lambda-scope" if verb == "train" else "--"
        assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly():
    command = [
        sys.executable,
        "-m",
        "minimore",
        "check",
        str(GOLDENS / "llama"),
        "--parity",
        "none",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
