"""One step of the plain engine against its definition."""

from functools import partial

import pytest
import torch
from conftest import KeepsGradients
from runs import slow_but

from minimore.data.pairs import load_source, pack_pairs
from minimore.engine.objective import NonFiniteLoss, RewardObjective
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.model.recompute import RECOMPUTE
from minimore.more import WEIGHTINGS, more_loss, pair_losses
from minimore.reward import ModelOptions, open_reward_model

K = 3


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
@pytest.mark.parametrize("method", slow_but(["more"], WEIGHTINGS))
def test_micro_batches_equal_one_batch(float64, method, scope, sampling, source):
    if scope == "group" and sampling != "equal":
        pytest.skip("a group needs equal sampling: refused by check_options")
    model, pairs, _ = float64
    results = []
    for micro_tokens in (10**9, 150, 1):
        _, z_chosen, _, weights, loss = run_step(
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


def test_an_infinite_margin_is_found_although_its_loss_is_zero(float64):
    """z and head are finite, their product is not.

    The loss of a pair that is won by infinity is 0, but its gradient is 0 x infinity.
    """
    model, pairs, source = float64
    model.trunk.final_norm.weight.data.fill_(1e200)
    model.head.data.fill_(1e150)
    with pytest.raises(NonFiniteLoss):
        run_step(model, pairs, source)


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
