"""Several processes train as one: the same gradients and weights, whoever dies or resumes."""

import json
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import KeepsGradients
from processes import FORKS, group, group_variables, run_to_the_end
from runs import command, content, options

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
from minimore.reward import ModelOptions, open_reward_model

K = 3
CASES = {  # of one step; pairs: how many of the twelve it has
    "one micro-batch": {},
    "several, unequal": {"micro_tokens": 60},
    "each pair alone": {"micro_tokens": 1},
    "fewer pairs than processes": {"pairs": 1},
    "groups": {"scope": "group", "micro_tokens": 150},
    "uniform": {"method": "uniform", "micro_tokens": 60},
    "group_dro": {"method": "group_dro"},
    "recomputed": {"recompute": "full", "micro_tokens": 60},
    "selective": {"recompute": "selective"},
    "votes and weights": {"labels": True},
    "clipped": {"max_grad_norm": 1e-3},
}


# ---- one step in float64 -------------------------------------------------------------------------


def open_float64(world, labels=False, pairs=12):
    """The untrained model in float64, and pairs of the three sources in turn."""
    directory, paths = world
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    model.double().trunk.compute_dtype = torch.float64
    sources = [load_source(n, str(a), checkpoint.tokenizer, 64) for n, (a, _) in paths.items()]
    items = [s.pairs[i] for i in range(4) for s in sources][:pairs]
    if labels:
        rows = [Label(0.5 + 0.04 * i, 3.0, 0.1 * i, 1.0 + i) for i in range(12)]
        items = [pair._replace(label=label) for pair, label in zip(items, rows)]
    return model, items, [0, 1, 2] * 4


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
        result = engine.step(items, source[: len(items)], objective)
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
    """What each process does: every case, then a mutant; the first one stores what it saw."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shown = {name: outcome(world, KeepsWholeGradients(), case) for name, case in CASES.items()}
    shown["trained"] = outcome(world, sharded_optimizer(), {"micro_tokens": 60}, steps=3)
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda t, *a: t if t.ndim == 2 else all_reduce(t, *a)
    shown["mutant"] = outcome(world, KeepsWholeGradients(), {})
    if dist.get_rank() == 0:
        torch.save(shown, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def shown(request, world, tmp_path_factory):
    """What so many processes saw, by case."""
    path = tmp_path_factory.mktemp("shown") / "shown.pt"
    forks = [
        FORKS.Process(target=work, args=(world, v, path)) for v in group_variables(request.param)
    ]
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


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_weights_are_those_of_one_process(shown, world, case):
    expected = outcome(world, KeepsGradients(), CASES[case])
    assert expected["weights"].dtype == torch.float64
    assert distance(shown[case], expected) < 1e-12


def test_three_updates_are_those_of_one_process(shown, world):
    optimizer = AdamW(weight_decay=0.1)
    optimizer.learning_rate = 1e-3
    expected = outcome(world, optimizer, {}, steps=3)
    assert distance(shown["trained"], expected) < 1e-9


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


def stopped(world, run, number, member, **changes):
    """Two processes, one of which receives a signal after four steps: codes, and what they said."""
    members = group(command(options(world, run, **changes)), 2)
    log = run / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 4):
        assert members[0].is_running, members[0].error
        time.sleep(0.01)
    members[member].signal(number)
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
    run_to_the_end(command(options(world, run, epochs=3, gradient_average=0.5)))
    return run


def assert_alike(run, alone):
    """The runs of several processes and of one: equal but for rounding, and the same directory."""
    assert (steps_of(run) - steps_of(alone)).abs().max() < 1e-3
    assert {p.name for p in run.iterdir()} == {p.name for p in alone.iterdir()}
    assert content(run)[3] == content(alone)[3]  # config, tokenizer, and checksums of the rest


def test_stopped_on_two_and_resumed_on_three(world, alone, tmp_path):
    run = tmp_path / "run"
    changes = {"epochs": 3, "gradient_average": 0.5}
    codes, errors, said = stopped(world, run, signal.SIGTERM, member=1, **changes)
    assert codes == [143, 143] and errors == ["", ""] and "saved; the same command" in said
    (checkpoint,) = run.glob("checkpoint-*")
    assert len(list((checkpoint / "moments").iterdir())) == 2
    said = run_group(world, run, 3, resume=True, **changes)
    assert "processes 2, now 3" in said
    assert_alike(run, alone)


def test_killed_on_two_and_resumed_on_one(world, alone, tmp_path):
    run = tmp_path / "run"
    changes = {"epochs": 3, "gradient_average": 0.5, "save_steps": 3}
    codes, errors, _ = stopped(world, run, signal.SIGKILL, member=1, **changes)
    assert codes == [2, -9]
    assert "process 0 of 2: another one has ended" in errors[0] and errors[0].count("\n") == 1
    run_to_the_end(command(options(world, run, resume=True, **changes)))
    assert_alike(run, alone)


def test_stopped_on_one_and_resumed_on_two(world, halted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(halted, run)
    ...


def test_what_one_process_refuses_ends_all(world, alone):
    members = group(command(options(world, alone)), 2)
    assert [one.wait(100) for one in members] == [2, 2]
    assert [one.error.count("\n") for one in members] == [1, 0]
    assert "exists already" in members[0].error
