"""The language objective: its gradients are transformers', by both engines and every storage."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import KeepsGradients, write_checkpoint
from counted import PeakBytes
from reference import SIZES, reference_model
from runs import slow_but

from minimore.alignment import language
from minimore.alignment.language import LanguageObjective, Responses
from minimore.alignment.policy import LanguageModel
from minimore.engine.memory import memory_of
from minimore.engine.optim import AdamW
from minimore.engine.recipe import MOMENTS, PARAMETERS, Recipe
from minimore.engine.streamed import open_engine
from minimore.engine.workload import Workload, tokens_of
from minimore.model.families import FAMILIES, fuse_rows, name_table
from minimore.model.recompute import RECOMPUTE

ITEMS = [
    Responses([5, 6, 7], [[8, 9, 10, 2]]),
    Responses([11], [[12], [13, 14, 2]]),
    Responses(list(range(20, 45)), [[3, 4, 2], [5, 2], list(range(50, 70))]),
    Responses([1, 2], [[299]]),
]
SOURCE = [0] * len(ITEMS)


def opened(theirs, directory, dtype=torch.float64):
    checkpoint = write_checkpoint(theirs, directory)
    trunk, _ = checkpoint.load(dtype)
    trunk.compute_dtype = dtype
    return LanguageModel(trunk, checkpoint.unembedding(trunk))


def gradients(model, recipe):
    """The gradient of every parameter by an engine, and its result."""
    optimizer = KeepsGradients()
    result = open_engine(model, optimizer, recipe).step(ITEMS, SOURCE, LanguageObjective())
    return optimizer.gradients, result


def assert_near(gradient, expected, exact):
    # What does not count, such as the bias of a key, has a gradient of rounding errors.
    assert (gradient - expected).norm() < exact * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", slow_but(["gpt_neox", "gemma3_text"], SIZES))
def test_gradients_are_those_of_transformers(transformers, tmp_path, family, tied):
    """Every text on its own, in float64; transformers' own loss would be taken in fp32."""
    theirs = reference_model(family, head="ForCausalLM", tie_word_embeddings=tied).double()
    ours = opened(theirs, tmp_path)
    count = sum(len(r) for item in ITEMS for r in item.responses)
    total = 0.0
    for prompt, responses in ITEMS:
        for response in responses:
            logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            loss = F.cross_entropy(logits, torch.tensor(response), reduction="sum") / count
            loss.backward()
            total += loss.item()
    found, result = gradients(ours, Recipe())
    # transformers computes an RMSNorm in fp32 even in a model of float64.
    exact = 1e-9 if theirs.config.model_type in ("gpt_neox", "opt") else 1e-5
    assert result.loss.item() == pytest.approx(total, rel=exact) and result.targets == count
    family = FAMILIES[theirs.config.model_type]
    groups = family.groups_of(ours.trunk.c)
    compared = [] if tied else ["output"]
    if not tied:
        assert_near(found["output"], theirs.get_output_embeddings().weight.grad, exact)
    for key, names in name_table(family, ours.trunk).items():
        parts = [found[f"trunk.{name}"] for name in names]
        gradient = parts[0] if len(parts) == 1 else fuse_rows(parts, groups)
        if family.is_transposed(key):
            gradient = gradient.T
        assert_near(gradient, theirs.get_parameter(family.prefix + key).grad, exact)
        compared += [f"trunk.{name}" for name in names]
    assert sorted(compared) == sorted(found)


@pytest.mark.parametrize("recompute", slow_but(["full"], RECOMPUTE))
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_gradients_are_plain_ones(transformers, tmp_path, tied, recompute):
    theirs = reference_model("llama", head="ForCausalLM", tie_word_embeddings=tied).double()
    expected, result = gradients(opened(theirs, tmp_path), Recipe())
    for micro_tokens in (10**6, 20):
        for engine in ("plain", "streamed"):
            recipe = Recipe(engine, recompute=recompute, micro_tokens=micro_tokens)
            found, other = gradients(opened(theirs, tmp_path), recipe)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
            torch.testing.assert_close(other.loss, result.loss, rtol=1e-9, atol=0)
            assert other.targets == result.targets


def test_chunks_change_nothing(transformers, tmp_path, monkeypatch):
    theirs = reference_model("llama", head="ForCausalLM").double()
    expected, result = gradients(opened(theirs, tmp_path), Recipe())
    monkeypatch.setattr(language, "CHUNK", 5)
    found, other = gradients(opened(theirs, tmp_path), Recipe())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.loss, result.loss)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_steps_lower_the_loss_with_every_storage(transformers, tmp_path, tied):
    """Plain fp32, and streamed with every storage, offloaded or not: all learn the same texts."""
    theirs = reference_model("gpt_neox", head="ForCausalLM", tie_word_embeddings=tied)
    losses = {}
    recipes = [Recipe()]
    for parameters, moments in zip(PARAMETERS, MOMENTS, strict=True):
        recipes.append(Recipe("streamed", parameters, moments, "full"))
    recipes.append(replace(recipes[-1], offload=("inputs", "states")))
    for recipe in recipes:
        model = opened(theirs, tmp_path, torch.float32)
        optimizer = AdamW(recipe.parameters, recipe.moments)
        optimizer.adopt_all(model)
        engine = open_engine(model, optimizer, recipe)
        optimizer.learning_rate = 3e-3
        steps = [engine.step(ITEMS, SOURCE, LanguageObjective()).loss.item() for _ in range(12)]
        losses[recipe] = steps[-1]
        assert steps[-1] < steps[0] - 1
    plain = losses[Recipe()]
    assert losses[Recipe("streamed", "float32", "float32", "full")] == pytest.approx(
        plain, rel=1e-3
    )
    assert all(loss == pytest.approx(plain, rel=0.2) for loss in losses.values())


def test_pack_by_hand():
    batch = language.pack_responses(ITEMS[:2])
    assert batch.stream.tokens.tolist() == [5, 6, 7, 8, 9, 10, 2, 11, 12, 13, 14, 2]
    assert batch.reads.tolist() == [2, 3, 4, 5, 7, 7, 9, 10]
    assert batch.targets.tolist() == [8, 9, 10, 2, 12, 13, 14, 2]


@pytest.mark.parametrize("tied", slow_but([True], [True, False]))
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(recompute="full"),
        Recipe("streamed", recompute="full"),
        Recipe("streamed", "split", "int8", "full"),
        Recipe("streamed", recompute="none", micro_tokens=600),
    ],
    ids=str,
)
def test_the_memory_of_a_step_is_planned(transformers, tmp_path, tied, recipe):
    """At least what is taken, and at most a tenth more, though the vocabulary is most of it."""
    changes = {"tie_word_embeddings": tied, "vocab_size": 8000}
    model = opened(reference_model("llama", head="ForCausalLM", **changes), tmp_path, torch.float32)
    optimizer = AdamW(recipe.parameters, recipe.moments)
    optimizer.adopt_all(model)
    engine, config = open_engine(model, optimizer, recipe), model.trunk.c
    generator = torch.Generator().manual_seed(0)

    def ids(least, most):
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(5, 300, (length,), generator=generator).tolist()

    items = [Responses(ids(3, 20), [ids(20, 40)]) for _ in range(40)]
    shapes = tuple((len(prompt), *map(len, responses)) for prompt, responses in items)
    work = Workload(shapes, 1, tokens_of(shapes), "tied" if tied else "untied")
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with PeakBytes([*model.parameters(), *states]) as measured:
        engine.step(items, [0] * len(items), LanguageObjective())
    planned = memory_of(config, work, recipe, 4, False)
    assert planned.phase == "loss"
    assert measured.peak <= planned.peak <= 1.1 * measured.peak
