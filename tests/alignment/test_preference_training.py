"""`align finetune` on preference pairs: an ordinary run, whose references are asked once."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import minimore.alignment.references as references
import minimore.training as training
from minimore.alignment.comparisons import read_comparisons
from minimore.alignment.preference_losses import LOSSES
from minimore.calibration import accuracy, pair_ece
from minimore.cli import main
from minimore.data.world import World
from minimore.engine.optim import AdamW
from minimore.figures.history import What, read_history
from minimore.model.checkpoint import Checkpoint

ANNOTATORS = ("ana", "ben")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small world, another policy, and what the first one wrote to every training prompt."""
    home = tmp_path_factory.mktemp("home")
    World(annotators=ANNOTATORS, train_pairs=(18,), test_pairs=6).write(home)
    World(annotators=ANNOTATORS, train_pairs=(18,), test_pairs=6).write(home / "second")
    prompts = home / "prompts.jsonl"
    prompts.write_text(
        "".join((home / f"data/{name}.train.jsonl").read_text() for name in ANNOTATORS)
    )
    words = ["align", "sample", "--model", str(home / "model"), "--input", str(prompts)]
    words += ["--samples", "1", "--max-new-tokens", "6", "--output", str(home / "base.jsonl")]
    assert main(words) == 0
    state = load_file(home / "second/model/model.safetensors")
    other = {name: tensor * 1.1 for name, tensor in state.items()}
    (home / "second/model/checksums.json").unlink(missing_ok=True)
    save_file(other, home / "second/model/model.safetensors")
    return home


def words_of(home, output, loss, **changes):
    """The command line of a short training."""
    values = {
        "loss": loss,
        "model": home / "model",
        "output": output,
        "source": [
            f"{name}={home}/data/{name}.train.jsonl,{home}/data/{name}.test.jsonl"
            for name in ANNOTATORS
        ],
        "learning_rate": 1e-2,
        "batch_size": 6,
        "beta": 0.5,
        "log_steps": 100,
    }
    if loss == "mrpo":
        values["reference"] = [home / "model", home / "second/model"]
    if loss == "bapo":
        values["base_responses"] = home / "base.jsonl"
    words = ["align", "finetune"]
    for key, value in (values | changes).items():
        flag = "--" + key.replace("_", "-")
        for single in value if isinstance(value, list) else [value]:
            words += [flag] if single is True else [flag, str(single)]
    return words


def content(run):
    """Everything that must be equal to the bit; wall time is left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("model.safetensors", "config.json", "checksums.json", "evaluation.json")
    return (
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        [(run / name).read_bytes() for name in names],
        {path.name: path.read_bytes() for path in (run / "reference").iterdir()},
    )


def their_log_probability(model, prompt, response):
    """By transformers, of one response."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits.double(), torch.tensor(response), reduction="sum").item()


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_every_loss(home, tmp_path, capsys, loss):
    """Its log, its report, and the implicit margins behind it, by transformers."""
    run = tmp_path / "run"
    assert main(words_of(home, run, loss, epochs=2)) == 0
    out = capsys.readouterr().out
    assert "ana: 18 pairs" in out and "test ana: 6 pairs" in out and f"6 pairs, {loss}" in out
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 12 and list(log[0]["sources"]) == list(ANNOTATORS)
    if loss != "mrpo":
        assert all(abs(own["margin"] or 0) < 1e-4 for own in log[0]["sources"].values())
    for line in log:
        own = [figures for figures in line["sources"].values() if figures["pairs"]]
        mean = sum(figures["pairs"] / 6 * figures["loss"] for figures in own)
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
        assert sum(figures["weight"] for figures in own) == pytest.approx(1)
    assert f"| `--loss` | `{loss}` |" in (run / "README.md").read_text()
    if loss == "dpo":
        require_their_report(home, run)


def require_their_report(home, run):
    """evaluation.json of a run of DPO is that of log-probabilities by transformers."""
    transformers = pytest.importorskip("transformers")
    opened = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (opened(path).eval() for path in (run, home / "model"))
    report = json.loads((run / "evaluation.json").read_text())
    checkpoint = Checkpoint(str(home / "model"))
    for k, name in enumerate(ANNOTATORS):
        items = read_comparisons(name, f"{home}/data/{name}.test.jsonl", checkpoint, 512).items
        theirs = np.array(
            [
                [
                    [their_log_probability(model, item.prompt, ids) for ids in item.responses]
                    for item in items
                ]
                for model in (policy, reference)
            ]
        )
        stored = load_file(run / f"reference/0.{len(ANNOTATORS) + k:02d}.00000.safetensors")
        assert stored["log_probabilities"].numpy() == pytest.approx(theirs[1], abs=1e-3)
        implicit = 0.5 * (theirs[0] - theirs[1])
        margins = implicit[:, 0] - implicit[:, 1]
        assert np.abs(margins).max() > 0.01
        own = report["sources"][name]
        assert own["mean_margin"] == pytest.approx(margins.mean(), abs=1e-3)
        assert own["accuracy"] == accuracy(margins)
        assert own["ece"] == pytest.approx(pair_ece(margins), abs=1e-3)


@pytest.mark.slow
def test_dpo_learns_its_pairs(home, tmp_path):
    assert main(words_of(home, tmp_path / "run", "dpo", epochs=10)) == 0
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [own["accuracy"] for line in log[-6:] for own in line["sources"].values()]
    assert np.mean([value for value in last if value is not None]) > 0.9
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]


def test_both_engines_and_min_norm_weights(home, tmp_path):
    logs = []
    for engine, micro_tokens in (("plain", 8192), ("streamed", 150)):
        run = tmp_path / engine
        changes = {"method": "more", "normalize": "none", "micro_tokens": micro_tokens}
        assert main(words_of(home, run, "dpo", engine=engine, **changes)) == 0
        logs.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for plain, streamed in zip(*logs):
        assert plain["loss"] == pytest.approx(streamed["loss"], rel=1e-3)
        for name in ANNOTATORS:
            weights = [line["sources"][name]["weight"] for line in (plain, streamed)]
            assert weights[0] == pytest.approx(weights[1], abs=0.02)
    weights = [line["sources"]["ana"]["weight"] for line in logs[0]]
    assert max(weights) - min(weights) > 0.05
    assert all(-1 <= line["cosines"]["ana ~ ben"] <= 1 for line in logs[0])
    series = read_history(str(tmp_path / "plain")).series
    assert len(series[What("training", "ana", "margin")].values) == len(weights)


# ---- what survives a kill ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "spo"])
def test_a_crashed_run_resumes_bitwise(home, tmp_path, monkeypatch, loss):
    """Killed while a reference is asked, before any checkpoint, and between two."""
    monkeypatch.setattr(references, "PORTION", 5)
    changes = {"save_steps": 2, "method": "more"}
    assert main(words_of(home, tmp_path / "whole", loss, **changes)) == 0
    update, ask, calls, asked = AdamW.update, references.log_probabilities, [], []

    def crash(optimizer, name, *arguments):
        if name == "trunk.blocks.0.mlp.up.weight":
            calls.append(1)
            if len(calls) in (2, 6):
                raise RuntimeError("crash")
        return update(optimizer, name, *arguments)

    def crash_of_reference(model, items, micro_tokens):
        asked.append(1)
        if len(asked) == 4:
            raise RuntimeError("crash")
        return ask(model, items, micro_tokens)

    monkeypatch.setattr(AdamW, "update", crash)
    monkeypatch.setattr(references, "log_probabilities", crash_of_reference)
    for attempt in range(3):
        resume = {"resume": True} if attempt else {}
        with pytest.raises(RuntimeError):
            main(words_of(home, tmp_path / "cut", loss, **changes, **resume))
    portions = len(list((tmp_path / "whole/reference").iterdir()))
    assert len(asked) == portions + 1 == 13  # one more than there are: the one that crashed
    assert [p.name for p in training.checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    monkeypatch.setattr(AdamW, "update", update)
    assert main(words_of(home, tmp_path / "cut", loss, resume=True, **changes)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


def test_references_are_checked_again(home, tmp_path, monkeypatch, capsys):
    """A damaged file is made again; one of another reference, or of other pairs, is refused."""
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(home / "model", tmp_path / "model")
    run = tmp_path / "run"
    words = words_of(tmp_path, run, "dpo", save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("minimore.alignment.preference_training.finish", lambda training: None)
        assert main(words) == 0
    stored = run / "reference/0.00.00000.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-4] + b"\0\0\0\0")
    for checkpoint in training.checkpoints(run):
        shutil.rmtree(checkpoint)
    os.utime(tmp_path / "model/model.safetensors")  # as if it were another model
    assert main([*words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "by another reference" in error and error.count("\n") == 1
    shutil.rmtree(run / "reference")
    lines = (tmp_path / "data/ana.train.jsonl").read_text().splitlines(keepends=True)
    assert main([*words, "--resume"]) == 0
    (tmp_path / "data/ana.train.jsonl").write_text("".join(lines[1:] + lines[:1]))
    (run / "config.json").unlink()
    assert main([*words, "--resume"]) == 2
    assert "holds log-probabilities of other responses" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, changes, said",
    [
        ("dpo", {"input": "x.jsonl"}, "--input: goes with --loss likelihood, not dpo"),
        ("likelihood", {}, "--source: goes with --loss dpo or mrpo or bapo or spo, not likelihood"),
        ("dpo", {"anchor": 2.0}, "--anchor: goes with --loss bapo, not dpo"),
        ("dpo", {"source": []}, "--source is missing"),
        ("dpo", {"reference": ["a", "b"]}, "--loss dpo: takes one --reference"),
        ("mrpo", {"reference": ["a"]}, "expected --reference at least twice"),
        ("dpo", {"normalize": "none"}, "--normalize: goes with --method more"),
        ("dpo", {"beta": 0}, "--beta 0.0: expected more than 0"),
        ("mrpo", {"clip": 1}, "--clip 1.0: expected at least 0, less than 1"),
        ("dpo", {"reference": ["/nowhere"]}, "/nowhere"),
    ],
)
def test_what_is_refused(home, tmp_path, capsys, loss, changes, said):
    assert main(words_of(home, tmp_path / "run", loss, **changes)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_bapo_needs_what_the_reference_wrote(home, tmp_path, capsys):
    words = words_of(home, tmp_path / "run", "bapo")
    place = words.index("--base-responses")
    assert main(words[:place] + words[place + 2 :]) == 2
    assert "needs --base-responses" in capsys.readouterr().err
