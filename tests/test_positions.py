"""More tokens than a model has positions are refused by every command, unless they are meant."""

import json
import shutil

import pytest
import torch
from conftest import edit_json
from runs import options, slow_but

import minimore
from minimore.cli import main
from minimore.model.checkpoint import Checkpoint, read_config
from minimore.options import InputError
from minimore.reward import ModelOptions, ReadingOptions, check_length
from minimore.train import train

NAMED = 40  # max_position_embeddings


@pytest.fixture(scope="module")
def short(world, tmp_path_factory):
    """The world's model, as if it had been made for 40 tokens."""
    directory = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(world[0] / "model", directory)
    edit_json(directory / "config.json", {"max_position_embeddings": NAMED})
    return directory


COMMANDS = {
    "train": ["train", "--source", "ana={train}", "--output", "{out}", "--batch-size", "30"],
    "plan": ["plan", "--tokens", "30"],
    "evaluate": ["evaluate", "--source", "ana={test}", "--json", "{out}"],
    "score": ["score", "--input", "{test}", "--output", "{out}"],
    "features": ["features", "--source", "ana={train},{test}", "--output", "{out}"],
    "sample": ["align", "sample", "--input", "{test}", "--output", "{out}", "--batch-size", "99"],
    "finetune": ["align", "finetune", "--input", "{train}", "--output", "{out}"],
    "dpo": ["align", "finetune", "--loss", "dpo", "--source", "ana={train}", "--output", "{out}"],
    "perplexity": ["align", "perplexity", "--input", "{test}", "--json", "{out}"],
}


@pytest.mark.parametrize("command", slow_but(["train", "sample"], COMMANDS))
def test_every_command_refuses_them_unless_they_are_meant(short, world, tmp_path, capsys, command):
    train_path, test_path = world[1]["ana"]
    names = {"train": train_path, "test": test_path, "out": tmp_path / "out"}
    words = [word.format(**names) for word in COMMANDS[command]] + ["--model", str(short)]
    flag = "--max-length"
    length = NAMED
    if command == "sample":
        flag = "--max-length and --max-new-tokens together"
        words += ["--max-new-tokens", "2", "--samples", "1"]
        length -= 2
    assert main([*words, "--max-length", str(length + 1)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{flag} {NAMED + 1}: " in error
    assert f"was made for {NAMED} tokens" in error and "--beyond-positions" in error
    assert not (tmp_path / "out").exists()
    assert main([*words, "--max-length", str(length + 1), "--beyond-positions"]) == 0


def test_learned_positions_end(tmp_path):
    config = {"model_type": "opt", "max_position_embeddings": NAMED, "ffn_dim": 8}
    config |= {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, _, opt = read_config(tmp_path)
    check_length(opt, NAMED, tmp_path)
    for beyond in (False, True):
        with pytest.raises(InputError, match=f"learned positions for {NAMED} tokens only"):
            check_length(opt, NAMED + 1, tmp_path, beyond=beyond)


def test_a_run_is_read_as_long_as_it_was_trained(short, world, tmp_path):
    run, length = tmp_path / "run", NAMED + 8
    words = {"model": str(short), "max_length": length, "beyond_positions": True}
    assert train(options(world, run, **words)) == 0
    checkpoint = Checkpoint(str(run))
    assert ReadingOptions(model=str(run)).rules(checkpoint).max_length == length
    with pytest.raises(InputError, match=f"--max-length {length + 1}: "):
        ReadingOptions(model=str(run), max_length=length + 1).rules(checkpoint)
    long = "a b c " * 30
    reward = minimore.load(run).score(long, "d")
    assert reward == minimore.load(run, max_length=length).score(long, "d")
    with pytest.raises(InputError, match="was made for"):
        minimore.load(run, max_length=length + 1)
    minimore.load(run, max_length=length + 1, beyond_positions=True).score(long, "d")


def test_python_is_asked_the_same(short):
    model, checkpoint = minimore.open_reward_model(ModelOptions(model=str(short)))
    tokenizer = checkpoint.tokenizer
    with pytest.raises(InputError, match="--max-length 512: .* was made for 40 tokens"):
        minimore.score_texts(model, tokenizer, ["a"], ["b"])
    (meant,) = minimore.score_texts(model, tokenizer, ["a"], ["b"], beyond_positions=True)
    (short_one,) = minimore.score_texts(model, tokenizer, ["a"], ["b"], NAMED)
    assert torch.equal(meant, short_one)
