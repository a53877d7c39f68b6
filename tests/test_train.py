"""The training loop, what it writes, and the options that it refuses."""

import json
import re
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from runs import RECIPES, content, options
from safetensors.torch import load_file

import minimore.training as training
from minimore.cli import main
from minimore.data.pairs import encode, load_source
from minimore.data.sampling import epoch_steps
from minimore.metrics import FinalAccuracy, what_is_wrong
from minimore.model.checkpoint import Checkpoint
from minimore.report import evaluate_sources
from minimore.reward import ModelOptions, fresh_head, open_reward_model
from minimore.reward_training import TrainOptions
from minimore.schedule import Schedule, learning_rate_at
from minimore.tables import number
from minimore.train import train


def test_learning_rate():
    training_options = TrainOptions(model="", output="", learning_rate=1.0, warmup=0.2)
    assert [learning_rate_at(s, 10, training_options) for s in range(1, 5)] == pytest.approx(
        [0.5, 1, 1, 7 / 8]
    )
    assert learning_rate_at(10, 10, training_options) == pytest.approx(1 / 8)
    flat = TrainOptions(model="", output="", learning_rate=1.0, schedule="constant")
    assert learning_rate_at(8, 10, flat) == 1
    cosine = TrainOptions(model="", output="", learning_rate=1.0, schedule="cosine")
    assert [learning_rate_at(s, 2, cosine) for s in (1, 2)] == pytest.approx([1, 0.5])


@pytest.mark.slow
def test_the_loop_applies_learning_rate_and_weight_decay(world, tmp_path):
    """One step with decay differs from one without by learning rate x decay x the weights."""
    changes, heads = dict(pairs_per_source=2, batch_size=6, learning_rate=1e-2), {}
    first = open_reward_model(ModelOptions(model=str(world[0] / "model")))[0].head.detach()
    for decay in (0.0, 0.5):
        train(options(world, tmp_path / str(decay), weight_decay=decay, **changes))
        heads[decay] = load_file(tmp_path / str(decay) / "model.safetensors")["score.weight"][0]
    assert torch.allclose(heads[0.0] - heads[0.5], 1e-2 * 0.5 * first, rtol=1e-4, atol=1e-7)
    # Adam's first step moves every number by one learning rate.
    moved = (heads[0.0] - first).abs()
    assert torch.allclose(moved, torch.full_like(first, 1e-2), rtol=1e-3)
    training_options = options(world, tmp_path / "run", warmup=0.3, schedule="cosine", epochs=2)
    train(training_options)
    rates = [s["learning_rate"] for s in content(tmp_path / "run")[2]]
    steps = len(rates)
    assert rates == [learning_rate_at(s, steps, training_options) for s in range(1, steps + 1)]


class LateSignals(list):
    """A stop request that comes right after the loop has first looked whether there is one."""

    def __bool__(self):
        is_there = len(self) > 0
        if not is_there:
            self.append(signal.SIGTERM)
        return is_there


def test_a_stop_that_comes_too_late_for_a_save_ends_the_next_step(world, tmp_path, monkeypatch):
    monkeypatch.setattr("minimore.train.stop_requests", lambda: nullcontext(LateSignals()))
    run = tmp_path / "run"
    assert train(options(world, run, save_steps=100)) == 128 + signal.SIGTERM
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and [p.name for p in training.checkpoints(run)] == ["checkpoint-2"]


def test_every_epoch_has_an_order_of_its_own():
    options = TrainOptions(model="m", output="o", source=("a=x", "b=y"), epochs=3, seed=4)
    schedule = Schedule(options, epochs=3, sizes=(10, 6), batch_size=4, sampling="equal")
    expected = [
        sampled.tolist()
        for epoch in range(3)
        for sampled in epoch_steps([10, 6], "equal", None, 4, 4, epoch)
    ]
    steps = range(1, schedule.steps + 1)
    assert [schedule.sampled_at(step).tolist() for step in steps] == expected
    per_epoch = len(expected) // 3
    assert expected[:per_epoch] != expected[per_epoch : 2 * per_epoch]


def test_a_fresh_head_is_seeded():
    assert torch.equal(fresh_head(8, 3), fresh_head(8, 3)) and not torch.equal(
        fresh_head(8, 3), fresh_head(8, 4)
    )
    assert fresh_head(9999, 0).std() == pytest.approx(1e-2, rel=0.05)


@pytest.mark.slow
def test_one_seed_one_result(world, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(world, tmp_path / name, seed=seed))
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(world, tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"step \d+: the loss of source '\w+' is not finite; .*checkpoint-\d+ is kept",
    ):
        train(options(world, tmp_path / "run", learning_rate=1e18, save_steps=1))
    assert (
        len(training.checkpoints(tmp_path / "run")) == 1
        and not (tmp_path / "run" / "config.json").exists()
    )


def test_two_sources_of_unit_gradients_are_said_to_be_uniform(world, tmp_path, capsys):
    train(options(world, tmp_path / "run", source=options(world, "x").source[:2], batch_size=4))
    assert "MORE is uniform here" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"save_dtype": "bfloat16"}, RECIPES["split"] | {"micro_tokens": 8192}, RECIPES["lossy"]],
    ids=["bfloat16", "split", "lossy"],
)
def test_what_is_evaluated_is_what_is_stored(world, tmp_path, changes):
    train(options(world, tmp_path / "run", **changes))
    model, checkpoint = open_reward_model(ModelOptions(model=str(tmp_path / "run")))
    tests = [
        load_source(n, str(test), checkpoint.tokenizer, 512) for n, (_, test) in world[1].items()
    ]
    assert evaluate_sources(model, tests)[0] == content(tmp_path / "run")[1]


def test_one_source_alone_is_bradley_terry(world, tmp_path, capsys):
    only = options(world, "x").source[:1]
    train(options(world, tmp_path / "more", source=only, batch_size=4))
    assert "MORE is plain Bradley-Terry" in capsys.readouterr().out
    train(options(world, tmp_path / "uniform", source=only, batch_size=4, method="uniform"))
    assert content(tmp_path / "more")[0] == content(tmp_path / "uniform")[0]


def test_a_held_out_group_is_tested_and_changes_nothing_else(world, tmp_path, capsys):
    """The model is that of a training which has never heard of the group."""
    trained = [f"{name}={train},{test}" for name, (train, test) in world[1].items()][1:]
    group = f"ana=,{world[1]['ana'][1]}"
    short = {"batch_size": 4, "pairs_per_source": 8, "eval_steps": 2}
    assert train(options(world, tmp_path / "without", source=tuple(trained), **short)) == 0
    capsys.readouterr()
    assert train(options(world, tmp_path / "run", source=(group, *trained), **short)) == 0
    said = capsys.readouterr().out
    assert (
        "test only, never trained on: ana: 20 pairs" in said and "test after step 2: ana " in said
    )
    assert "\nnever trained on: ana\n" in said.partition("worst ")[2]
    (with_group, *_), (without, *_) = content(tmp_path / "run"), content(tmp_path / "without")
    assert with_group == without
    _, report, steps, _ = content(tmp_path / "run")
    assert [*report["sources"]] == ["ana", "ben", "cleo"] and [*steps[0]["sources"]] == [
        "ben",
        "cleo",
    ]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- ana: 20 pairs, tested and never trained on\n" in card
    words = ["--model", str(tmp_path / "run"), "--source", f"ana={world[1]['ana'][1]}"]
    assert main(["evaluate", *words]) == 0


def test_sources_of_other_shares_are_weighted_over_the_whole_step(world, tmp_path):
    """However finely a step is cut; under equal shares each group of one pair a source would do."""
    changes = {"shares": "ana=2,ben=1,cleo=1", "batch_size": 8, "pairs_per_source": 4}
    changes["source"] = tuple(f"{name}={path}" for name, (path, _) in world[1].items())
    logs = []
    for micro_tokens in (8192, 60):
        run = tmp_path / str(micro_tokens)
        cut = {"method": "uniform", "micro_tokens": micro_tokens}
        assert train(options(world, run, **changes | cut)) == 0
        logs.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    for whole, cut in zip(*logs, strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        for name, pairs in (("ana", 4), ("ben", 2), ("cleo", 2)):
            assert whole["sources"][name]["pairs"] == cut["sources"][name]["pairs"] == pairs
            assert cut["sources"][name]["weight"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_metrics_say_what_happened(world, tmp_path):
    train(
        options(
            world, tmp_path / "run", sampling="proportional", batch_size=4, epochs=2, eval_steps=5
        )
    )
    steps = content(tmp_path / "run")[2]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    absent = 0
    for s in steps:
        assert sum(r["weight"] for r in s["sources"].values()) == pytest.approx(1)
        assert sum(r["pairs"] for r in s["sources"].values()) <= 4
        assert s["loss"] == pytest.approx(
            sum(r["weight"] * (r["loss"] or 0) for r in s["sources"].values()), rel=1e-5
        )
        assert set(s["cosines"]) == {"ana ~ ben", "ana ~ cleo", "ben ~ cleo"}
        assert ("evaluation" in s) == (s["step"] % 5 == 0)
        for r in s["sources"].values():
            absent += r["pairs"] == 0
            assert (r["loss"] is None) == (r["pairs"] == 0) and (r["pairs"] > 0 or r["weight"] == 0)
    assert absent > 0


@pytest.mark.slow
def test_loss_falls_on_the_training_pairs(world, tmp_path):
    train(options(world, tmp_path / "run", epochs=12, learning_rate=4e-3, schedule="constant"))
    losses = [s["loss"] for s in content(tmp_path / "run")[2]]
    assert np.mean(losses[-10:]) < 0.3 < 0.6 < np.mean(losses[:3])


def test_a_head_of_zeros_is_told_at_the_first_step(world, tmp_path, monkeypatch, capsys):
    """Accuracy that stays at 1/2 has a reason, and the log says it."""
    monkeypatch.setattr("minimore.reward.fresh_head", lambda width, seed: torch.zeros(width))
    assert train(options(world, tmp_path / "run")) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "rounding" in line]
    assert len(said) == 1 and said[0].startswith("step 1: all margins are zero or rounding")


def test_a_learning_rate_below_the_rounding_of_the_weights_is_told(world, tmp_path, capsys):
    """Which is said where it is true, and only there: most of the numbers stay, or most move."""
    start = load_file(world[0] / "model" / "model.safetensors")
    for rate, is_frozen in ((1e-12, True), (1e-5, False)):
        run = tmp_path / f"{rate}"
        assert train(options(world, run, learning_rate=rate, schedule="constant")) == 0
        assert ("the model stays as it is" in capsys.readouterr().out) == is_frozen
        end = load_file(run / "model.safetensors")
        matrices = [name for name in end if name in start and "layers.0.mlp" in name]
        moved = [(start[n] != end[n]).float().mean() for n in matrices if end[n].ndim == 2]
        assert moved and (max(moved) < 0.1 if is_frozen else min(moved) > 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("has_learned", [False, True])
def test_a_run_that_ends_at_chance_says_so(world, tmp_path, monkeypatch, capsys, has_learned):
    """And a run that has learned says nothing, wherever it has: its report or its last steps."""
    final = FinalAccuracy(0.9, 60, 3)
    monkeypatch.setattr(
        "minimore.finish.final_accuracy", lambda log: final if has_learned else None
    )
    run = tmp_path / "run"
    assert train(options(world, run, learning_rate=1e-6)) == 0
    chance, remedy, pairs, _ = capsys.readouterr().out.splitlines()[-4:]
    assert chance.startswith("at chance: the accuracy is ")
    assert ("60 training pairs of the last 3 steps" in chance) == has_learned
    assert ("it learned its training pairs" in remedy) == has_learned
    assert ("--learning-rate is 1e-06" in remedy and "11 steps" in remedy) != has_learned
    assert pairs.endswith(f"minimore data look {' '.join(str(a) for a, _ in world[1].values())}")


@pytest.mark.parametrize("accuracy, is_said", [(0.55, True), (0.7, False)])
def test_without_new_pairs_the_last_steps_show_chance(
    world, tmp_path, monkeypatch, capsys, accuracy, is_said
):
    final = FinalAccuracy(accuracy, 60, 3)
    monkeypatch.setattr("minimore.finish.final_accuracy", lambda log: final)
    only = (f"ana={world[1]['ana'][0]}",)
    assert train(options(world, tmp_path / "run", source=only, pairs_per_source=6)) == 0
    assert ("at chance: the accuracy is .550 on the 60" in capsys.readouterr().out) == is_said


def test_others_cut_a_saved_model_as_its_training_did(world, tmp_path):
    """transformers with truncation=True: the same ids, and so the same rewards."""
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    train(options(world, run, max_length=11))
    text = "\n\nHuman: amber basil cedar\n\nAssistant: " + "coral " * 20
    theirs = transformers.AutoTokenizer.from_pretrained(run)(text, truncation=True).input_ids
    (ours,), _ = encode([text], Checkpoint(str(run)).tokenizer, 11)
    assert theirs == ours.tolist() and len(ours) == 11


def test_a_gradient_of_zero_is_told():
    source = {"pairs": 2, "loss": 0.7, "gradient_norm": 0.0}
    absent = {"pairs": 0, "loss": None, "gradient_norm": None}
    assert "gradient of the head is zero" in what_is_wrong({"sources": {"a": source, "b": absent}})
    fine = source | {"gradient_norm": 0.1}
    assert what_is_wrong({"sources": {"a": fine, "b": absent}}) is None


@pytest.mark.slow
def test_a_run_prints_about_25_lines_and_every_evaluation_and_logs_every_step(
    world, tmp_path, capsys
):
    run = tmp_path / "run"
    validation = {"validation": 0.2, "eval_steps": 40}
    train(options(world, run, epochs=10, log_steps=None, **validation))
    lines = capsys.readouterr().out.splitlines()
    steps = len((run / "metrics.jsonl").read_text("utf-8").splitlines())
    assert 60 < steps < 120
    printed = [line for line in lines if line.startswith("step ")]
    assert 20 <= len(printed) <= 30
    assert printed[0].startswith(f"step 1/{steps} ")
    assert printed[-1].startswith(f"step {steps}/{steps} ")
    assert all(re.search(r"  \d+ (s|min) left$", line) for line in printed[:-1])
    assert "a line every 4 steps; in brackets means over the last 4" in lines
    assert all(re.search(r"loss [.\d]+ \([.\d]+\)", line) for line in printed[1:])
    validated = [line for line in lines if line.startswith("validation after step")]
    assert len(validated) == steps // 40
    evaluated = [line for line in lines if line.startswith("test after step 40: ")]
    figures = content(run)[2][39]["evaluation"]["sources"]["cleo"]
    assert len(evaluated) == 3
    assert evaluated[2] == (
        f"test after step 40: cleo  accuracy {number(figures['accuracy'])},"
        f" NLL {number(figures['nll'])}, margin {number(figures['mean_margin'])},"
        f" ECE {number(figures['ece'])}"
    )
