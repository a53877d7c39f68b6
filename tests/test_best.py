"""The best step of a run is the best, is kept through kills, and can be read like the run."""

import json
import os
import shutil
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from power_cut import Disk, restore
from processes import Command
from runs import command, run_command
from runs import options as all_options

import minimore.training as training
from minimore.best import Best, better_of
from minimore.checksums import write_checked_json
from minimore.cli import main
from minimore.data.pairs import load_source
from minimore.data.validation import hold_out
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError
from minimore.report import evaluate_sources
from minimore.resume import best_named_by
from minimore.reward import ModelOptions, ReadingOptions, open_reward_model
from minimore.tables import number
from minimore.train import train

# Large steps on few pairs: the validation gets worse long before the end.
OVERFITTING = {
    "learning_rate": 4e-3,
    "schedule": "constant",
    "epochs": 4,
    "validation": 0.3,
    "eval_steps": 4,
    "save_steps": 5,
    "keep_best": "nll",
    "max_length": 100,
}
SHORT = OVERFITTING | {"epochs": 1, "eval_steps": 2, "save_steps": 3}


def options(world, output, **changes):
    """Options without TEST files, to save time."""
    source = tuple(f"{name}={train_path}" for name, (train_path, _) in world[1].items())
    return all_options(world, output, **{"source": source} | changes)


def log_of(run):
    """The log of a run, without seconds."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def everything(run):
    """What must be equal to the bit. Options and cards name the run."""
    others = ("metrics.jsonl", "options.json", "README.md", "environment.json")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in others)
    assert run / "best" / "model.safetensors" in files
    return log_of(run), [(str(path.relative_to(run)), path.read_bytes()) for path in files]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A finished run that was not killed; what it printed is beside it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with open(run.with_name("printed"), "w") as printed, redirect_stdout(printed):
        assert train(options(world, run, **OVERFITTING)) == 0
    return run


def validation_sources(world, checkpoint, share=0.3, seed=0):
    sources = [
        load_source(name, str(train_path), checkpoint.tokenizer, 100)
        for name, (train_path, _) in world[1].items()
    ]
    return hold_out(sources, share, seed)[1]


@pytest.mark.parametrize(
    "by, pick", [("nll", np.argmin), pytest.param("accuracy", np.argmax, marks=pytest.mark.slow)]
)
def test_the_best_is_the_best_and_can_be_read(world, whole, tmp_path, capsys, by, pick):
    run = whole
    if by == "accuracy":
        run = tmp_path / "run"
        assert train(options(world, run, **OVERFITTING | {"keep_best": by})) == 0
    validated = [record for record in log_of(run) if "validation" in record]
    steps = [record["step"] for record in validated]
    last = len(log_of(run))
    assert steps == sorted({*range(4, last + 1, 4), last})
    figures = [record["validation"]["mean"][by] for record in validated]
    best = validated[int(pick(figures))]  # the first of equal ones
    assert best["step"] < last, "the run was to overfit"
    running = [steps[int(pick(figures[: i + 1]))] for i in range(len(steps))]
    assert [record["best"] for record in validated] == running
    assert json.loads((run / "best.json").read_text()) == {
        "step": best["step"],
        "by": by,
        "value": best["validation"]["mean"][by],
        "steps": last,
        "last": validated[-1]["validation"]["mean"][by],
    }
    for directory, record in ((run / "best", best), (run, validated[-1])):
        model, checkpoint = open_reward_model(ModelOptions(model=str(directory)))
        sources = validation_sources(world, checkpoint)
        assert evaluate_sources(model, sources)[0] == record["validation"]
    assert json.loads((run / "validation.json").read_text()) == validated[-1]["validation"]
    assert not training.checkpoints(run)


def test_what_a_run_says_of_its_best(whole):
    said = whole.with_name("printed").read_text()
    held_out = [line for line in said.splitlines() if "held out for validation:" in line]
    assert held_out[0] == "  ana: held out for validation: 9 of 30 prompts, 9 of 30 pairs"
    best = json.loads((whole / "best.json").read_text())
    value = number(best["value"])
    assert f"; best NLL {value} at step {best['step']}\n" in said and "; best NLL so far\n" in said
    steps, last = best["steps"], number(best["last"])
    assert said.splitlines()[-3:] == [
        f"best: step {best['step']} of {steps}, validation NLL {value}, in {whole / 'best'}",
        f"last: step {steps} of {steps}, validation NLL {last}, in {whole}",
        f"finished: {whole}",
    ]


@pytest.mark.slow
def test_a_moved_best_is_evaluated_and_scored_as_the_run_would_be(world, whole, tmp_path, capsys):
    moved = Path(shutil.copytree(whole / "best", tmp_path / "moved"))
    assert ReadingOptions(model=str(moved)).rules(Checkpoint(str(moved))).max_length == 100
    test = str(world[1]["ana"][1])
    assert main(["evaluate", "--model", str(moved), "--source", f"ana={test}"]) == 0
    scored = tmp_path / "scored.jsonl"
    assert main(["score", "--model", str(moved), "--input", test, "--output", str(scored)]) == 0
    assert len(scored.read_text().splitlines()) == 20
    names = {path.name for path in (whole / "best").iterdir()}
    assert names == {path.name for path in whole.iterdir()} - {
        *("best", "best.json", "environment.json", "metrics.jsonl", "validation.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_last_step_is_the_best_both_are_the_same_model(
    world, tmp_path, monkeypatch, capsys, dtype
):
    monkeypatch.setattr("minimore.reward_training.better_of", lambda best, candidate: candidate)
    run = tmp_path / "run"
    assert train(options(world, run, save_dtype=dtype, **SHORT)) == 0
    for name in ("model.safetensors", "config.json", "checksums.json", "tokenizer.json"):
        assert (run / name).read_bytes() == (run / "best" / name).read_bytes()
    best, last, _ = capsys.readouterr().out.splitlines()[-3:]
    assert best.replace("best", "last", 1) == f"{last}/best"


# ---- killed, and continued -----------------------------------------------------------------------


def crash_at(monkeypatch, step):
    """Let a training crash before a step."""
    real = training.Schedule.sampled_at

    def sampled_at(schedule, now):
        if now == step:
            raise RuntimeError("crash")
        return real(schedule, now)

    monkeypatch.setattr(training.Schedule, "sampled_at", sampled_at)


@pytest.fixture(scope="module")
def crashed(world, whole, tmp_path_factory):
    """A run that crashed some steps after its best, and the step of that."""
    best = json.loads((whole / "best.json").read_text())["step"]
    run = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, best + 7)
        with pytest.raises(RuntimeError, match="crash"):
            train(options(world, run, **OVERFITTING))
    names = {checkpoint.name for checkpoint in training.checkpoints(run)}
    assert f"checkpoint-{best}" in names and len(names) == 2
    return run, best


@pytest.fixture
def cut(crashed, tmp_path):
    """A copy of it."""
    run, best = crashed
    return Path(shutil.copytree(run, tmp_path / "cut")), best


def resumed(world, run):
    return train(options(world, run, resume=True, **OVERFITTING))


@pytest.mark.slow
def test_a_resumed_run_has_the_best_of_the_whole_run(world, whole, cut, tmp_path, monkeypatch):
    """Its mutant: a resume that forgets the best so far ends with another one."""
    run, _ = cut
    mutant = Path(shutil.copytree(run, tmp_path / "mutant"))
    assert resumed(world, run) == 0
    assert everything(run) == everything(whole)
    monkeypatch.setattr(training, "saved_best", lambda run, facts: None)
    assert resumed(world, mutant) == 0
    assert everything(mutant) != everything(whole)


@pytest.mark.slow
def test_a_crash_between_the_best_and_its_checkpoint_costs_nothing(world, whole, tmp_path):
    best = json.loads((whole / "best.json").read_text())["step"]
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        real = training.save

        def save(saved_training, *arguments):
            if saved_training.first_step == 1 and saved_training.optimizer.steps == best:
                raise RuntimeError("crash")
            real(saved_training, *arguments)

        patch.setattr(training, "save", save)
        with pytest.raises(RuntimeError, match="crash"):
            train(options(world, run, **OVERFITTING))
    assert log_of(run)[-1]["best"] == best
    assert resumed(world, run) == 0
    assert everything(run) == everything(whole)


@pytest.mark.slow
def test_the_best_of_every_kept_checkpoint_is_kept(world, tmp_path, monkeypatch):
    """So that a run can continue from the one before the last, too."""
    monkeypatch.setattr("minimore.train.finish", lambda *_: None)
    run = tmp_path / "run"
    assert train(options(world, run, keep=2, **OVERFITTING)) == 0
    *bests, before_last, last = training.checkpoints(run)
    assert bests == [best_named_by(before_last)] == [best_named_by(last)]


@pytest.mark.slow
def test_a_best_checkpoint_that_was_removed_is_said(world, cut, capsys):
    run, best = cut
    shutil.rmtree(run / f"checkpoint-{best}")
    assert resumed(world, run) == 0
    assert f"checkpoint-{best}, the best so far, is missing" in capsys.readouterr().out
    assert json.loads((run / "best.json").read_text())["step"] > best


ODD = (
    *(None, [], {"step": 3}),
    {"step": "x", "by": "nll", "value": 1.0},
    {"step": 3, "by": "ece", "value": 1.0},
)


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD)
def test_a_state_with_an_odd_best_is_refused(world, cut, value):
    run, _ = cut
    path = training.checkpoints(run)[-1] / "state.json"
    facts = json.loads(path.read_text())
    del facts["crc32"]
    write_checked_json(path, facts | {"best": value})
    with pytest.raises(InputError, match="says that the best step so far is"):
        resumed(world, run)


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_is_refused_in_the_end(world, cut, capsys):
    run, best = cut
    path = run / f"checkpoint-{best}" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=f"checkpoint-{best}: not a whole checkpoint.*remove"):
        resumed(world, run)
    assert not (run / "config.json").exists()
    shutil.rmtree(run / f"checkpoint-{best}")
    assert resumed(world, run) == 0
    assert "it has no best/" in capsys.readouterr().out and (run / "config.json").exists()


@pytest.mark.slow
def test_a_power_cut_at_any_moment_loses_no_best(world, tmp_path, monkeypatch):
    """Of all states: the best that the last checkpoint names is there. Of some: the end is equal.

    tests/test_power_cut.py tells how states are made; MINIMORE_POWER_CUTS=all continues all.
    """
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert train(options(world, root / "run", **SHORT)) == 0
    expected = everything(root / "run")
    assert len(disk.states) > 150
    for state in disk.states:
        for path, data in state.items():
            if (
                path.endswith("/state.json")
                and ".partial" not in path
                and "run/config.json" not in state
            ):
                step = json.loads(data)["best"]["step"]
                assert f"run/checkpoint-{step}/state.json" in state
    is_all = os.environ.get("MINIMORE_POWER_CUTS") == "all"
    for count, state in enumerate(disk.states[:: 1 if is_all else -len(disk.states) // 3]):
        after = restore(state, tmp_path / f"after-{count}")
        assert train(options(world, after / "run", resume=True, **SHORT)) == 0
        assert everything(after / "run") == expected
        assert not list(after.rglob("*.partial*")) and not training.checkpoints(after / "run")
        shutil.rmtree(after)


KILLS = int(os.environ.get("MINIMORE_KILLS", 2))


@pytest.mark.slow
def test_killed_at_random_moments_a_run_has_the_same_best(world, tmp_path):
    """SIGKILL, whatever is going on. MINIMORE_KILLS=50 makes it longer."""
    changes = SHORT | {"eval_steps": 1, "save_steps": 1}
    random, run, killed = np.random.default_rng(0), tmp_path / "run", 0
    began = time.monotonic()
    run_command(options(world, tmp_path / "whole", **changes))
    seconds = time.monotonic() - began
    expected = everything(tmp_path / "whole")
    while True:
        process = Command(command(options(world, run, resume=True, **changes)))
        code = process.wait(seconds * random.uniform(0.1, 1.0) if killed < KILLS else None)
        if code is None:
            process.signal(signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert code == 0 and everything(run) == expected
        if killed >= KILLS:
            break
        shutil.rmtree(run)


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "--keep-best chooses among": {"keep_best": "nll", "eval_steps": 2},
    "it needs --validation SHARE and --eval-steps": {"keep_best": "accuracy", "validation": 0.2},
    "--validation 0.0: expected more than 0": {"validation": 0.0},
    "--validation 1.0: expected more than 0, less than 1": {"validation": 1.0},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_validated_is_refused(world, tmp_path, said):
    with pytest.raises(InputError, match=said):
        train(options(world, tmp_path / "run", **REFUSED[said]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_held_out_pairs_are_other_data(world, cut, tmp_path, monkeypatch):
    """A change of what is held out only is noticed, since it changes what the best is."""
    run, _ = cut
    monkeypatch.setattr("minimore.data.records.require_records_as_written", lambda *_: None)
    checkpoint = Checkpoint(str(world[0] / "model"))
    held_out = next(iter(validation_sources(world, checkpoint)[0].prompts))
    path = Path(world[1]["ana"][0])
    original = path.read_text()
    records = [json.loads(line) for line in original.splitlines()]
    for record in records:
        if record["prompt"] == held_out:
            record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    try:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        with pytest.raises(InputError, match="source 'ana' has other texts"):
            resumed(world, run)
    finally:
        path.write_text(original)


@pytest.mark.slow
def test_without_validation_nothing_changes(world, tmp_path):
    """A run without the new options writes none of the new files."""
    assert train(all_options(world, tmp_path / "run", eval_steps=5)) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"best", "best.json", "validation.json"}
    assert all("validation" not in r and "best" not in r for r in log_of(tmp_path / "run"))


@pytest.mark.parametrize("by", ["nll", "accuracy"])
def test_any_number_is_better_than_none(by):
    nan, number_of_steps = Best(1, by, float("nan")), Best(2, by, 0.5)
    assert better_of(nan, number_of_steps) == number_of_steps
    assert better_of(number_of_steps, nan) == number_of_steps
