"""One step against its definition; a run killed anywhere ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KeepsGradients
from safetensors.torch import load_file, save_file

import minimore.train as training
from minimore.cli import main
from minimore.data.pairs import load_source, pack_pairs
from minimore.data.world import World
from minimore.engine.objective import NonFiniteLoss, RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.model.recompute import RECOMPUTE
from minimore.more import WEIGHTINGS, more_loss, pair_losses
from minimore.options import InputError
from minimore.report import evaluate_sources
from minimore.resume import Saver, file_digest
from minimore.reward import ModelOptions, fresh_head, open_reward_model
from minimore.run import Lock
from minimore.train import TrainOptions, learning_rate_at, train

K = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(30, 24, 12), test_pairs=20).write(
        directory
    )
    return directory, paths


def options(world, output, **changes):
    directory, paths = world
    return TrainOptions(
        **{
            "model": str(directory / "model"),
            "output": str(output),
            "learning_rate": 1e-3,
            "batch_size": 6,
            "source": tuple(f"{n}={a},{b}" for n, (a, b) in paths.items()),
            "log_steps": 100,
        }
        | changes
    )


@pytest.fixture
def float64(world):
    """The untrained model in float64, and 12 pairs, the sources in turn."""
    directory, paths = world
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    model.double().trunk.compute_dtype = torch.float64
    sources = [load_source(n, str(a), checkpoint.tokenizer, 64) for n, (a, _) in paths.items()]
    return model, [s.pairs[i] for i in range(4) for s in sources], [0, 1, 2] * 4


def run_step(
    model,
    pairs,
    source,
    sources=K,
    state=None,
    method="more",
    scope="step",
    sampling="equal",
    micro_tokens=8192,
):
    weigh = partial(WEIGHTINGS[method], state={} if state is None else state)
    optimizer = KeepsGradients()
    engine = PlainEngine(model, optimizer, Recipe(micro_tokens=micro_tokens))
    result = engine.step(pairs, source, RewardObjective(sources, weigh, method, scope, sampling))
    model.gradients = optimizer.gradients
    return result


def gradients_of(model):
    """What the last step gave to the optimizer, as one vector."""
    return torch.cat([gradient.flatten() for gradient in model.gradients.values()])


def autograd_of(model, loss):
    """The gradient of a loss, as one vector in the same order, from autograd alone."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    "sampling, source",
    [("equal", [0, 1, 2] * 4), ("proportional", [0, 0, 1, 0, 2, 1, 0, 0, 0, 1, 1, 0])],
)
@pytest.mark.parametrize("scope", ["step", "group"])
@pytest.mark.parametrize("method", list(WEIGHTINGS))
def test_micro_batches_equal_one_batch(float64, method, scope, sampling, source):
    if scope == "group" and sampling != "equal":
        pytest.skip("a group needs equal sampling: refused by check_options")
    model, pairs, _ = float64
    results = []
    for micro_tokens in (10**9, 150, 1):
        z_chosen, _, weights, loss = run_step(
            model,
            pairs,
            source,
            method=method,
            scope=scope,
            sampling=sampling,
            micro_tokens=micro_tokens,
        )
        results.append((gradients_of(model), weights, loss, z_chosen))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_step_scope_is_the_more_loss(float64):
    model, pairs, source = float64
    *_, weights, loss = run_step(model, pairs, source, micro_tokens=100)
    ours = gradients_of(model)
    expected, expected_weights = more_loss(
        model.head, *model.features(pack_pairs(pairs)), torch.tensor(source)
    )
    assert torch.allclose(ours, autograd_of(model, expected), rtol=0, atol=1e-13)
    assert torch.allclose(weights, expected_weights) and loss.item() == pytest.approx(
        expected.item()
    )


def test_group_scope_is_the_mean_of_more_losses_of_groups(float64):
    model, pairs, source = float64
    *_, weights, loss = run_step(model, pairs, source, scope="group", micro_tokens=100)
    ours = gradients_of(model)
    groups = [
        more_loss(model.head, *model.features(pack_pairs(pairs[i : i + K])), torch.arange(K))
        for i in range(0, 12, K)
    ]
    expected = sum(g[0] / 4 for g in groups)
    assert torch.allclose(ours, autograd_of(model, expected), rtol=0, atol=1e-13)
    assert torch.allclose(weights, sum(g[1] / 4 for g in groups))


def test_uniform_with_equal_shares_is_the_mean_over_pairs(float64):
    model, pairs, source = float64
    run_step(model, pairs, source, method="uniform")
    ours = gradients_of(model)
    z_chosen, z_rejected = model.features(pack_pairs(pairs))
    expected = pair_losses((z_chosen - z_rejected) @ model.head).mean()
    assert torch.allclose(ours, autograd_of(model, expected), rtol=0, atol=1e-13)


def test_recomputation_changes_nothing(float64):
    model, pairs, source = float64
    results = []
    for model.trunk.recompute in RECOMPUTE:
        run_step(model, pairs, source)
        results.append(gradients_of(model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_learning_rate():
    given = TrainOptions(model="", output="", learning_rate=1.0, warmup=0.2)
    assert [learning_rate_at(s, 10, given) for s in range(4)] == pytest.approx([0.5, 1, 1, 7 / 8])
    assert learning_rate_at(9, 10, given) == pytest.approx(1 / 8)
    flat = TrainOptions(model="", output="", learning_rate=1.0, schedule="constant")
    assert learning_rate_at(7, 10, flat) == 1
    cosine = TrainOptions(model="", output="", learning_rate=1.0, schedule="cosine")
    assert [learning_rate_at(s, 2, cosine) for s in range(2)] == pytest.approx([1, 0.5])


def test_the_loop_applies_learning_rate_and_weight_decay(world, tmp_path):
    """After one step AdamW with decay differs from AdamW without by learning rate x decay x the first weights."""
    changes, heads = dict(pairs_per_source=2, batch_size=6, learning_rate=1e-2), {}
    first = open_reward_model(ModelOptions(model=str(world[0] / "model")))[0].head.detach()
    for decay in (0.0, 0.5):
        train(options(world, tmp_path / str(decay), weight_decay=decay, **changes))
        heads[decay] = load_file(tmp_path / str(decay) / "model.safetensors")["score.weight"][0]
    assert torch.allclose(heads[0.0] - heads[0.5], 1e-2 * 0.5 * first, rtol=1e-4, atol=1e-7)
    assert torch.allclose(
        (heads[0.0] - first).abs(), torch.full_like(first, 1e-2), rtol=1e-3
    )  # Adam's first step is one learning rate
    given = options(world, tmp_path / "run", warmup=0.3, schedule="cosine", epochs=2)
    train(given)
    rates = [s["learning_rate"] for s in content(tmp_path / "run")[2]]
    assert rates == [learning_rate_at(s, len(rates), given) for s in range(len(rates))]


def test_a_fresh_head_is_seeded():
    assert torch.equal(fresh_head(8, 3), fresh_head(8, 3)) and not torch.equal(
        fresh_head(8, 3), fresh_head(8, 4)
    )
    assert fresh_head(9999, 0).std() == pytest.approx(1e-2, rel=0.05)


def content(run):
    """Everything that must be equal to the bit; wall time is left out."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        (run / "model.safetensors").read_bytes(),
        json.loads((run / "evaluation.json").read_text()),
        [{k: v for k, v in s.items() if k != "seconds"} for s in steps],
    )


VARIANTS = {
    "more": {},
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
RECIPES = {
    "streamed": {"engine": "streamed"},
    "split": {
        "engine": "streamed",
        "parameters": "split",
        "recompute": "selective",
        "micro_tokens": 100,
    },
    "offloaded": {
        "engine": "streamed",
        "parameters": "split",
        "recompute": "full",
        "offload": ("inputs", "states"),
        "micro_tokens": 100,
    },
    "lossy": {
        "engine": "streamed",
        "parameters": "bfloat16",
        "moments": "int8",
        "recompute": "full",
    },
    "half lossy": {"engine": "streamed", "parameters": "split", "moments": "bfloat16"},
    "8 bits, plain": {"moments": "int8"},
}
VARIANTS |= RECIPES


@pytest.mark.parametrize("name", VARIANTS)
def test_a_crashed_run_resumes_bitwise(world, tmp_path, name, monkeypatch):
    changes = VARIANTS[name] | {"save_steps": 3}
    assert train(options(world, tmp_path / "whole", **changes)) == 0
    real, calls = AdamW.update, []

    def crash(optimizer, name, *arguments):
        if name == "trunk.blocks.0.mlp.up.weight":
            calls.append(1)
            if len(calls) in (
                2,
                9,
            ):  # before any checkpoint, and between two; half of the parameters are of another step
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
        "config.json",
        "environment.json",
        "evaluation.json",
        "metrics.jsonl",
        "model.safetensors",
        "options.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (
        train(options(world, tmp_path / "cut", resume=True, **changes)) == 0
    )  # finished: nothing to do


def unfinished(run):
    """Nothing in it looks finished, and nothing half-written lies about."""
    return not (run / "config.json").exists() and not list(run.rglob("*.partial*"))


def test_every_rename_that_fails_is_survived(world, tmp_path, monkeypatch, capsys):
    short = dict(pairs_per_source=4, save_steps=1)
    real, calls, broken = os.replace, [], None

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == broken:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr("os.replace", replace)
    assert train(options(world, tmp_path / "whole", **short)) == 0
    most = len(calls)
    assert most > 15
    for broken in range(1, most + 1):
        run = tmp_path / str(broken)
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            train(options(world, run, **short))
        assert (unfinished(run) or broken == most) and all(
            {"state.json", "config.json", "model.safetensors"} <= {p.name for p in c.iterdir()}
            for c in training.checkpoints(run)
        )
        assert train(options(world, run, resume=True, **short)) == 0
        assert content(run) == content(tmp_path / "whole")


def test_a_disk_that_fills_at_any_size_leaves_nothing_that_looks_finished(world, tmp_path, capsys):
    """The kernel refuses to write past a limit, as a full disk does, to every file in turn, whoever asks."""
    resource = pytest.importorskip("resource")
    short, before = (
        dict(pairs_per_source=4, save_steps=1),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    assert train(options(world, tmp_path / "whole", **short)) == 0
    sizes = sorted({p.stat().st_size for p in (tmp_path / "whole").iterdir()})
    given = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in asdict(options(world, tmp_path / "run", **short)).items()
        if k not in ("source", "resume")
        and v is not None
        and v != TrainOptions.__dataclass_fields__[k].default
    ]
    given = [
        "train",
        *given,
        *(a for s in options(world, tmp_path).source for a in ("--source", s)),
    ]
    capsys.readouterr()
    for limit in sorted({0, 100, *(s - 1 for s in sizes), sizes[-1] + 5000}):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            code = main(given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and "Traceback" not in said, (limit, said)
        assert unfinished(tmp_path / "run"), limit
        assert main([*given, "--resume"]) == 0
        assert content(tmp_path / "run") == content(tmp_path / "whole")
        capsys.readouterr()


def command(given):
    words = [sys.executable, "-m", "minimore", "train"]
    for key, value in vars(given).items():
        for v in value if isinstance(value, tuple) else [value]:
            words += (
                []
                if v in (None, False)
                else ["--" + key.replace("_", "-"), *([] if v is True else [str(v)])]
            )
    return words


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_resumes_bitwise(world, tmp_path, number):
    changes = {"save_steps": 2, "epochs": 6, "micro_tokens": 200}
    assert (
        subprocess.run(
            command(options(world, tmp_path / "whole", **changes)), capture_output=True
        ).returncode
        == 0
    )
    log = tmp_path / "cut" / "metrics.jsonl"
    process = subprocess.Popen(
        command(options(world, tmp_path / "cut", **changes)), stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "saved; the same command with --resume continues" in output
    assert not (tmp_path / "cut" / "config.json").exists()
    assert (
        subprocess.run(
            command(options(world, tmp_path / "cut", resume=True, **changes)), capture_output=True
        ).returncode
        == 0
    )
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


KILLS = int(os.environ.get("MINIMORE_KILLS", 5))


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not(world, tmp_path):
    """SIGKILL, whatever is going on: loading, a step, a state half written, the finished model half written. MINIMORE_KILLS=100 for longer."""
    random = np.random.default_rng(int(os.environ.get("MINIMORE_KILLS_SEED", 0)))
    wholes, run, killed, found = {}, tmp_path / "run", 0, []
    while killed < KILLS:
        name = list(RECIPES)[len(found) % len(RECIPES)]
        changes = RECIPES[name] | {"save_steps": 1, "epochs": 3, "keep": 1 + len(found) % 2}
        if name not in wholes:
            began = time.monotonic()
            assert (
                subprocess.run(
                    command(options(world, tmp_path / name, **changes)), capture_output=True
                ).returncode
                == 0
            )
            wholes[name] = content(tmp_path / name), time.monotonic() - began
        whole, seconds = wholes[name]
        shutil.rmtree(run, ignore_errors=True)
        while True:
            process = subprocess.Popen(
                command(options(world, run, resume=True, **changes)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:  # the first two seconds are imports: the kill comes after most of them
                said = process.communicate(
                    timeout=seconds * random.uniform(0.6, 1.0) if killed < KILLS else None
                )
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                for kept in training.checkpoints(run):
                    training.check_whole(kept)  # what bears its name is whole
                continue
            assert process.returncode == 0, said
            break
        assert content(run) == whole, name
        assert not list(run.glob("*.partial")) and not training.checkpoints(run)
        found.append(name)


def test_one_seed_one_result(world, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(world, tmp_path / name, seed=seed))
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")


def test_changed_options_and_changed_data_are_refused(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(training, "finish", lambda *a: None)
    train(options(world, run, save_steps=2))
    with pytest.raises(InputError, match=r"--learning-rate is 0\.002 but the run in .* has 0\.001"):
        train(options(world, run, save_steps=2, resume=True, learning_rate=0.002))
    moved = tmp_path / "other.jsonl"
    name, (train_path, test_path) = next(iter(world[1].items()))
    original = Path(train_path).read_text()
    moved.write_text(original)
    try:
        Path(train_path).write_text("\n".join(original.splitlines()[::-1]) + "\n")
        with pytest.raises(InputError, match="source 'ana' has other pairs"):
            train(options(world, run, save_steps=2, resume=True))
    finally:
        Path(train_path).write_text(original)


DAMAGE = {
    "state.json is gone": lambda c: (c / "state.json").unlink(),
    "state.json is empty": lambda c: (c / "state.json").write_text("{}"),
    "state.json is odd": lambda c: (c / "state.json").write_text(
        '{"step": [], "threads": 1, "data": {}}'
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
    "its checksums are null": lambda c: edit(c / "state.json", sha256=None),
    "its checksums are empty": lambda c: edit(c / "state.json", sha256={}),
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
    sums = json.loads((checkpoint / "state.json").read_text())["sha256"]
    edit(
        checkpoint / "state.json",
        sha256=sums | {"state.safetensors": file_digest(checkpoint / "state.safetensors")},
    )


def flip(path):
    """Change the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def halted(world, tmp_path_factory):
    """A run with a checkpoint, not finished."""
    run = tmp_path_factory.mktemp("halted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "finish", lambda *a: None)
        train(options(world, run, save_steps=2, gradient_average=0.5))
    return run


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_refused_in_one_line(world, halted, tmp_path, name):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    DAMAGE[name](training.checkpoints(run)[-1])
    with pytest.raises(InputError):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))
    assert training.checkpoints(run) and not (
        (run / "config.json").is_file() and (run / "config.json").read_text()
    )


def test_several_checkpoints_are_kept_and_the_last_good_one_is_named(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", lambda *a: None)
        train(options(world, run, save_steps=2, keep=3))
    assert [p.name for p in training.checkpoints(run)] == [
        "checkpoint-8",
        "checkpoint-10",
        "checkpoint-11",
    ]
    flip(run / "checkpoint-11" / "model.safetensors")
    with pytest.raises(
        InputError,
        match="model.safetensors is damaged: its checksum is another.*; remove checkpoint-11 to continue from checkpoint-10",
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


@pytest.mark.parametrize("said", OTHERS)
def test_a_run_is_not_continued_with_another_recipe_model_or_data(
    world, tmp_path, monkeypatch, said
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", lambda *a: None)
        train(options(world, run, **RECIPES["lossy"]))
    with pytest.raises(InputError, match=said):
        train(options(world, run, resume=True, **RECIPES["lossy"] | OTHERS[said]))


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
    (run / "options.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match='"recipe" is not that of a run'):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True, memory=memory))


def test_a_checkpoint_of_an_older_version_is_not_called_damaged(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    path = training.checkpoints(run)[-1] / "state.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"})
    )
    with pytest.raises(
        InputError,
        match="older version of minimore, without checksums; continue this run with that version",
    ):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))


def test_two_processes_do_not_train_in_one_directory(world, halted, tmp_path):
    run = Path(shutil.copytree(halted, tmp_path / "run"))
    before = sorted(p.name for p in run.rglob("*"))
    with Lock(run), pytest.raises(InputError, match="another process is training there"):
        train(options(world, run, save_steps=2, gradient_average=0.5, resume=True))
    assert sorted(p.name for p in run.rglob("*")) == before
    assert train(options(world, run, save_steps=2, gradient_average=0.5, resume=True)) == 0


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


def test_a_run_may_go_on_with_another_engine(world, tmp_path, monkeypatch, capsys):
    """Exact recipes differ by rounding, which is said; offloading by nothing, which is not."""
    for name, first, then in (
        ("a", {}, {"engine": "streamed", "recompute": "full", "offload": ("states",)}),
        ("b", RECIPES["lossy"], {"memory": "1GB", "recompute": "full"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(training, "finish", lambda *a: None)
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


def test_saving_with_and_without_room_for_a_copy_is_the_same(world, tmp_path, monkeypatch):
    """With room a thread writes a copy while training goes on: what it writes is the state at its step."""
    real = Saver._write

    def slow(saver, *arguments):
        threads.append(threading.current_thread() is not threading.main_thread())
        time.sleep(0.2)
        real(saver, *arguments)
        kept[arguments[-1]["step"]] = {
            p.name: p.read_bytes()
            for p in (saver.run / f"checkpoint-{arguments[-1]['step']}").iterdir()
        }

    found, threads_of = [], []
    for available in (1 << 60, 0):
        kept, threads = {}, []
        monkeypatch.setattr("minimore.resume.available_memory", lambda: available)
        monkeypatch.setattr(Saver, "_write", slow)
        train(options(world, tmp_path / str(available), save_steps=3, **RECIPES["lossy"]))
        found.append(kept)
        threads_of.append(threads)
    assert found[0] == found[1] and len(found[0]) == 4
    assert threads_of == [[True] * 4, [False] * 4]


def test_an_existing_output_is_refused_and_left_alone(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(InputError):
            train(options(world, tmp_path / "mine", resume=resume))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


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


def test_a_step_may_be_cut_finer_when_memory_runs_out(world, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", lambda *a: None)
        train(options(world, tmp_path / "run"))
    assert train(options(world, tmp_path / "run", resume=True, micro_tokens=100)) == 0
    assert "--micro-tokens is 100" in capsys.readouterr().out


def test_two_sources_of_unit_gradients_are_said_to_be_uniform(world, tmp_path, capsys):
    train(options(world, tmp_path / "run", source=options(world, "x").source[:2], batch_size=4))
    assert "MORE is uniform here" in capsys.readouterr().out


def test_a_stop_after_the_last_step_saves_before_the_evaluation(world, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_sources", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options(world, tmp_path / "cut"))
    assert [p.name for p in training.checkpoints(tmp_path / "cut")] == ["checkpoint-11"]
    train(options(world, tmp_path / "cut", resume=True))
    train(options(world, tmp_path / "whole"))
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


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


def test_an_infinite_margin_is_found_although_its_loss_is_zero(float64):
    """z and head are finite, their product is not: the loss of a pair won by infinity is 0, but its gradient is 0 x infinity."""
    model, pairs, source = float64
    model.trunk.final_norm.weight.data.fill_(1e200)
    model.head.data.fill_(1e150)
    with pytest.raises(NonFiniteLoss):
        run_step(model, pairs, source)


def test_one_source_alone_is_bradley_terry(world, tmp_path, capsys):
    only = options(world, "x").source[:1]
    train(options(world, tmp_path / "more", source=only, batch_size=4))
    assert "MORE is plain Bradley-Terry" in capsys.readouterr().out
    train(options(world, tmp_path / "uniform", source=only, batch_size=4, method="uniform"))
    assert content(tmp_path / "more")[0] == content(tmp_path / "uniform")[0]


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


def test_loss_falls_on_the_training_pairs(world, tmp_path):
    train(options(world, tmp_path / "run", epochs=20, learning_rate=3e-3, schedule="constant"))
    losses = [s["loss"] for s in content(tmp_path / "run")[2]]
    assert np.mean(losses[-10:]) < 0.3 < 0.6 < np.mean(losses[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_step_agrees_with_cpu(world):
    directory, paths = world
    results = []
    for device in ("cpu", "cuda"):
        model, checkpoint = open_reward_model(
            ModelOptions(model=str(directory / "model"), device=device, compute_dtype="float32")
        )
        source = load_source("ana", str(paths["ana"][0]), checkpoint.tokenizer, 64)
        run_step(model, source.pairs[:6], [0] * 6, sources=1)
        results.append(gradients_of(model).cpu())
    assert (results[0] - results[1]).norm() < 1e-4 * results[0].norm()
