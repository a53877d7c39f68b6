"""A head of a probe becomes a reward model that everything opens, and that gives its margins."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file

import minimore
from minimore.checksums import read_checked_json, write_checked_json
from minimore.cli import main
from minimore.data.pairs import pack_pairs
from minimore.lab.features import load_features
from minimore.reward import ModelOptions, ReadingOptions, open_reward_model, pair_rewards


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    """A directory with `states` of the world's model and `saved`, and the figures of the probe."""
    home, (directory, paths) = tmp_path_factory.mktemp("probed"), world
    command = ["features", "--model", str(directory / "model"), "--dtype", "float32"]
    for name, (train, test) in paths.items():
        command += ["--source", f"{name}={train},{test}"]
    command += ["--max-length", "48", "--truncate", "together"]
    assert main([*command, "--output", str(home / "states")]) == 0
    probe = ["probe", "--features", str(home / "states"), "--seeds", "3", "--epochs", "2"]
    probe += ["--method", "uniform", "--method", "more", "--json", str(home / "figures.json")]
    assert main([*probe, "--save", str(home / "saved")]) == 0
    return home, json.loads((home / "figures.json").read_text())["methods"]


def test_the_saved_model_has_the_best_figures_and_its_texts_are_read_alike(probed, world):
    home, figures = probed
    nll = {(m, s): np.mean(figures[m]["nll"][s]) for m in figures for s in range(3)}
    method, seed = min(nll, key=nll.get)
    stored = json.loads((home / "saved" / "options.json").read_text())
    assert (stored["method"], stored["seed"]) == (method, seed)
    model, checkpoint = open_reward_model(ModelOptions(model=str(home / "saved")))
    rules = ReadingOptions(model=str(home / "saved")).rules(checkpoint)
    assert rules == (48, "together", False, False) and checkpoint.has_head
    accuracies, losses = [], []
    for name, (_, test) in world[1].items():
        pairs = minimore.load_source(
            name, str(test), checkpoint.tokenizer, rules.max_length, rules.truncate
        ).pairs
        rewards = pair_rewards(model, pairs).double()
        margins = rewards[:, 0] - rewards[:, 1]
        accuracies.append(float((margins > 0).double().mean()))
        losses.append(float(torch.nn.functional.softplus(-margins).mean()))
        with torch.no_grad():
            chosen, rejected = model.features(pack_pairs(pairs))
        states = load_features(str(home / "states"))[1][name]["test"].difference
        assert torch.allclose(chosen - rejected, states, atol=1e-5)
    assert np.mean(losses) == pytest.approx(nll[method, seed], abs=1e-5)
    assert np.mean(accuracies) == pytest.approx(np.mean(figures[method]["accuracy"][seed]))


@pytest.mark.slow
def test_its_trunk_is_the_models_and_transformers_opens_it(probed, world, transformers):
    saved = probed[0] / "saved"
    theirs = load_file(world[0] / "model" / "model.safetensors")
    ours = load_file(saved / "model.safetensors")
    for name in theirs.keys() & ours.keys():
        assert torch.equal(ours[name], theirs[name].float()), name
    assert ours.keys() - theirs.keys() == {"score.weight"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert torch.equal(model.score.weight.detach(), ours["score.weight"])
    opened = minimore.load(saved)
    ids = opened.checkpoint.tokenizer.encode(["tell me a b"])
    with torch.no_grad():
        reward = model(input_ids=torch.tensor(ids)).logits.item()
    assert opened.score("tell me ", "a b") == pytest.approx(reward, abs=1e-4)


def test_what_cannot_be_saved_is_refused(probed, world, tmp_path, capsys):
    states = str(probed[0] / "states")
    other = tmp_path / "other"
    shutil.copytree(world[0] / "model", other)
    edit_json(other / "config.json", {"layer_norm_eps": 1e-4})
    output = str(tmp_path / "out")
    for words, error in (
        (["--save", output, "--model", str(other)], "is not the model whose states were stored"),
        (["--save", str(probed[0] / "saved")], "--save"),
        (["--model", str(other)], "--model: goes with --save"),
        (["--save", output, "--method", "shared"], "--save: expected a --method with one head"),
    ):
        assert main(["probe", "--features", states, "--seeds", "1", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and error in said, said
        assert not (tmp_path / "out").exists()


def test_states_that_do_not_say_how_texts_were_read_make_no_model(probed, tmp_path, capsys):
    states, output = tmp_path / "states", tmp_path / "out"
    shutil.copytree(probed[0] / "states", states)
    description = read_checked_json(states / "features.json")
    del description["model"], description["chat"]
    write_checked_json(states / "features.json", description)
    words = ["probe", "--features", str(states), "--seeds", "1", "--save", str(output)]
    assert main(words) == 2 and not output.exists()
    assert "features.json does not say model, chat of the stored" in capsys.readouterr().err
