"""The directory of a run: who may write in it, and what a full disk leaves there."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import command, content, options, unfinished
from safetensors.torch import load_file

import minimore.files as files
import minimore.training as training
from minimore.checksums import read_checked_json, write_checked_json
from minimore.cli import main
from minimore.data.world import World
from minimore.options import InputError
from minimore.run import Lock
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
