"""The directory of a run: who may write in it, and what a full disk leaves there."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from runs import command, content, options, slow_but, unfinished
from safetensors.torch import load_file

import minimore.files as files
import minimore.training as training
from minimore.checksums import read_checked_json, write_checked_json
from minimore.cli import main
from minimore.data.world import World
from minimore.options import InputError
from minimore.run import Lock, open_run
from minimore.train import train

SHORT = {"batch_size": 4, "save_steps": 1}  # two steps in the small world


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A world of two annotators with four pairs each."""
    directory = tmp_path_factory.mktemp("small")
    small_world = World(annotators=("ana", "ben"), train_pairs=(4,), test_pairs=4)
    return directory, small_world.write(directory)


@pytest.mark.slow
def test_every_rename_that_fails_is_survived(small, tmp_path, monkeypatch, capsys):
    real, calls, broken = os.replace, [], None

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == broken:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr("os.replace", replace)
    assert train(options(small, tmp_path / "whole", **SHORT)) == 0
    most = len(calls)
    assert most > 15
    for broken in range(1, most + 1):
        run = tmp_path / str(broken)
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            train(options(small, run, **SHORT))
        assert (unfinished(run) or broken == most) and all(
            {"state.json", "config.json", "model.safetensors"} <= {p.name for p in c.iterdir()}
            for c in training.checkpoints(run)
        )
        assert train(options(small, run, resume=True, **SHORT)) == 0
        assert content(run) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_leaves_nothing_that_looks_finished(small, tmp_path, capsys):
    """The kernel refuses to write past a limit, as a full disk does, to every file in turn."""
    resource = pytest.importorskip("resource")
    limits_before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert train(options(small, tmp_path / "whole", **SHORT)) == 0
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").iterdir()})
    words = command(options(small, tmp_path / "run", **SHORT))
    capsys.readouterr()
    for limit in sorted({0, 100, *(size - 1 for size in sizes), sizes[-1] + 5000}):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits_before[1]))
        try:
            code = main(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits_before)
        message = capsys.readouterr().err
        assert code == 2, (limit, message)
        assert message.count("\n") == 1 and "Traceback" not in message, (limit, message)
        assert unfinished(tmp_path / "run"), limit
        assert main([*words, "--resume"]) == 0
        assert content(tmp_path / "run") == content(tmp_path / "whole")
        capsys.readouterr()


def bytes_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("left", ["checkpoint-2", "checkpoint-10.partial"])
def test_on_a_full_disk_what_is_not_needed_goes_before_anything_is_written(
    world, halted, tmp_path, monkeypatch, left
):
    """The disk holds what the run takes now, and not a byte more.

    left: of a kill that came before an old checkpoint was removed, or before a new one was whole.
    """
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    shutil.copytree(training.checkpoints(run)[-1], run / left)
    capacity, real = bytes_of(run), files.new_file_beside

    def write_if_there_is_room(path):
        if bytes_of(run) >= capacity:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(files, "new_file_beside", write_if_there_is_room)
    assert train(options(world, run, save_steps=2, gradient_average=0.5, resume=True)) == 0
    assert not training.checkpoints(run) and not list(run.glob("*.partial"))


@pytest.mark.slow
def test_checkpoints_that_are_to_be_kept_are_there_in_the_end(small, tmp_path):
    run = tmp_path / "run"
    kept = {**SHORT, "epochs": 3, "keep": 2}
    assert train(options(small, run, **kept)) == 0
    assert train(options(small, run, resume=True, **kept)) == 0  # finished: it touches nothing
    assert train(options(small, run, resume=True, **kept | {"keep": None})) == 0
    assert [path.name for path in training.checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
    of_run = load_file(run / "model.safetensors")
    of_last = load_file(run / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(of_run[name], of_last[name]) for name in of_run | of_last)
    assert main(["evaluate", "--model", str(run / "checkpoint-5"), *sources_of(small)]) == 0


def sources_of(small):
    """The test files as words of a command."""
    return [f"--source={name}={test}" for name, (_, test) in small[1].items()]


def test_two_processes_do_not_train_in_one_directory(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    before = sorted(p.name for p in run.rglob("*"))
    with Lock(run), pytest.raises(InputError, match="another process is training there"):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))
    assert sorted(p.name for p in run.rglob("*")) == before
    assert train(options(world, run, save_steps=2, gradient_average=0.5, resume=True)) == 0


def looks_finished(halted, run):
    """A copy of a run that has a last checkpoint, and that checkpoint's model as its own."""
    with_options(Path(shutil.copytree(halted, run)), keep=1)
    for path in training.checkpoints(run)[-1].iterdir():
        if not path.name.startswith("state"):
            shutil.copy(path, run)
    return run


def test_what_another_process_writes_in_a_finished_run_stays(world, halted, tmp_path):
    """The other one has been given more epochs, and begins."""
    run = looks_finished(halted, tmp_path / "run")
    its_own = run / "metrics.jsonl.0123abcd.partial"
    its_own.write_text("{}")
    with Lock(run), pytest.raises(InputError, match="another process is training there"):
        train(options(world, run, save_steps=2, gradient_average=0.5, keep=1, resume=True))
    assert its_own.exists()


def test_an_existing_output_is_refused_and_left_alone(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(InputError):
            train(options(world, tmp_path / "mine", resume=resume))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_option_that_a_run_is_older_than_has_its_default(world, tmp_path, halted, capsys):
    run = tmp_path / "run"
    shutil.copytree(halted, run)
    stored = read_checked_json(run / "options.json")
    for name in ("votes", "source_field", "pair_margins"):
        del stored[name]
    write_checked_json(run / "options.json", stored)
    same = options(world, run, save_steps=2, gradient_average=0.5, resume=True)
    with pytest.raises(InputError, match="--votes is 'ignore' but the run in .* has 'soft'"):
        train(replace(same, votes="ignore"))
    assert train(same) == 0


# ---- what a run may be given when it is continued ------------------------------------------------

ONE_EPOCH = {"batch_size": 4, "keep": 1}
THREE_EPOCHS = ONE_EPOCH | {"epochs": 3}


def extended(small, run, **changes):
    """A run of one epoch, of two steps, that was finished and then given two more epochs."""
    assert train(options(small, run, **ONE_EPOCH | changes)) == 0
    return train(options(small, run, resume=True, **THREE_EPOCHS | changes))


def test_a_finished_run_with_more_epochs_is_the_longer_run(small, tmp_path, capsys):
    run, long = tmp_path / "run", tmp_path / "long"
    assert extended(small, run, schedule="constant") == 0
    said = "6 steps now, and had 2 when step 2 ended; those are steps of the longer run, too\n"
    printed = capsys.readouterr().out
    assert said in printed and "model goes: README.md, evaluation.json\n" in printed
    assert train(options(small, long, schedule="constant", **THREE_EPOCHS)) == 0
    assert content(run) == content(long)
    assert [path.name for path in training.checkpoints(run)] == ["checkpoint-6"]


@pytest.mark.slow
def test_where_the_schedule_depends_on_the_steps_it_is_said(small, tmp_path, capsys):
    run = tmp_path / "run"
    assert extended(small, run, schedule="linear") == 0
    said = "it was 0.0005, and goes on with 0.000667, so this is not the run that 3 epochs from"
    assert said in capsys.readouterr().out
    rates = [record["learning_rate"] for record in content(run)[2]]
    assert rates == pytest.approx(
        [1e-3 * share for share in (1, 1 / 2, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    )


@contextmanager
def killed_before(step):
    """Within, a training crashes before this step."""
    real = training.Schedule.sampled_at

    def sampled_at(schedule, now):
        if now == step:
            raise RuntimeError("crash")
        return real(schedule, now)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(training.Schedule, "sampled_at", sampled_at)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"shares": "ana=3,ben=1", "method": "uniform"},
        {"sampling": "proportional", "pairs_per_source": "ben=6"},
    ],
)
def test_a_mix_is_continued_bitwise(small, tmp_path, changes):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = SHORT | {"epochs": 2} | changes
    assert train(options(small, whole, **changes)) == 0
    with killed_before(4):
        train(options(small, cut, **changes))
    assert train(options(small, cut, resume=True, **changes)) == 0
    assert content(cut) == content(whole)
    pairs = [[row["pairs"] for row in step["sources"].values()] for step in content(cut)[2]]
    if "shares" in changes:
        assert pairs == [[3, 1]] * 4
    else:
        assert np.sum(pairs, axis=0).tolist() == [2 * 4, 2 * 6]


@pytest.mark.slow
def test_an_extended_run_that_is_killed_continues_bitwise(small, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert extended(small, whole) == 0
    with killed_before(5):
        extended(small, cut, save_steps=3)
    assert not (cut / "config.json").exists() and not (cut / "evaluation.json").exists()
    assert train(options(small, cut, resume=True, **THREE_EPOCHS)) == 0
    assert content(cut) == content(whole)


def with_options(run, **changes):
    """The run with other options in options.json, as if it had begun so."""
    write_checked_json(run / "options.json", read_checked_json(run / "options.json") | changes)
    return run


def test_what_a_run_may_and_may_not_be_given(world, halted, tmp_path):
    run = with_options(Path(shutil.copytree(halted, tmp_path / "run")), epochs=3)
    same = options(world, run, gradient_average=0.5, resume=True)
    assert open_run(replace(same, epochs=7, eval_steps=3, log_steps=2, keep=5)) == run
    with pytest.raises(InputError, match="--epochs is 2 but the run in .* has 3; expected as many"):
        open_run(replace(same, epochs=2))


def test_a_finished_run_without_a_checkpoint_gets_no_more_epochs(
    world, halted, tmp_path, monkeypatch
):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    shutil.copy(training.checkpoints(run)[-1] / "config.json", run)
    monkeypatch.setattr("minimore.run.Checkpoint", Mock())  # its weights are not there
    with pytest.raises(InputError, match="--epochs 2: .* is finished after 1, and kept no check"):
        open_run(options(world, run, gradient_average=0.5, resume=True, epochs=2))
    assert (run / "config.json").exists()


@pytest.mark.parametrize("damage", ["other texts", "the log"])
def test_a_finished_run_that_cannot_go_on_stays_finished(
    world, halted, tmp_path, monkeypatch, damage
):
    run = looks_finished(halted, tmp_path / "run")
    (run / "README.md").write_text("the card of the finished model")
    if damage == "the log":
        (run / "metrics.jsonl").write_text("{}\n")
    if damage == "other texts":
        monkeypatch.setattr(
            "minimore.train.digests_of", lambda *_: dict.fromkeys(world[1], "another")
        )
    before = content_of(run)
    longer = {"gradient_average": 0.5, "save_steps": 2, "keep": 1, "resume": True, "epochs": 2}
    with pytest.raises(InputError, match=damage):
        train(options(world, run, **longer))
    assert content_of(run) == before


def content_of(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_what_another_device_and_other_evaluations_change_is_said(world, halted, tmp_path, capsys):
    best = {"keep_best": "nll", "validation": 0.2, "gradient_average": 0.5}
    run = with_options(Path(shutil.copytree(halted, tmp_path / "run")), **best, eval_steps=4)
    open_run(options(world, run, resume=True, device="cpu", eval_steps=2, **best))
    device, evaluations = capsys.readouterr().out.splitlines()
    assert device.startswith("--device is 'cpu' but the run in ")
    assert "it does not continue bit for bit" in device
    assert evaluations.endswith("has 4: the best step is sought among other ones from here on")


# ---- the short command ---------------------------------------------------------------------------


# The functions that end a training.
REWARD_MODEL_ENDS, POLICY_ENDS = "minimore.train.finish", "minimore.alignment.finetune.finish"


def long_commands(small, run):
    """Commands with options of every type, by the function that ends their training."""
    directory, paths = small
    training_file = paths["ana"][0]
    reward_model = command(
        options(small, run, epochs=2, chat=True, label_smoothing=0.1, **SHORT | {"keep": 2})
    )
    policy = ["align", "finetune", f"--model={directory / 'model'}", f"--output={run}"]
    policy += [f"--input={training_file}", "--learning-rate", "1e-3", "--batch-size", "2"]
    return {REWARD_MODEL_ENDS: reward_model, POLICY_ENDS: policy}


def everything(run):
    """All bytes of a run but the log's, which has seconds in it, and so has what sums it up."""
    return {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", "state.json")
    }


@pytest.mark.parametrize("end", slow_but([POLICY_ENDS], [REWARD_MODEL_ENDS, POLICY_ENDS]))
def test_output_and_resume_are_the_whole_command(small, tmp_path, monkeypatch, capsys, end):
    run, copy = tmp_path / "a run", tmp_path / "copy"
    words = long_commands(small, run)[end]
    with monkeypatch.context() as patch:
        patch.setattr(end, lambda *_: None)
        assert main(words) == 0
    shutil.copytree(run, copy)
    assert main([*words, "--resume"]) == 0
    by_long = everything(run)
    shutil.rmtree(run)
    copy.rename(run)
    name = words[: 1 + (words[0] == "align")]
    assert main([*name, "--output", str(run), "--resume"]) == 0
    assert everything(run) == by_long and (run / "config.json").exists()
    capsys.readouterr()
    assert main([*name, f"--output={run}", "--resume", "--save-steps=7"]) == 0
    assert capsys.readouterr().out == f"{run}: finished already\n"
    assert main([*name, f"--output={run}", "--resume", "--seed", "1"]) == 2
    assert f"--seed is 1 but the run in {run} has 0" in capsys.readouterr().err


def test_a_short_command_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("minimore train: --output ")
    assert "there is no run to continue; to begin one, give --model" in said
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--resume", "--output"])
    assert "argument --output: expected one argument" in capsys.readouterr().err
