"""Several processes train as one: the same gradients and weights, whoever dies or resumes."""

import json
import os
import shutil
import signal
from copy import deepcopy
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import KeepsGradients
from processes import FORKS, group, group_variables, run_to_the_end
from runs import command, content, options

from minimore import training
from minimore.cli import main
from minimore.data.labels import Label
from minimore.data.pairs import load_source
from minimore.engine import distributed
from minimore.engine.distributed import DistributedEngine, ShardedAdamW, check_group, shard, shares
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.model.trunk import replace_parameter
from minimore.more import WEIGHTINGS
from minimore.options import InputError
from minimore.resume import check_whole
from minimore.reward import ModelOptions, open_reward_model

K = 3
CASES = {  # of one step; pairs: how many of the twelve it has
    "one micro-batch": {},
    "several, unequal": {"micro_tokens": 120},
    "fewer pairs than processes": {"pairs": 1},
    "groups": {"scope": "group", "micro_tokens": 150},
    "uniform": {"method": "uniform", "micro_tokens": 120},
    "group_dro": {"method": "group_dro"},
    "recomputed": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "votes and weights": {"labels": True},
    "clipped": {"max_grad_norm": 1e-3},
}


# ---- one step in float64 -------------------------------------------------------------------------


@cache
def open_world(directory, files):
    """The untrained model in float64, and twelve pairs of the three sources in turn."""
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    model.double().trunk.compute_dtype = torch.float64
    sources = [load_source("", str(file), checkpoint.tokenizer, 64) for file in files]
    return model, [s.pairs[i] for i in range(4) for s in sources], [0, 1, 2] * 4


def open_float64(world, labels=False, pairs=12):
    """A copy of the model, and the first pairs; labels: of several votes, margins and weights."""
    directory, paths = world
    model, items, source = open_world(directory, tuple(train for train, _ in paths.values()))
    if labels:
        rows = [Label(0.5 + 0.04 * i, 3.0, 0.1 * i, 1.0 + i) for i in range(12)]
        items = [pair._replace(label=label) for pair, label in zip(items, rows)]
    return deepcopy(model), items[:pairs], source[:pairs]


def outcome(world, optimizer, case, steps=1):
    """What some steps of a case show: lambda, loss, features, and what the optimizer received."""
    case = dict(case)
    recipe = {k: case.pop(k) for k in ("micro_tokens", "recompute", "max_grad_norm") if k in case}
    method, scope = case.pop("method", "more"), case.pop("scope", "step")
    model, items, source = open_float64(world, **case)
    objective = RewardObjective(K, partial(WEIGHTINGS[method], state={}), method, scope)
    engine = PlainEngine(model, optimizer, Recipe(**recipe))
    if dist.is_initialized():
        for name, p in model.named_parameters():
            replace_parameter(model, name, optimizer.adopt(name, p.detach()))
        shard(model, optimizer)
        engine = DistributedEngine(model, optimizer, Recipe(**recipe))
    elif isinstance(optimizer, AdamW):
        optimizer.adopt_all(model)
    for _ in range(steps):
        result = engine.step(items, source, objective)
    parameters = {n: distributed.whole(p.detach()) for n, p in model.named_parameters()}
    gradients = getattr(optimizer, "gradients", {})
    return {**result._asdict(), **(gradients or parameters)}


class KeepsWholeGradients(ShardedAdamW):
    """Changes nothing, and keeps the gradients of the last step, whole."""

    def __init__(self):
        super().__init__()
        self.gradients = {}

    def update(self, name, p, gradient, state=None):
        self.gradients[name] = distributed.whole(gradient).clone()


def sharded_optimizer():
    optimizer = ShardedAdamW(weight_decay=0.1)
    optimizer.learning_rate = 1e-3
    return optimizer


def work(world, variables, path):
    """What each process does: the cases, then a mutant; the first one stores what it saw."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shown = {name: outcome(world, KeepsWholeGradients(), CASES[name]) for name in CASES}
    shown["trained"] = outcome(world, sharded_optimizer(), {"micro_tokens": 120}, steps=3)
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda t, *a: t if t.ndim == 2 else all_reduce(t, *a)
    shown["mutant"] = outcome(world, KeepsWholeGradients(), {})
    if dist.get_rank() == 0:
        torch.save(shown, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shown(world, tmp_path_factory):
    """What three processes saw, by case. Three share nothing equally: neither pairs nor rows."""
    path = tmp_path_factory.mktemp("shown") / "shown.pt"
    forks = [FORKS.Process(target=work, args=(world, v, path)) for v in group_variables(3)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(300)
        assert fork.exitcode == 0
    return torch.load(path)


def distance(seen, expected):
    """The largest difference of two outcomes, absolute."""
    assert seen.keys() == expected.keys()
    differences = [(seen[key] - value).abs().max().item() for key, value in expected.items()]
    return float(np.max(differences))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_weights_are_those_of_one_process(shown, world, case):
    expected = outcome(world, KeepsGradients(), CASES[case])
    assert expected["weights"].dtype == torch.float64
    assert distance(shown[case], expected) < 1e-12


@pytest.mark.slow
def test_three_updates_are_those_of_one_process(shown, world):
    optimizer = AdamW(weight_decay=0.1)
    optimizer.learning_rate = 1e-3
    expected = outcome(world, optimizer, {}, steps=3)
    assert distance(shown["trained"], expected) < 1e-9


@pytest.mark.slow
def test_a_mutant_that_weighs_each_process_alone_is_noticed(shown, world):
    expected = outcome(world, KeepsGradients(), {})
    assert (shown["mutant"]["weights"] - expected["weights"]).abs().max() > 1e-3
    assert distance(shown["mutant"], expected) > 1e-3


# ---- the command ---------------------------------------------------------------------------------


def steps_of(run):
    """Loss and weights of every step in the log of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    rows = [[r["loss"], *(s["weight"] for s in r["sources"].values())] for r in records]
    return torch.tensor(rows)


def receive_after_step_5(number):
    """Let this process receive a signal at the end of its fifth step."""
    print_progress = training.print_progress

    def print_and_receive(record, *rest):
        print_progress(record, *rest)
        if record["step"] == 5:
            os.kill(os.getpid(), number)

    training.print_progress = print_and_receive


def stopped(world, run, number, **changes):
    """Two processes, one of which receives a signal: codes, errors, and what the first one said."""
    receives = {1: partial(receive_after_step_5, number)}
    members = group(command(options(world, run, **changes)), 2, receives)
    codes = [one.wait(100) for one in members]
    return codes, [one.error for one in members], members[0].said


def run_group(world, run, count, **changes):
    """So many processes train to the end; what the first one printed."""
    members = group(command(options(world, run, **changes)), count)
    codes = [one.wait(100) for one in members]
    assert codes == [0] * count, [one.error for one in members]
    assert not any(one.said for one in members[1:])
    return members[0].said


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_to_the_end(command(options(world, run, gradient_average=0.5)))
    return run


def assert_alike(run, alone):
    """The runs of several processes and of one: equal but for rounding, and the same directory."""
    assert (steps_of(run) - steps_of(alone)).abs().max() < 1e-3
    assert {p.name for p in run.iterdir()} == {p.name for p in alone.iterdir()}
    assert content(run)[3] == content(alone)[3]  # config, tokenizer, and checksums of the rest


@pytest.mark.slow
def test_stopped_on_two_and_resumed_on_three(world, alone, tmp_path):
    run = tmp_path / "run"
    changes = {"gradient_average": 0.5}
    codes, errors, said = stopped(world, run, signal.SIGTERM, **changes)
    assert codes == [143, 143] and errors == ["", ""] and "stopped after step 5 of 11" in said
    (checkpoint,) = run.glob("checkpoint-*")
    shards = list((checkpoint / "moments").iterdir())
    assert len(shards) == 2
    content_of_shard = shards[0].read_bytes()
    shards[0].write_bytes(content_of_shard[:-1] + b"?")
    with pytest.raises(InputError, match="moments/.* is damaged: its checksum is another"):
        check_whole(checkpoint)
    shards[0].write_bytes(content_of_shard)
    said = run_group(world, run, 3, resume=True, **changes)
    assert "processes 2, now 3" in said
    assert_alike(run, alone)


@pytest.mark.slow
def test_killed_on_two_and_resumed_on_one(world, alone, tmp_path):
    run = tmp_path / "run"
    changes = {"gradient_average": 0.5, "save_steps": 3}
    codes, errors, _ = stopped(world, run, signal.SIGKILL, **changes)
    assert codes == [2, -9]
    assert "process 0 of 2: another one has ended" in errors[0] and errors[0].count("\n") == 1
    run_to_the_end(command(options(world, run, resume=True, **changes)))
    assert_alike(run, alone)


@pytest.mark.slow
def test_stopped_on_one_and_resumed_on_two(world, halted, tmp_path):
    """Of one that ended with a checkpoint after its last step, and of its own copy."""
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(halted, run)
    shutil.copytree(halted, again)
    changes = {"save_steps": 2, "gradient_average": 0.5, "resume": True}
    assert "processes 1, now 2" in run_group(world, run, 2, **changes)
    run_to_the_end(command(options(world, again, **changes)))
    assert content(run) == content(again)


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_all(world, tmp_path):
    changes = {"learning_rate": 1e30, "save_steps": 1}
    members = group(command(options(world, tmp_path / "run", **changes)), 2)
    assert [one.wait(100) for one in members] == [1, 1]
    assert [one.error.count("\n") for one in members] == [1, 0]
    assert "is not finite; " in members[0].error


@pytest.mark.slow
def test_what_one_process_refuses_ends_all(world, alone):
    members = group(command(options(world, alone)), 2)
    assert [one.wait(100) for one in members] == [2, 2]
    assert [one.error.count("\n") for one in members] == [1, 0]
    assert "exists already" in members[0].error


def test_what_torchrun_has_not_told_is_said(world, tmp_path, monkeypatch, capsys):
    words = command(options(world, tmp_path / "run", device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "start with torchrun --nproc-per-node 2 -m minimore train" in capsys.readouterr().err
    for name, value in next(group_variables(2)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert main(words) == 2
    assert "2 processes, but 1 on this machine" in capsys.readouterr().err
    assert main(["plan", str(world[0] / "model")]) == 2
    assert "several processes can train a reward model" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(words) == 2
    assert "WORLD_SIZE is 'two'" in capsys.readouterr().err


# ---- shares and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("unit", [1, 3])
def test_shares_are_whole_and_nearly_equal(count, unit):
    tokens = np.random.default_rng(count).integers(20, 80, 12 * count * unit).tolist()
    parts = shares(tokens, unit, count)
    assert [i for part in parts for i in part] == list(range(len(tokens)))
    assert all(part.start % unit == 0 for part in parts)
    sizes = [sum(tokens[i] for i in part) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * 80 * unit


def test_there_may_be_fewer_units_than_shares():
    assert sorted(map(len, shares([5, 5], 1, 3))) == [0, 1, 1]
    assert sorted(map(len, shares([5, 5, 5], 3, 2))) == [0, 3]


@pytest.mark.parametrize(
    "recipe, batch_size, unit, message",
    [
        (Recipe("streamed"), 80, 1, "--engine streamed: 4 processes train with plain only"),
        (Recipe(moments="int8"), 80, 1, "--moments int8: 4 processes train with float32 only"),
        (Recipe(), 3, 1, "--batch-size 3: too few pairs for 4 processes; expected at least 4"),
        (Recipe(), 9, 3, "in groups of 3 for 4 processes; expected at least 12"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(recipe, batch_size, unit, message):
    check_group(recipe, batch_size, unit, 1)
    with pytest.raises(InputError, match=message):
        check_group(recipe, batch_size, unit, 4)
