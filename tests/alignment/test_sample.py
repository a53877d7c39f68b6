"""Samples of a file of prompts: ordinary JSON lines, and the same after a kill."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, write_checkpoint
from power_cut import Disk, restore
from reference import reference_model
from safetensors.torch import load_file

import minimore.alignment.sample as sampling
from minimore.alignment.generate import Sample
from minimore.alignment.responses import texts_to_learn
from minimore.alignment.sample import prompt_of, response_text, stop_at
from minimore.cli import main
from minimore.data.world import World
from minimore.model.checkpoint import Checkpoint
from minimore.model.tensors import write_tensors
from minimore.options import InputError

PROMPTS = [
    {"prompt": f"\n\nHuman: {word}\n\nAssistant:"}
    for word in ("amber", "basil coral", "cedar", "a", "b")
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A language model with random weights, and a file of prompts."""
    home = tmp_path_factory.mktemp("policy")
    World(annotators=("ana", "ben"), train_pairs=(20,), test_pairs=5).write(home)
    weights = home / "model" / "model.safetensors"
    head = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    write_tensors(weights, load_file(weights) | {"embed_out.weight": head})
    (home / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return home


def command(policy, output, *more, samples=3):
    words = ["align", "sample", "--model", policy / "model", "--input", policy / "prompts.jsonl"]
    words += ["--output", output, "--samples", samples, "--max-new-tokens", 12]
    return [str(word) for word in (*words, "--batch-size", 6, *more)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_every_prompt_gets_its_responses_in_order(policy, tmp_path, capsys):
    assert main(command(policy, tmp_path / "out")) == 0
    records = read(tmp_path / "out")
    assert [record["prompt"] for record in records] == [p["prompt"] for p in PROMPTS]
    for record in records:
        assert len(record["responses"]) == len(record["finished"]) == 3
        assert len(set(record["responses"])) == 3
    assert "3 responses to each of 5 prompts" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.crc32"]
    assert main(command(policy, tmp_path / "again")) == 0
    assert read(tmp_path / "again") == records
    assert main(command(policy, tmp_path / "other", "--seed", 1)) == 0
    assert read(tmp_path / "other") != records
    greedy = ("--temperature", 0)
    assert main(command(policy, tmp_path / "greedy", *greedy)) == 0
    assert all(len(set(record["responses"])) == 1 for record in read(tmp_path / "greedy"))


def test_more_samples_of_a_prompt_begin_with_the_same_ones(policy, tmp_path):
    for count in (2, 5):
        assert main(command(policy, tmp_path / str(count), samples=count)) == 0
    for few, many in zip(read(tmp_path / "2"), read(tmp_path / "5")):
        assert many["responses"][:2] == few["responses"]


def test_score_reads_samples(policy, tmp_path):
    assert main(command(policy, tmp_path / "out")) == 0
    scored = ["score", "--model", policy / "model", "--input", tmp_path / "out"]
    assert main([str(w) for w in (*scored, "--output", tmp_path / "best", "--best")]) == 0
    for record, best in zip(read(tmp_path / "out"), read(tmp_path / "best")):
        assert best["response"] in record["responses"] and best["margin"] >= 0


def test_a_stop_string_ends_a_response(policy, tmp_path):
    assert main(command(policy, tmp_path / "long")) == 0
    stop = read(tmp_path / "long")[0]["responses"][0][3:5]
    assert main(command(policy, tmp_path / "out", "--stop", stop)) == 0
    for before, after in zip(read(tmp_path / "long"), read(tmp_path / "out")):
        for one, other in zip(before["responses"], after["responses"]):
            assert other == one.split(stop)[0] and stop not in other
    assert any(any(record["finished"]) for record in read(tmp_path / "out"))


def test_prompts_of_pairs_and_messages(policy, tmp_path):
    records = [
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " c", "rejected": " d"},
        {"prompt": [{"role": "user", "content": "q"}]},
        {"question": "r"},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [str(path) if w.endswith("prompts.jsonl") else w for w in command(policy, "x")]
    words[words.index("x")] = str(tmp_path / "out")
    assert main(words) == 0
    prompts = [record["prompt"] for record in read(tmp_path / "out")]
    assert prompts == ["\n\nHuman: q\n\nAssistant:", "r"]  # the first three are one prompt


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_the_same(policy, tmp_path, monkeypatch, capsys):
    assert main(command(policy, tmp_path / "whole")) == 0
    real, calls = sampling.generate, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(*arguments)

    monkeypatch.setattr(sampling, "generate", dies)
    with pytest.raises(RuntimeError, match="killed"):
        main(command(policy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main(command(policy, tmp_path / "out")) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(command(policy, tmp_path / "out", "--resume", "--seed", 5)) == 2
    assert "begun with other options" in capsys.readouterr().err
    with (tmp_path / "out.unfinished").open("a") as file:
        file.write('0badc0de {"prompt"')  # a line that was cut short
    calls[:] = [1, 1]
    assert main(command(policy, tmp_path / "out", "--resume")) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(calls) == 4  # the first portion was not written again
    names = ["out", "out.crc32", "whole", "whole.crc32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], *lines[1:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, *lines[1:]],
    ],
    ids=["a line is gone", "a line stands twice", "two are swapped", "all stand twice"],
)
def test_an_edited_file_of_what_is_done_changes_nothing(policy, tmp_path, monkeypatch, edit):
    assert main(command(policy, tmp_path / "whole")) == 0
    work = tmp_path / "out.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "records_written_whole", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(policy, tmp_path / "out"))
    work.write_text("".join(edit(work.read_text().splitlines(keepends=True))))
    assert main(command(policy, tmp_path / "out", "--resume")) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
def test_a_power_cut(policy, tmp_path, monkeypatch):
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert main(command(policy, root / "out")) == 0
    expected = (root / "out").read_bytes()
    assert disk.lazy["out"] == expected
    root.rename(tmp_path / "first")
    for state in disk.states:
        restore(state, root)
        if "out" in state:
            assert state["out"] == expected
        else:
            assert main(command(policy, root / "out", "--resume")) == 0
            assert (root / "out").read_bytes() == expected
        root.rename(tmp_path / f"after-{id(state)}")


@pytest.mark.parametrize(
    "more, words",
    [
        (("--temperature", -1), "--temperature -1"),
        (("--top-p", 1.5), "--top-p"),
        (("--top-p", 0), "--top-p"),
        (("--top-p", -0.5), "--top-p"),
        (("--top-k", -1), "--top-k"),
        (("--max-new-tokens", -1), "--max-new-tokens"),
        (("--max-length", 0), "--max-length"),
        (("--batch-size", -3), "--batch-size"),
        (("--micro-tokens", 0), "--micro-tokens"),
        (("--seed", -1), "--seed"),
        (("--samples", 0), "--samples"),
        (("--stop", ""), "--stop"),
        (("--temperature", 1e-9), "--temperature"),
        (("--input", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_options_are_one_line(policy, tmp_path, capsys, more, words):
    assert main(command(policy, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_command_with_fewer_at_a_time_writes_the_same(policy, tmp_path):
    """Prompts in parts, and the samples of one prompt in more than one batch."""
    assert main(command(policy, tmp_path / "whole")) == 0
    for name, size, tokens in (("a", 1, 8192), ("b", 2, 1), ("c", 64, 20)):
        few = ("--batch-size", size, "--micro-tokens", tokens)
        assert main(command(policy, tmp_path / name, *few)) == 0
        assert read(tmp_path / name) == read(tmp_path / "whole")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_stop_is_seen_with_the_token_that_ends_it(family):
    """As soon as in the whole text, with letters of several tokens and tokens of no text, too."""
    tokenizer = Checkpoint(str(GOLDENS / family)).tokenizer
    random = np.random.default_rng(0)
    text = "one two, three Grüße 🌱 four\n\nHuman: five  six"
    words = tokenizer.encode([text])[0]
    stops = ["Human:", "🌱", "ü", " two", "x", "s e"]
    for trial in range(60):
        tokens = random.choice(words, 80).tolist()
        if trial % 2:  # a whole text somewhere among them
            place = random.integers(80)
            tokens[place:place] = words
        (prompt,) = tokenizer.encode(["Tell me"])
        some = random.choice(stops, 2).tolist()
        ends = stop_at(some, tokenizer, [prompt], frozenset())
        for t in range(1, len(tokens)):
            whole = response_text(tokenizer, prompt, tokens[:t], frozenset())
            expected = any(stop in whole for stop in some)
            assert ends(Sample(0, 0, tokens[:t])) == expected
            if expected:
                break


@pytest.mark.slow
def test_more_tokens_than_positions_are_one_line(transformers, tmp_path, policy, capsys):
    theirs = reference_model("opt", head="ForCausalLM", max_position_embeddings=40)
    write_checkpoint(theirs, tmp_path / "opt")
    words = command(policy, tmp_path / "out", "--max-length", 28)
    words[words.index(str(policy / "model"))] = str(tmp_path / "opt")
    assert main(words) == 0
    words[words.index("28")] = "29"
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--max-length and --max-new-tokens together 41" in said and said.count("\n") == 1
    assert "learned positions for 40" in said


@pytest.mark.parametrize("output", ["", ".", "file/deep/out", "file/out", "x" * 300, "/proc/out"])
def test_an_output_that_cannot_be_written_is_one_line(
    policy, tmp_path, monkeypatch, capsys, output
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(command(policy, output)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_cannot_write_and_an_empty_prompt_are_one_line(policy, tmp_path, capsys):
    pairs = policy / "data/ana.train.jsonl"
    train = ["train", "--model", policy / "model", "--source", f"a={pairs}", "--batch-size", 6]
    assert main([str(word) for word in (*train, "--output", tmp_path / "reward")]) == 0
    words = command(policy, tmp_path / "out")
    words[words.index(str(policy / "model"))] = str(tmp_path / "reward")
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "no language-model head" in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    assert main(command(policy, tmp_path / "out", "--input", tmp_path / "empty.jsonl")) == 2
    said = capsys.readouterr().err
    assert "the prompt is empty" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "extra, words", [("NaN", "holds a number that is not finite"), ('"\\ud800"', None)]
)
def test_what_cannot_be_written_again_is_refused_before_anything_is(
    policy, tmp_path, capsys, extra, words
):
    line = '{"prompt": [{"role": "user", "content": "q", "name": EXTRA}]}\n'.replace("EXTRA", extra)
    (tmp_path / "in.jsonl").write_text(line)
    code = main(command(policy, tmp_path / "out", "--input", tmp_path / "in.jsonl"))
    if words is None:  # half of a surrogate pair is written as it came
        assert code == 0
        assert read(tmp_path / "out")[0]["prompt"] == json.loads(line)["prompt"]
    else:
        assert code == 2 and words in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))


def test_a_sample_of_messages_is_learned_as_it_was_written(policy, tmp_path, monkeypatch):
    """Without a template, "Assistant: " has the space in it with which a response begins."""
    (tmp_path / "in.jsonl").write_text('{"prompt": [{"role": "user", "content": "q"}]}\n')
    monkeypatch.setattr(sampling, "response_text", lambda *_: " yes ")
    assert main(command(policy, tmp_path / "out", "--input", tmp_path / "in.jsonl")) == 0
    tokenizer = Checkpoint(str(policy / "model")).tokenizer
    (texts,) = texts_to_learn(read(tmp_path / "out")[0], "", tokenizer)
    assert texts.prompt + texts.responses[0] == "\n\nHuman: q\n\nAssistant: yes "
    strings = command(policy, tmp_path / "strings")
    assert main(strings) == 0 and read(tmp_path / "strings")[0]["responses"][0] == " yes "


def test_whole_texts_have_the_prompt_that_they_share():
    """As the demo writes label ties: a list of texts with scores, and no prompt of its own."""
    prompt = "\n\nHuman: amber?\n\nAssistant:"
    record = {"text": [prompt + " basil", prompt + " cedar"], "score": [0, 0]}
    assert prompt_of(record, "a.jsonl:1", False) == prompt
    with pytest.raises(InputError, match='"text" is "one"'):
        prompt_of({"text": "one"}, "a.jsonl:1", False)
