"""The preference objective: log-probabilities, gradients, and both engines."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import write_checkpoint
from reference import reference_model

from minimore.alignment.language import Responses
from minimore.alignment.policy import open_policy
from minimore.alignment.preference import (
    Comparison,
    PreferenceObjective,
    response_log_probabilities,
    shift_gradients,
)
from minimore.alignment.preference_losses import LOSSES, PreferenceLoss
from minimore.alignment.references import log_probabilities
from minimore.engine.optim import AdamW
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import StreamedEngine
from minimore.more import WEIGHTINGS, min_norm_weights
from minimore.reward import ModelOptions

RESPONSES = {"dpo": 2, "mrpo": 2, "bapo": 3, "spo": 4}
REFERENCES = {"mrpo": 2}


def comparisons(loss, count=6, seed=0):
    """Made up: random ids, and references that are random, too."""
    g = torch.Generator().manual_seed(seed)

    def ids(most):
        length = int(torch.randint(1, most, (1,), generator=g))
        return torch.randint(3, 90, (length,), generator=g).tolist()

    items = []
    for _ in range(count):
        texts = Responses(ids(6), [ids(9) for _ in range(RESPONSES[loss])])
        shape = REFERENCES.get(loss, 1), RESPONSES[loss]
        items.append(Comparison(texts, -30 * torch.rand(shape, generator=g).double()))
    return items


def double(model):
    """A copy, held and computed in float64."""
    model = copy.deepcopy(model).double()
    model.trunk.compute_dtype = torch.float64
    return model


def objective(loss, method="proportional", sources=2, **changes):
    weigh = partial(WEIGHTINGS[method], state={})
    return PreferenceObjective(sources, PreferenceLoss(loss, 0.2, **changes), weigh, method)


@pytest.fixture(scope="module")
def tied_and_untied(transformers, tmp_path_factory):
    models = {}
    for tied in (True, False):
        home = tmp_path_factory.mktemp("model")
        theirs = reference_model("gpt_neox", head="ForCausalLM", tie_word_embeddings=tied)
        checkpoint = write_checkpoint(theirs, home / "model")
        options = ModelOptions(model=str(home / "model"))
        models[tied] = open_policy(checkpoint, options), theirs
    return models


def test_log_probabilities_are_those_of_transformers(tied_and_untied):
    model, theirs = tied_and_untied[False]
    items = [item.texts for item in comparisons("spo")]
    ours = log_probabilities(model, items, micro_tokens=30)
    for item, row in zip(items, ours):
        for response, ours_of_response in zip(item.responses, row):
            with torch.no_grad():
                logits = theirs(torch.tensor([item.prompt + response])).logits[0]
            logits = logits[len(item.prompt) - 1 : -1]
            expected = -F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            assert ours_of_response.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_log_probabilities_are_autograds(monkeypatch):
    """In float64 to 1e-10, in several chunks, and twice on one graph."""
    monkeypatch.setattr("minimore.alignment.preference.CHUNK", 4)
    g = torch.Generator().manual_seed(0)
    states = torch.randn(11, 5, generator=g, dtype=torch.float64).requires_grad_()
    unembedding = torch.randn(7, 5, generator=g, dtype=torch.float64).requires_grad_()
    targets, lengths = torch.randint(7, (11,), generator=g), [3, 1, 7]
    ours = response_log_probabilities(states, unembedding, targets, lengths)
    by_token = (states @ unembedding.T).log_softmax(1)[torch.arange(11), targets]
    theirs = torch.stack([part.sum() for part in by_token.split(lengths)])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    slopes = torch.randn(3, generator=g, dtype=torch.float64)
    expected = torch.autograd.grad(theirs @ slopes, [states, unembedding])
    for _ in range(2):
        gradients = torch.autograd.grad(ours @ slopes, [states, unembedding], retain_graph=True)
        for gradient, other in zip(gradients, expected):
            torch.testing.assert_close(gradient, other, atol=1e-10, rtol=0)


def test_shift_gradients_are_those_of_a_shift():
    """δ as a parameter, one backward pass a source."""
    g = torch.Generator().manual_seed(1)
    states = torch.randn(9, 4, generator=g, dtype=torch.float64).requires_grad_()
    unembedding = torch.randn(6, 4, generator=g, dtype=torch.float64)
    targets, source = torch.randint(6, (9,), generator=g), torch.tensor([0, 0, 2] * 3)
    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def losses_of(s):
        by_token = (s @ unembedding.T).log_softmax(1)[torch.arange(9), targets]
        losses = [torch.tanh(by_token[source == k]).sum() for k in range(3)]
        return torch.stack(losses)

    gradients = shift_gradients(losses_of(states), states, source)
    for k in range(3):
        (expected,) = torch.autograd.grad(losses_of(states + shift)[k], shift, allow_unused=True)
        torch.testing.assert_close(gradients[k], expected, atol=1e-10, rtol=0)
    assert gradients[1].abs().max() == 0  # it has no state


def test_min_norm_weights_keep_their_promise_for_the_shift(tied_and_untied):
    """A small step of δ along the mean of the gradients raises no source's loss."""
    model, _ = tied_and_untied[False]
    model = double(model)
    source = [0, 1, 2, 0, 1, 2]
    seen = {}

    def weigh(losses, gradients, pairs):
        seen.update(losses=losses.detach(), gradients=gradients)
        return min_norm_weights(gradients)

    more = PreferenceObjective(3, PreferenceLoss("dpo", 0.2), weigh, "more")
    (batch,) = more.batches(comparisons("dpo"), source, 10**6)
    states = model.trunk.states_at(batch.stream, batch.reads)
    more.loss(model.unembedding, states, [batch])
    before, gradients = seen["losses"], seen["gradients"]
    step = min_norm_weights(gradients) @ gradients
    assert step.norm() > 1e-3
    more.loss(model.unembedding, states - 1e-6 * step, [batch])
    assert (seen["losses"] < before).all()


# ---- both engines --------------------------------------------------------------------------------


def trained(model, engine, recipe, loss, method, steps=3):
    model = double(model)
    optimizer = AdamW()
    optimizer.adopt_all(model)
    optimizer.learning_rate = 1e-2
    engine = engine(model, optimizer, Recipe(**recipe))
    own = objective(loss, method)
    results = []
    for step in range(steps):
        items, source = comparisons(loss, seed=step), [0, 1, 1, 0, 1, 0]
        results.append(engine.step(items, source, own))
    return dict(model.named_parameters()), results


@pytest.mark.parametrize("method, tied", [("proportional", True), ("more", False)])
@pytest.mark.parametrize("loss", LOSSES)
def test_streamed_steps_are_plain_steps(tied_and_untied, loss, method, tied):
    """Also where a step is several micro-batches, which `more` weights together."""
    model, _ = tied_and_untied[tied]
    expected, results = trained(model, PlainEngine, {}, loss, method)
    for engine, recipe in (
        (PlainEngine, {"micro_tokens": 40}),
        (StreamedEngine, {"engine": "streamed", "micro_tokens": 40, "recompute": "full"}),
    ):
        parameters, others = trained(model, engine, recipe, loss, method)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], atol=1e-9, rtol=0)
        for result, other in zip(results, others):
            for ours, theirs in zip(result, other):
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_a_step_are_those_of_autograd(tied_and_untied, loss):
    """The objective against transformers' way: whole log-softmax, response by response."""
    model, _ = tied_and_untied[False]
    model = double(model)
    items = comparisons(loss)
    own = objective(loss, sources=1)
    (batch,) = own.batches(items, [0] * len(items), 10**6)
    value, result = own.loss(
        model.unembedding, model.trunk.states_at(batch.stream, batch.reads), [batch]
    )
    parameters = list(model.parameters())
    ours = torch.autograd.grad(value, parameters)
    policy = []
    for item in items:
        for response in item.texts.responses:
            (one,) = own.batches(
                [item._replace(texts=Responses(item.texts.prompt, [response]))], [0], 10**6
            )
            log_p = model.logits(model.trunk.states_at(one.stream, one.reads)).log_softmax(1)
            policy.append(log_p.gather(1, torch.tensor(response)[:, None]).sum())
    policy = torch.stack(policy).view(len(items), -1)
    reference = torch.stack([item.reference for item in items], 1)
    losses = own.loss_of_pairs.losses(policy, reference)
    torch.testing.assert_close(result.losses, losses.detach(), atol=1e-10, rtol=0)
    theirs = torch.autograd.grad(losses.mean(), parameters)
    for gradient, other in zip(ours, theirs):
        torch.testing.assert_close(gradient, other, atol=1e-10, rtol=1e-10)
