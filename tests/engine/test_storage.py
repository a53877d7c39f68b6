"""After a training, exact storage is exact to the bit, and lossy storage ends where fp32 ends.

bench/lossy.py compares the two with whole models in the synthetic world.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from minimore.data.pairs import load_source
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.engine import optim
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import AdamW, split
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import open_engine
from minimore.more import more_weights
from minimore.reward import ModelOptions, open_reward_model

SOURCES, BATCH, STEPS, RATE = 3, 9, 30, 2e-3
EXACT, LOSSY = ("float32", "float32"), ("bfloat16", "int8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The directory of a model, and the pairs of three sources."""
    home = tmp_path_factory.mktemp("world")
    names, per_source = ("ana", "ben", "cleo"), STEPS * BATCH // SOURCES
    paths = World(annotators=names, train_pairs=(per_source,), test_pairs=20).write(home)
    _, checkpoint = open_reward_model(ModelOptions(model=str(home / "model")))
    sources = [
        load_source(name, str(train), checkpoint.tokenizer, max_length=64).pairs
        for name, (train, _) in paths.items()
    ]
    return home / "model", sources


def fresh_model(directory):
    return open_reward_model(ModelOptions(model=str(directory)))[0]


def steps_of(sources):
    """Pairs and their sources, step by step."""
    sizes = [len(pairs) for pairs in sources]
    for sampled in epoch_steps(sizes, "equal", None, BATCH, 0, 0):
        yield [sources[k][i] for k, i in sampled], sampled[:, 0].tolist()


def objective():
    return RewardObjective(SOURCES, partial(more_weights, state={}))


# ---- exact storage -------------------------------------------------------------------------------


def trained_with_split(directory, sources):
    """The fp32 numbers of every parameter, stored in two halves, after a training."""
    model, optimizer = fresh_model(directory), AdamW("split")
    optimizer.adopt_all(model)
    optimizer.learning_rate = RATE
    engine = open_engine(model, optimizer, Recipe("streamed", "split", recompute="full"))
    for pairs, source in steps_of(sources):
        engine.step(pairs, source, objective())
    return {name: optimizer.value(name, p) for name, p in model.named_parameters()}


class MasterAdamW(AdamW):
    """An fp32 master, of which the model holds copies: matrices rounded to bf16, in fp32."""

    def adopt_all(self, model):
        self.master = {
            name: self.adopt(name, p.detach().clone()) for name, p in model.named_parameters()
        }

    def update(self, name, p, gradient, state=None):
        super().update(name, self.master[name], gradient)

    def copy_to(self, model):
        for name, p in model.named_parameters():
            value = self.master[name]
            if value.ndim > 1:
                high, _ = split(value.flatten())
                value = high.float().view(value.shape)
            p.data = value.clone()


def trained_with_master(directory, sources):
    """An fp32 master after the same training by the plain engine, which computes with copies."""
    model, optimizer = fresh_model(directory), MasterAdamW()
    optimizer.adopt_all(model)
    optimizer.learning_rate = RATE
    engine = PlainEngine(model, optimizer, Recipe())
    for pairs, source in steps_of(sources):
        optimizer.copy_to(model)
        engine.step(pairs, source, objective())
    return optimizer.master


@pytest.mark.slow
def test_split_is_bitwise_an_fp32_master_with_rounded_copies(world):
    directory, sources = world
    values = trained_with_split(directory, sources)
    for name, expected in trained_with_master(directory, sources).items():
        assert torch.equal(values[name], expected), name
    start = dict(fresh_model(directory).named_parameters())
    moved = torch.cat([(values[name] - start[name]).flatten() for name in values]).abs()
    assert moved.median() > 2e-3  # it did train


# ---- lossy storage -------------------------------------------------------------------------------


def preferences(count, generator):
    """Differences of inputs (count, 32), each turned to the side that a hidden rule prefers."""
    rule = torch.randn(32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, 32, generator=generator)
    likes = torch.rand(count, generator=generator) < torch.sigmoid(x @ rule)
    return torch.where(likes[:, None], x, -x)


def trained_network(parameters, moments, seed):
    """Accuracy and loss on held-out pairs of a small network after 300 small steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamW(parameters, moments, seed=seed)
    optimizer.learning_rate = 2e-4  # a third of the distance of two bf16 numbers at .2
    shapes = {"inner": (32, 32), "outer": (32, 1)}
    held = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) / shape[0] ** 0.5
        held[name] = optimizer.adopt(name, value)
    for _ in range(300):
        inner, outer = (p.float().requires_grad_() for p in held.values())
        loss = network_loss(inner, outer, preferences(64, generator)).mean()
        for name, gradient in zip(held, torch.autograd.grad(loss, [inner, outer])):
            optimizer.update(name, held[name], gradient)
        optimizer.steps += 1
    losses = network_loss(*(p.float() for p in held.values()), preferences(4000, generator))
    return (losses < math.log(2)).float().mean().item(), losses.mean().item()


def network_loss(inner, outer, x):
    """Bradley-Terry losses of a network's rewards: an odd one, so that r(-x) = -r(x)."""
    return torch.nn.functional.softplus(-(torch.tanh(x @ inner) @ outer)).squeeze(1)


def trained_networks(parameters, moments, seeds=3):
    return np.array([trained_network(parameters, moments, seed) for seed in range(seeds)])


@pytest.mark.slow
def test_random_rounding_ends_where_fp32_ends(monkeypatch):
    """Means over seeds within half a standard deviation; rounding to the nearest ends elsewhere."""
    exact, lossy = (trained_networks(*storage) for storage in (EXACT, LOSSY))
    monkeypatch.setattr(optim, "round_at_random", lambda x, bits: x.bfloat16())
    nearest = trained_networks(*LOSSY)
    spread = exact.std(0, ddof=1)
    assert (np.abs(exact.mean(0) - lossy.mean(0)) <= spread / 2).all(), (exact, lossy)
    assert not np.array_equal(exact, lossy)
    assert (np.abs(exact.mean(0) - nearest.mean(0)) > spread).all(), (exact, nearest)
