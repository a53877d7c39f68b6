"""Texts that end with an EOS token: read as transformers and TRL read them."""

import json
import shutil

import pytest
import torch
from conftest import GOLDENS
from runs import options

import minimore
from minimore.cli import main
from minimore.data.pairs import encode, load_sources
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError
from minimore.train import train

TEXTS = [(f"amber {'basil ' * (i % 9)}", f" cedar{' coral' * (i % 7)} {i}") for i in range(100)]
CARD = "---\nlibrary_name: transformers\ntags:\n- generated_from_trainer\n- trl\n- reward-trainer\n"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def scored(tmp_path, model, records, *more):
    path, out = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    words = ["score", "--model", str(model), "--input", path, "--output", str(out)]
    assert main([*words, "--device", "cpu", *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def with_eos(origin, directory, eos):
    """A copy that names its EOS token."""
    shutil.copytree(origin, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_eos(GOLDENS / "llama", tmp_path_factory.mktemp("eos") / "model", "</s>")


@pytest.fixture
def foreign(model, tmp_path):
    """A reward model that TRL has saved, by its model card."""
    directory = shutil.copytree(model, tmp_path / "foreign")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.mark.parametrize("append", ["yes", "no"])
def test_a_hundred_rewards_are_those_of_transformers(append, model, tmp_path):
    """With the EOS behind the ids, or without."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = Checkpoint(str(model)).tokenizer
    ids = tokenizer.encode([prompt + response for prompt, response in TEXTS])
    end = [tokenizer.eos] if append == "yes" else []
    with torch.no_grad():
        expected = [theirs(torch.tensor([text + end])).logits.item() for text in ids]
    records = [{"prompt": prompt, "response": response} for prompt, response in TEXTS]
    rewards = [r["reward"] for r in scored(tmp_path, model, records, "--append-eos", append)]
    assert rewards == pytest.approx(expected, abs=1e-4)


def test_the_eos_survives_a_cut_and_stands_there_once(model):
    tokenizer = Checkpoint(str(model)).tokenizer
    name = tokenizer.special["eos_token"]
    texts = ["amber basil cedar", f"amber basil cedar{name}", "amber basil cedar"]
    (whole, typed, rendered), _ = encode(texts, tokenizer, 64, [False, False, True], False, True)
    assert whole.tolist() == typed.tolist() == [*rendered.tolist(), tokenizer.eos]
    (cut, _, _), was_cut = encode(texts, tokenizer, 5, [False, False, True], False, True)
    assert was_cut[0] and cut.tolist() == [*whole[: len(tokenizer.bos)], *whole[-4:]][:5]
    assert cut[-1] == tokenizer.eos


def test_a_model_of_trl_is_known_by_its_card(foreign, model, tmp_path, capsys):
    records = [{"prompt": prompt, "response": response} for prompt, response in TEXTS[:5]]
    guessed = scored(tmp_path, foreign, records)
    assert "texts are read at an EOS token behind them, as TRL trains" in capsys.readouterr().out
    assert guessed == scored(tmp_path, model, records, "--append-eos", "yes")
    without = scored(tmp_path, foreign, records, "--append-eos", "no")
    assert without == scored(tmp_path, model, records) != guessed
    opened = minimore.load(str(foreign), device="cpu")
    assert opened.score(*TEXTS[0]) == pytest.approx(guessed[0]["reward"], abs=1e-5)
    assert main(["check", str(foreign), "--parity", "none"]) == 0
    assert "read at an EOS token behind them" in capsys.readouterr().out


def test_a_run_knows_how_it_was_trained(world, tmp_path, capsys):
    """What it trains on, what it says of itself, and how it is read afterwards."""
    run, origin = tmp_path / "run", world[0] / "model"
    named = with_eos(origin, tmp_path / "named", "<|endoftext|>")
    assert train(options(world, run, model=str(named), append_eos="yes")) == 0
    assert "an EOS token behind the text" in (run / "README.md").read_text()
    assert json.loads((run / "options.json").read_text())["append_eos"] == "yes"
    checkpoint = Checkpoint(str(run))
    rules = minimore.reward.ReadingOptions(model=str(run)).rules(checkpoint)
    assert rules.append_eos
    records = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    path = write(tmp_path / "p.jsonl", records)
    labels = minimore.data.pairs.AS_WRITTEN
    (source,) = load_sources("p", path, checkpoint.tokenizer, rules, labels)
    assert source.pairs[0].chosen[-1] == source.pairs[0].rejected[-1] == checkpoint.tokenizer.eos
    capsys.readouterr()
    scored(tmp_path, run, records)
    said = capsys.readouterr().out
    assert "read at an EOS token behind them\n" in said and "TRL" not in said


def test_without_a_named_eos_there_is_none_to_append():
    tokenizer = Checkpoint(str(GOLDENS / "llama")).tokenizer
    with pytest.raises(InputError, match="names no EOS token"):
        encode(["amber"], tokenizer, 64, append_eos=True)
