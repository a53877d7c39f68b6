"""Files as other people have them that ended badly once: each ends in one line that helps."""

import json
import os
from pathlib import Path

import pytest
from conftest import GOLDENS, edit_json
from processes import Command

from minimore.cli import main

REGEX = {"type": "Split", "pattern": {"Regex": "(\n\n("}, "behavior": "Isolated", "invert": False}


def scored(directory, tmp_path, capsys, **record):
    """The one line in which `score` ends."""
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(record or {"prompt": "a", "response": "b"}) + "\n")
    command = ["score", "--model", directory, "--input", path, "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_quantised_weights_are_refused_by_that_name(damaged, tmp_path, capsys):
    directory = damaged("llama", {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert '"quantization_config" says that' in scored(directory, tmp_path, capsys)
    assert main(["plan", "--model", str(directory)]) == 2


def test_a_missing_model_type_is_called_missing(damaged, tmp_path, capsys):
    assert 'has no "model_type"' in scored(damaged("llama", {"model_type": ...}), tmp_path, capsys)


def test_a_regex_of_several_lines_is_rejected_in_one(damaged, tmp_path, capsys):
    directory = damaged("gpt_neox")
    edit_json(directory / "tokenizer.json", {"pre_tokenizer": REGEX})
    assert "not a usable tokenizer" in scored(directory, tmp_path, capsys)


def test_messages_show_other_scripts_as_they_are(tmp_path, capsys):
    line = scored(GOLDENS / "llama", tmp_path, capsys, prompt=["你好"], response="a")
    assert '"prompt" is ["你好"]' in line


def print_to_full():
    """Let this process print to a full device."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", [["plan", "--model", GOLDENS / "llama"], ["--help"], ["train", "--help"]]
)
def test_a_full_device_behind_stdout_is_one_line(tmp_path, words):
    command = Command(words, tmp_path, before=print_to_full)
    assert command.wait() == 2
    assert command.error.count("\n") == 1 and "No space left on device" in command.error
