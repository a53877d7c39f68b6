"""A run that is killed or damaged anywhere ends as if it had not been, or is refused."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Command
from runs import RECIPES, command, content, options, run_command, slow_but
from safetensors.torch import load_file, save_file

import minimore.training as training
from minimore.checksums import file_checksum, write_checked_json
from minimore.engine.optim import AdamW
from minimore.options import InputError
from minimore.resume import Saver
from minimore.train import train

VARIANTS = {
    "average": {
        "gradient_average": 0.3,
        "lambda_scope": "group",
        "epochs": 2,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
    },
    "dro": {
        "method": "group_dro",
        "sampling": "proportional",
        "schedule": "cosine",
        "warmup": 0.1,
        "micro_tokens": 100,
    },
    "clipped": {"max_grad_norm": 0.5, "moments": "bfloat16", "recompute": "selective"},
}


# The other recipes are streamed as "split" is, or have moments of bf16 as "clipped" has.
VARIANTS |= {name: RECIPES[name] for name in ("split", "offloaded", "lossy", "8 bits, plain")}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_crashed_run_resumes_bitwise(world, tmp_path, name, monkeypatch):
    changes = VARIANTS[name] | {"save_steps": 3}
    assert train(options(world, tmp_path / "whole", **changes)) == 0
    real, calls = AdamW.update, []

    def crash(optimizer, name, *arguments):
        if name == "trunk.blocks.0.mlp.up.weight":
            calls.append(1)
            # Before any checkpoint, and between two; half of the parameters are of another step.
            if len(calls) in (2, 9):
                raise RuntimeError("crash")
        return real(optimizer, name, *arguments)

    monkeypatch.setattr(AdamW, "update", crash)
    for attempt in range(2):
        with pytest.raises(RuntimeError):
            train(options(world, tmp_path / "cut", resume=attempt > 0, **changes))
    monkeypatch.setattr(AdamW, "update", real)
    assert [p.name for p in training.checkpoints(tmp_path / "cut")] == ["checkpoint-6"]
    assert train(options(world, tmp_path / "cut", resume=True, **changes)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text("utf-8")
    assert (
        "ana: 30 pairs, 0 label ties" in card
        and "| `--save-steps` | `3` |" in card
        and "mean   " in card
    )
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "checksums.json",
        "config.json",
        "environment.json",
        "evaluation.json",
        "metrics.jsonl",
        "model.safetensors",
        "options.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_prompts.safetensors",
    ]
    assert (
        train(options(world, tmp_path / "cut", resume=True, **changes)) == 0
    )  # finished: nothing to do


LONG = {"save_steps": 2, "epochs": 2, "micro_tokens": 200}


@pytest.fixture(scope="module")
def long(world, tmp_path_factory):
    """A finished run of 22 steps, which nothing has killed."""
    run = tmp_path_factory.mktemp("long") / "run"
    run_command(options(world, run, **LONG))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_resumes_bitwise(world, long, tmp_path, number):
    log = tmp_path / "cut" / "metrics.jsonl"
    process = Command(command(options(world, tmp_path / "cut", **LONG)))
    while process.is_running and not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    process.signal(number)
    code = -9 if number == signal.SIGKILL else 128 + number
    assert process.wait(120) == code
    if number != signal.SIGKILL:
        assert "saved; the same command with --resume continues" in process.said
    assert not (tmp_path / "cut" / "config.json").exists()
    run_command(options(world, tmp_path / "cut", resume=True, **LONG))
    assert content(long) == content(tmp_path / "cut")


KILLS = int(os.environ.get("MINIMORE_KILLS", 3))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not(world, tmp_path):
    """SIGKILL, whatever is going on: loading, a step, a state or the finished model half written.

    MINIMORE_KILLS=100 makes it longer.
    """
    random = np.random.default_rng(int(os.environ.get("MINIMORE_KILLS_SEED", 0)))
    wholes, run, killed, recipes_run = {}, tmp_path / "run", 0, []
    while killed < KILLS:
        name = list(RECIPES)[len(recipes_run) % len(RECIPES)]
        changes = RECIPES[name] | {"save_steps": 1, "keep": 1 + len(recipes_run) % 2}
        if name not in wholes:
            began = time.monotonic()
            run_command(options(world, tmp_path / name, **changes))
            wholes[name] = content(tmp_path / name), time.monotonic() - began
        whole, seconds = wholes[name]
        shutil.rmtree(run, ignore_errors=True)
        while True:
            process = Command(command(options(world, run, resume=True, **changes)))
            code = process.wait(seconds * random.uniform(0.1, 1.0) if killed < KILLS else None)
            if code is not None:
                break
            process.signal(signal.SIGKILL)
            process.wait()
            killed += 1
            for checkpoint in training.checkpoints(run):
                training.check_whole(checkpoint)  # what bears its name is whole
        assert code == 0, process.error
        assert content(run) == whole, name
        assert not list(run.glob("*.partial"))
        assert len(training.checkpoints(run)) == changes["keep"]
        recipes_run.append(name)


HALF = {"save_steps": 4, "gradient_average": 0.3}


@pytest.fixture
def half(world, tmp_path, monkeypatch):
    """A run that stopped after step 6, whose last checkpoint is that of step 4."""
    run = tmp_path / "half"
    with monkeypatch.context() as patch:
        real = training.Schedule.sampled_at

        def sampled_at(schedule, step):
            if step == 7:
                raise RuntimeError("crash")
            return real(schedule, step)

        patch.setattr(training.Schedule, "sampled_at", sampled_at)
        with pytest.raises(RuntimeError, match="crash"):
            train(options(world, run, **HALF))
    assert [checkpoint.name for checkpoint in training.checkpoints(run)] == ["checkpoint-4"]
    assert (run / "metrics.jsonl").read_text().count("\n") == 6
    return run


def continued(world, run):
    return train(options(world, run, resume=True, **HALF))


def test_a_continued_run_is_the_whole_run_and_nothing_less(world, half, tmp_path, monkeypatch):
    """Its mutant: a resume that puts nothing back but the step and the weights is noticed."""
    assert train(options(world, tmp_path / "whole", **HALF)) == 0
    mutant = Path(shutil.copytree(half, tmp_path / "mutant"))
    assert continued(world, half) == 0
    assert content(half) == content(tmp_path / "whole")

    def forgetful(continued_training, facts):
        continued_training.first_step = facts["step"] + 1
        continued_training.optimizer.steps = facts["step"]

    monkeypatch.setattr(training, "restore", forgetful)
    assert continued(world, mutant) == 0
    assert content(mutant) != content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, value",
    [
        ("MKL_CBWR", "COMPATIBLE"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("ATEN_CPU_CAPABILITY", "default"),
    ],
)
def test_a_setting_that_changes_bits_is_told(world, half, capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert continued(world, half) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not bit for bit" in line]
    assert len(said) == 1 and name in said[0] and value in said[0]


def test_another_torch_and_another_processor_are_told(world, half, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr("minimore.resume.processor", lambda: "another processor")
    assert continued(world, half) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not bit for bit" in line]
    assert "another processor" in said[0] and "torch" in said[0] and "'2.99.0'" in said[0]


@pytest.mark.slow
def test_the_same_machine_is_not_mentioned(world, half, capsys):
    assert continued(world, half) == 0
    assert "not bit for bit" not in capsys.readouterr().out


LOGS = {
    "a line is gone": lambda lines: lines[:1] + lines[2:],
    "a line stands twice": lambda lines: lines[:2] + lines[1:],
    "a number is another": lambda lines: [lines[0].replace("0", "1", 1), *lines[1:]],
    "it is empty": lambda lines: [],
    "two lines are swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
}


@pytest.mark.parametrize("name", slow_but(["a number is another"], LOGS))
def test_a_log_that_is_another_is_refused(world, half, name):
    path = half / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(LOGS[name](lines)))
    with pytest.raises(InputError, match="not the log of this run's first 4 steps"):
        continued(world, half)


@pytest.mark.slow
def test_a_log_that_was_removed_begins_anew(world, half, capsys):
    (half / "metrics.jsonl").unlink()
    assert continued(world, half) == 0
    assert "the log begins after step 4" in capsys.readouterr().out
    first = json.loads((half / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 5


def test_a_test_file_that_is_a_training_file_is_refused(world, tmp_path):
    train_path, _ = world[1]["ana"]
    same = train_path.parent / "." / train_path.name
    for sources in (
        (f"ana={train_path},{same}",),
        (f"ana={train_path}", f"ben={world[1]['ben'][0]},{train_path}"),
    ):
        with pytest.raises(InputError, match="is both training and test file"):
            train(options(world, tmp_path / "run", source=sources))
    assert not (tmp_path / "run").exists()


def test_no_memory_on_resume_blames_no_checkpoint(world, half, monkeypatch):
    def no_memory(path):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")

    monkeypatch.setattr("minimore.resume.load_file", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        continued(world, half)
    assert training.checkpoints(half)


def test_changed_options_and_changed_data_are_refused(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("minimore.train.finish", lambda *a: None)
    train(options(world, run, save_steps=2))
    with pytest.raises(InputError, match=r"--learning-rate is 0\.002 but the run in .* has 0\.001"):
        train(options(world, run, save_steps=2, resume=True, learning_rate=0.002))
    monkeypatch.setattr("minimore.data.records.require_records_as_written", lambda *_: None)
    moved = tmp_path / "other.jsonl"
    name, (train_path, test_path) = next(iter(world[1].items()))
    original = Path(train_path).read_text()
    moved.write_text(original)
    try:
        Path(train_path).write_text("\n".join(original.splitlines()[::-1]) + "\n")
        with pytest.raises(InputError, match="source 'ana' has other texts"):
            train(options(world, run, save_steps=2, resume=True))
    finally:
        Path(train_path).write_text(original)


DAMAGE = {
    "state.json is gone": lambda c: (c / "state.json").unlink(),
    "state.json is empty": lambda c: (c / "state.json").write_text("{}"),
    "state.json is odd": lambda c: (c / "state.json").write_text(
        '{"step": [], "environment": {}, "data": {}}'
    ),
    "state.safetensors is gone": lambda c: (c / "state.safetensors").unlink(),
    "state.safetensors is cut": lambda c: (c / "state.safetensors").write_bytes(
        (c / "state.safetensors").read_bytes()[:9000]
    ),
    "state.safetensors is another's": lambda c: (c / "state.safetensors").write_bytes(
        (c / "model.safetensors").read_bytes()
    ),
    "config.json is gone": lambda c: (c / "config.json").unlink(),
    "the tokenizer is gone": lambda c: (c / "tokenizer.json").unlink(),
    "the weights are cut": lambda c: (c / "model.safetensors").write_bytes(
        (c / "model.safetensors").read_bytes()[:9000]
    ),
    "its step is another": lambda c: (c / "state.json").write_text(
        (c / "state.json").read_text().replace('"step": 11', '"step": 3')
    ),
    "its step is true": lambda c: (c / "state.json").write_text(
        (c / "state.json").read_text().replace('"step": 11', '"step": true')
    ),
    "a moment has another shape": lambda c: change_tensor(c, "m.head", torch.zeros(3)),
    "a moment has another type": lambda c: change_tensor(
        c, "m.head", torch.zeros(64, dtype=torch.float64)
    ),
    "the average is misshapen": lambda c: change_tensor(c, "weighting.average", torch.zeros(2, 64)),
    "the average is not finite": lambda c: change_tensor(
        c, "weighting.average", torch.full((3, 64), torch.nan)
    ),
    "the average is gone": lambda c: change_tensor(c, "weighting.average", None),
    "a byte of the weights is another": lambda c: flip(c / "model.safetensors"),
    "a byte of the moments is another": lambda c: flip(c / "state.safetensors"),
    "half of it is deleted": lambda c: [p.unlink() for p in sorted(c.iterdir())[::2]],
    "its checksums are null": lambda c: edit(c / "state.json", files=None),
    "its checksums are empty": lambda c: edit(c / "state.json", files={}),
    "the weighting is forgotten": lambda c: edit(c / "state.json", weighting=[]),
    "the random state is short": lambda c: change_tensor(
        c, "random", torch.zeros(3, dtype=torch.uint8)
    ),
    "config.json of the run is empty": lambda c: (c.parent / "config.json").touch(),
    "metrics.jsonl is garbage": lambda c: (c.parent / "metrics.jsonl").write_text("garbage\n"),
    "options.json is a list": lambda c: (c.parent / "options.json").write_text("[]"),
}


def change_tensor(checkpoint, key, tensor):
    """Another tensor, with a checksum that is right: the shape and the type are looked at, too."""
    tensors = load_file(checkpoint / "state.safetensors")
    assert key in tensors
    save_file(
        {k: v for k, v in (tensors | {key: tensor}).items() if v is not None},
        checkpoint / "state.safetensors",
    )
    checksums = json.loads((checkpoint / "state.json").read_text())["files"]
    state = {"state.safetensors": file_checksum(checkpoint / "state.safetensors")}
    edit(checkpoint / "state.json", files=checksums | state)


def flip(path):
    """Change the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit(path, **changes):
    """Other facts, with a checksum that is right."""
    facts = json.loads(path.read_text())
    del facts["crc32"]
    write_checked_json(path, facts | changes)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_refused_in_one_line(world, halted, tmp_path, name):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    DAMAGE[name](training.checkpoints(run)[-1])
    with pytest.raises(InputError):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))
    assert training.checkpoints(run) and not (
        (run / "config.json").is_file() and (run / "config.json").read_text()
    )


@pytest.mark.slow
def test_several_checkpoints_are_kept_and_the_last_good_one_is_named(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("minimore.train.finish", lambda *a: None)
        train(options(world, run, save_steps=2, keep=3))
    assert [p.name for p in training.checkpoints(run)] == [
        "checkpoint-8",
        "checkpoint-10",
        "checkpoint-11",
    ]
    flip(run / "checkpoint-11" / "model.safetensors")
    with pytest.raises(
        InputError,
        match="model.safetensors is damaged: its checksum is another.*;"
        " remove checkpoint-11 to continue from checkpoint-10",
    ):
        train(options(world, run, save_steps=2, keep=3, resume=True))
    shutil.rmtree(run / "checkpoint-11")
    assert train(options(world, run, save_steps=5, resume=True)) == 0
    train(options(world, tmp_path / "whole"))
    assert content(run) == content(tmp_path / "whole")


OTHERS = {
    "--parameters is 'split' but the run in .* has 'bfloat16'": {"parameters": "split"},
    "--moments is 'float32' but the run in .* has 'int8'": {"moments": "float32"},
    "--model is .* but the run": {"model": "elsewhere"},
    "--source is": {"source": ("ana=x.jsonl",)},
    "--seed is 1": {"seed": 1},
}


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_recipe_model_or_data(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("minimore.train.finish", lambda *a: None)
        train(options(world, run, **RECIPES["lossy"]))
    for said, others in OTHERS.items():
        with pytest.raises(InputError, match=said):
            train(options(world, run, resume=True, **RECIPES["lossy"] | others))


RECIPE_EDITS = {
    "gone": ...,
    "a list": [],
    "empty": {},
    "odd": {"parameters": "foo"},
    "of another type": {"moments": 7},
}


@pytest.mark.parametrize("name", RECIPE_EDITS)
@pytest.mark.parametrize("memory", [None, "1GB"])
def test_an_edited_recipe_is_refused(world, halted, tmp_path, name, memory):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    stored, edited = json.loads((run / "options.json").read_text()), RECIPE_EDITS[name]
    recipe = stored.pop("recipe")
    stored |= {} if edited is ... else {"recipe": recipe | edited if edited else edited}
    del stored["crc32"]
    write_checked_json(run / "options.json", stored)
    with pytest.raises(InputError, match='"recipe" is not that of a run'):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True, memory=memory))


def test_options_that_were_edited_blame_no_checkpoint(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    stored = json.loads((run / "options.json").read_text())
    stored["recipe"]["moments"] = "int8"
    (run / "options.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="options.json: is not as it was written"):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))


def test_a_plain_file_is_no_checkpoint(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    (run / "checkpoint-99").touch()
    assert train(options(world, run, save_steps=2, gradient_average=0.5, resume=True)) == 0


def test_a_checkpoint_of_an_older_version_is_not_called_damaged(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    path = training.checkpoints(run)[-1] / "state.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "crc32"})
    )
    with pytest.raises(
        InputError,
        match="older version of minimore, with other checksums; continue .* that version",
    ):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))


def test_a_save_that_fails_in_its_thread_stops_the_run_at_the_next_step(
    world, tmp_path, monkeypatch
):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minimore.resume.write_model", fail)
    with pytest.raises(
        OSError,
        match="No space left on device; checkpoint-2 was not written, no checkpoint is kept",
    ):
        train(options(world, tmp_path / "run", save_steps=2, epochs=50))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 20


@pytest.mark.slow
def test_a_run_may_go_on_with_another_engine(world, tmp_path, monkeypatch, capsys):
    """Exact recipes differ by rounding, which is said; offloading by nothing, which is not."""
    for name, first, then in (
        ("a", {}, {"engine": "streamed", "recompute": "full", "offload": ("states",)}),
        ("b", RECIPES["lossy"], {"memory": "1GB", "recompute": "full"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("minimore.train.finish", lambda *a: None)
            train(options(world, tmp_path / name, **first))
        capsys.readouterr()
        assert train(options(world, tmp_path / name, resume=True, **then)) == 0
        said = capsys.readouterr().out
        assert ("--engine is 'streamed' but the run" in said) == (
            name == "a"
        ) and "offload is" not in said
        assert json.loads((tmp_path / name / "options.json").read_text())["recipe"]["moments"] == (
            "float32" if name == "a" else "int8"
        )


@pytest.mark.slow
def test_saving_with_and_without_room_for_a_copy_is_the_same(world, tmp_path, monkeypatch):
    """With room, a thread writes a copy while training goes on: the state at its step."""
    real = Saver._write
    threads, files = [], {}

    def slow(saver, snapshot):
        threads.append(threading.current_thread() is not threading.main_thread())
        time.sleep(0.2)
        real(saver, snapshot)
        step = snapshot.facts["step"]
        checkpoint = saver.run / f"checkpoint-{step}"
        files[step] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        facts = json.loads(files[step].pop("state.json"))
        # The log has seconds in it, and the facts have the log's checksum.
        files[step]["facts"] = {k: v for k, v in facts.items() if k not in ("log", "crc32")}

    monkeypatch.setattr(Saver, "_write", slow)
    results = []
    for available in (1 << 60, 0):
        threads.clear()
        files.clear()
        monkeypatch.setattr("minimore.resume.available_memory", lambda room=available: room)
        train(options(world, tmp_path / str(available), save_steps=3, **RECIPES["lossy"]))
        results.append((list(threads), dict(files)))
    (threads_with_room, files_with_room), (threads_without, files_without) = results
    assert files_with_room == files_without and len(files_without) == 4
    assert threads_with_room == [True] * 4 and threads_without == [False] * 4


def test_a_step_may_be_cut_finer_when_memory_runs_out(world, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("minimore.train.finish", lambda *a: None)
        train(options(world, tmp_path / "run"))
    assert train(options(world, tmp_path / "run", resume=True, micro_tokens=100)) == 0
    assert "--micro-tokens is 100" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stop_after_the_last_step_saves_before_the_evaluation(world, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minimore.reward_training.evaluate_sources", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options(world, tmp_path / "cut"))
    assert [p.name for p in training.checkpoints(tmp_path / "cut")] == ["checkpoint-11"]
    train(options(world, tmp_path / "cut", resume=True))
    train(options(world, tmp_path / "whole"))
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
