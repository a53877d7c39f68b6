"""300 steps on the world: what is exact is so to the bit, what rounds at random ends where fp32 ends."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from minimore.data.pairs import load_source
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW, split
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.more import more_weights
from minimore.reward import ModelOptions, open_reward_model
from minimore.train import TrainOptions, train

K, STEPS, RATE = 3, 300, 2e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, World(
        annotators=("ana", "ben", "cleo"), train_pairs=(STEPS * 3,) * K, test_pairs=200
    ).write(directory)


@pytest.fixture(scope="module")
def steps(world):
    """A function that gives a fresh model, and the pairs of 300 steps of 9."""
    directory, paths = world
    opened = lambda: open_reward_model(ModelOptions(model=str(directory / "model")))
    sources = [load_source(n, str(a), opened()[1].tokenizer, 64) for n, (a, _) in paths.items()]
    chosen = epoch_steps([len(s.pairs) for s in sources], "equal", None, 3 * K, 0, 0)
    assert len(chosen) == STEPS
    return lambda: opened()[0], [
        ([sources[k].pairs[i] for k, i in c], c[:, 0].tolist()) for c in chosen
    ]


def how():
    return RewardObjective(K, partial(more_weights, state={}))


def test_split_is_bitwise_an_fp32_master_with_rounded_copies(steps):
    fresh, batches = steps
    model, optimizer = fresh(), AdamW("split")
    optimizer.adopt_all(model)
    engine, optimizer.learning_rate = (
        open_engine(model, optimizer, Recipe("streamed", "split", recompute="full")),
        RATE,
    )
    for pairs, source in batches:
        engine.step(pairs, source, how())
    found = {name: optimizer.value(name, p) for name, p in model.named_parameters()}

    reference, exact = fresh(), AdamW()
    master = {
        name: exact.adopt(name, p.detach().clone()) for name, p in reference.named_parameters()
    }
    plain, exact.learning_rate = PlainEngine(reference, AdamW(), Recipe()), RATE
    plain.optimizer.update = lambda name, p, gradient: exact.update(name, master[name], gradient)
    for pairs, source in batches:
        for name, p in reference.named_parameters():
            p.data = (
                split(master[name].flatten())[0].float().view(p.shape)
                if p.ndim > 1
                else master[name].clone()
            )
        plain.step(pairs, source, how())
        exact.steps += 1
    for name, value in found.items():
        assert torch.equal(value, master[name]), name
    moved = torch.cat([(found[name] - p).flatten() for name, p in fresh().named_parameters()]).abs()
    assert moved.median() > 2e-3  # it did train


def test_random_rounding_ends_where_fp32_ends(world, tmp_path):
    """Means over 5 seeds, of the head and of the order of the data, within 2 pooled standard deviations; for every figure of the report."""
    directory, paths = world
    found = {}
    for name, recipe in {
        "fp32": {},
        "lossy": dict(engine="streamed", parameters="bfloat16", moments="int8", recompute="full"),
    }.items():
        reports = []
        for seed in range(5):
            run = tmp_path / f"{name}-{seed}"
            train(
                TrainOptions(
                    model=str(directory / "model"),
                    output=str(run),
                    source=tuple(f"{n}={a},{b}" for n, (a, b) in paths.items()),
                    seed=seed,
                    batch_size=3 * K,
                    learning_rate=RATE,
                    log_steps=1000,
                    save_steps=1000,
                    **recipe,
                )
            )
            mean = json.loads((run / "evaluation.json").read_text())["mean"]
            reports.append([mean[figure] for figure in ("accuracy", "nll", "ece")])
        found[name] = np.array(reports)
    exact, lossy = found["fp32"], found["lossy"]
    pooled = np.sqrt((exact.var(0, ddof=1) + lossy.var(0, ddof=1)) / 2)
    assert (np.abs(exact.mean(0) - lossy.mean(0)) <= 2 * pooled).all(), (exact, lossy)
    assert (exact[:, 0] > 0.6).all() and not np.array_equal(exact, lossy)
