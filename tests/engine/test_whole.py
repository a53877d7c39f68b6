"""MORE over all parameters: weights, update and cost, against K separate backward passes."""

import json
from functools import partial

import pytest
import torch
from counted import Products
from runs import content, options, slow_but
from shapes import FAMILIES, pairs_of, random_shapes, small_model
from test_engine import WHOLE, flat, plain_gradients, random_pairs

import minimore.training as training
from minimore.engine.host import Host
from minimore.engine.objective import NonFiniteLoss, RewardObjective
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import StreamedEngine
from minimore.engine.whole import WholeModelEngine, WholeModelStep, rows_with_products
from minimore.more import NORMALIZATIONS, more_weights, normalize_gradients
from minimore.options import InputError
from minimore.train import train

SOURCE = [0] * 4 + [1] * 5 + [2] * 3


def objective_of(sources=3, normalize="none", over_all=True):
    weigh = partial(more_weights, state={}, normalize=normalize)
    return RewardObjective(sources, weigh, over_all=over_all)


def model_of(family):
    """A small model, held and computed in float64."""
    model = small_model(FAMILIES[family]).double()
    model.trunk.compute_dtype = torch.float64
    return model


def step_of(model, pairs, source, micro_tokens=60, sources=3, normalize="none", host=None):
    objective = objective_of(sources, normalize)
    batches = objective.batches(pairs, source, micro_tokens)
    return WholeModelStep(model, batches, objective, host=host)


def gradients_of(step):
    return {name: gradient for part in step.backward() for name, gradient in part.items()}


def separately(model, pairs, source, sources=3):
    """The gradient of every source's loss in all parameters, (K, P), by K backward passes."""
    rows = []
    for k in range(sources):
        mine = [pair for pair, own in zip(pairs, source) if own == k]
        gradients = plain_gradients(model, mine, [0] * len(mine)) if mine else None
        rows.append(gradients)
    names = sorted(next(row for row in rows if row))
    zero = torch.zeros_like(flat(next(row for row in rows if row)[name] for name in names))
    return torch.stack([flat(row[n] for n in names) if row else zero for row in rows]), names


@pytest.mark.parametrize("micro_tokens", slow_but([60], [WHOLE, 60, 1]))
@pytest.mark.parametrize("family", slow_but(["gpt_neox"], FAMILIES))
def test_weights_and_gradient_are_those_of_separate_backward_passes(family, micro_tokens):
    model, pairs = model_of(family), random_pairs(len(SOURCE))
    rows, names = separately(model, pairs, SOURCE)
    step = step_of(model, pairs, SOURCE, micro_tokens)
    weights = step.forward().weights
    expected = more_weights(torch.ones(3), rows, torch.tensor([4, 5, 3]), {}, normalize="none")
    assert torch.allclose(weights, expected.double(), rtol=0, atol=1e-7)
    gradients = gradients_of(step)
    assert sorted(gradients) == names
    combined = weights.double() @ rows
    assert (flat(gradients[name] for name in names) - combined).abs().max() < 1e-9
    assert torch.allclose(combined @ rows.T, combined @ combined, atol=1e-5) or weights.min() == 0


@pytest.mark.parametrize("normalize", slow_but(["l2"], NORMALIZATIONS))
def test_every_normalization_sees_the_whole_gradients(normalize):
    model, pairs = model_of("llama"), random_pairs(len(SOURCE))
    rows, _ = separately(model, pairs, SOURCE)
    result = step_of(model, pairs, SOURCE, normalize=normalize).forward()
    margins = (result.z_chosen - result.z_rejected) @ result.head
    losses = -torch.nn.functional.logsigmoid(margins)
    losses = torch.stack([losses[torch.tensor(SOURCE) == k].mean() for k in range(3)])
    pairs_by_source = torch.tensor([4, 5, 3])
    expected = more_weights(losses, rows, pairs_by_source, {}, normalize=normalize)
    assert torch.allclose(result.weights, expected, rtol=0, atol=1e-9)


def test_rows_have_the_products():
    rows = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[3] = 2 * rows[0]  # G has no inverse
    stand_in = rows_with_products(rows @ rows.T)
    assert torch.allclose(stand_in @ stand_in.T, rows @ rows.T, atol=1e-12)
    for normalize in ("none", "l2"):
        units = normalize_gradients(rows, torch.ones(4), normalize)
        others = normalize_gradients(stand_in, torch.ones(4), normalize)
        assert torch.allclose(units @ units.T, others @ others.T, atol=1e-12)


def test_an_absent_source_has_no_weight():
    model, pairs = model_of("gpt_neox"), random_pairs(6)
    source = [0, 0, 0, 2, 2, 2]
    rows, _ = separately(model, pairs, source)
    step = step_of(model, pairs, source)
    weights = step.forward().weights
    expected = more_weights(torch.ones(2), rows[[0, 2]], torch.tensor([3, 3]), {}, normalize="none")
    assert weights[1] == 0
    assert torch.allclose(weights[[0, 2]].float(), expected, atol=1e-6)


def test_inputs_on_the_host_and_batches_in_any_order_change_nothing():
    model, pairs = model_of("llama"), random_pairs(len(SOURCE))
    step = step_of(model, pairs, SOURCE)
    weights, gradients = step.forward().weights, gradients_of(step)
    hosted = step_of(model, pairs, SOURCE, host=Host("cpu"))
    assert torch.equal(hosted.forward().weights, weights)
    for name, gradient in gradients_of(hosted).items():
        assert torch.equal(gradient, gradients[name]), name
    order = [0, 4, 9, 1, 5, 10, 2, 6, 11, 3, 7, 8]
    mixed = step_of(model, [pairs[i] for i in order], [SOURCE[i] for i in order])
    assert torch.allclose(mixed.forward().weights, weights, atol=1e-12)
    for name, gradient in gradients_of(mixed).items():
        assert torch.allclose(gradient, gradients[name], atol=1e-12), name


@pytest.mark.parametrize("family", slow_but(["gpt_neox"], ["gpt_neox", "gemma3"]))
def test_it_costs_at_most_seven_quarters_of_a_step(family):
    """Matrix products as torch computes them. Those of G itself are a thousandth of a step."""

    def products(engine_class, over_all):
        model, optimizer = small_model(FAMILIES[family]), AdamW()
        optimizer.adopt_all(model)
        engine = engine_class(model, optimizer, Recipe("streamed", recompute="full"))
        pairs = pairs_of(random_shapes(48))
        with Products() as counted:
            engine.step(pairs, [0] * 24 + [1] * 24, objective_of(2, over_all=over_all))
        return counted.total

    ratio = products(WholeModelEngine, True) / products(StreamedEngine, False)
    assert 1.6 < ratio <= 1.75 * 1.001


def test_a_loss_that_is_not_finite_names_its_source():
    model, pairs = model_of("gpt_neox"), random_pairs(len(SOURCE))
    with torch.no_grad():
        model.head.mul_(torch.inf)
    with pytest.raises(NonFiniteLoss) as error:
        step_of(model, pairs, SOURCE).forward()
    assert error.value.source == 0


# ---- the command ---------------------------------------------------------------------------------

WHOLE_MODEL = {"lambda_gradients": "all", "engine": "streamed", "recompute": "full"}


def first_record(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_run_has_other_weights_than_by_the_head_and_resumes_bitwise(world, tmp_path, monkeypatch):
    whole, half, head = tmp_path / "whole", tmp_path / "half", tmp_path / "head"
    changes = {"save_steps": 2, "normalize": "none"} | WHOLE_MODEL
    assert train(options(world, whole, **changes)) == 0
    assert train(options(world, head, **changes | {"lambda_gradients": "head"})) == 0
    first = {run: first_record(run) for run in (whole, head)}
    by_head = [row["head_weight"] for row in first[whole]["sources"].values()]
    assert by_head == pytest.approx([row["weight"] for row in first[head]["sources"].values()])
    weights = [row["weight"] for row in first[whole]["sources"].values()]
    assert max(abs(a - b) for a, b in zip(weights, by_head)) > 0.01
    assert "head_weight" not in next(iter(first[head]["sources"].values()))

    real = training.Schedule.sampled_at

    def sampled_at(schedule, step):
        if step == 4:
            raise RuntimeError("crash")
        return real(schedule, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Schedule, "sampled_at", sampled_at)
        with pytest.raises(RuntimeError, match="crash"):
            train(options(world, half, **changes))
    assert train(options(world, half, resume=True, **changes)) == 0
    assert content(half) == content(whole)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"engine": "plain"}, "needs --engine streamed and --recompute full"),
        ({"recompute": None}, "needs --engine streamed and --recompute full"),
        ({"method": "uniform"}, "goes with --method more"),
        ({"gradient_average": 0.5}, "--gradient-average 1"),
        ({"lambda_scope": "group"}, "--lambda-scope step"),
        ({"train": "last-1"}, "leave out --train"),
        ({"memory": "0.5MB"}, "--memory 0.5MB: the weights of the sources take .* expected more"),
    ],
)
def test_what_does_not_go_together_is_refused(world, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        train(options(world, tmp_path / "run", **WHOLE_MODEL | changes))
    assert not (tmp_path / "run").exists()
