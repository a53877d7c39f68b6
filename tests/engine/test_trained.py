"""What is frozen stays as it is and costs nothing; what is trained is trained as if alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GOLDENS, KeepsGradients, open_model, write_checkpoint
from counted import PeakBytes, Products
from reference import reference_model
from runs import content, options, slow_but
from safetensors.torch import load_file
from shapes import FAMILIES, PAPER, PYTHIA, pairs_of, random_shapes, small_model
from torch.autograd.graph import saved_tensors_hooks

import minimore.training as training
from minimore.alignment.language import LanguageObjective, Responses
from minimore.alignment.policy import LanguageModel
from minimore.alignment.preference import Comparison, PreferenceObjective
from minimore.alignment.preference_losses import PreferenceLoss
from minimore.cli import main
from minimore.data.pairs import pack_pairs
from minimore.engine.activations import block_activations
from minimore.engine.flops import forward_flops, step_flops
from minimore.engine.memory import memory_of
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW
from minimore.engine.recipe import Recipe
from minimore.engine.sizes import (
    parameter_bytes,
    parameter_shapes,
    states_of_parts,
    trained_parameters,
)
from minimore.engine.streamed import StreamedStep, open_engine, parts_of
from minimore.engine.trained import freeze, frozen_blocks, is_trained
from minimore.engine.workload import Workload, tokens_of
from minimore.more import WEIGHTINGS, more_loss, uniform_weights
from minimore.options import InputError
from minimore.run import stored_recipe
from minimore.train import train

SOURCE = [0, 1, 2] * 4
PARTS = ("head", "last-1", "last-2")  # of models of two blocks, or more


def narrow(family):
    """A model of this family with little to compute."""
    config = FAMILIES[family]
    width = {"width": 32, "heads": 2, "head_width": 16, "mlp_width": 48, "vocabulary": 60}
    kv_heads = min(2, config.kv_heads)
    rotary_width = min(16, config.rotary_width)
    return replace(config, **width, kv_heads=kv_heads, rotary_width=rotary_width)


def double(model):
    model = model.double()
    model.trunk.compute_dtype = torch.float64
    return model


def more_objective(sources=3):
    return RewardObjective(sources, partial(WEIGHTINGS["more"], state={}))


def names_trained(model, part):
    """By hand: the head, and for last-N the final norm and N blocks."""
    blocks = len(model.trunk.blocks)
    prefixes = ["head"]
    if part != "head":
        first = blocks - int(part[-1])
        prefixes += ["trunk.final_norm.", *(f"trunk.blocks.{i}." for i in range(first, blocks))]
    return [name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))]


# ---- gradients -----------------------------------------------------------------------------------


def by_autograd(model, names, pairs):
    """Gradients of the MORE loss of a model of which nothing else requires one, and lambda."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    loss, weights = more_loss(model.head, *model.features(pack_pairs(pairs)), torch.tensor(SOURCE))
    leaves = [model.get_parameter(name) for name in names]
    return dict(zip(names, torch.autograd.grad(loss, leaves))), weights


RECIPES = [
    Recipe(),
    Recipe(recompute="full", micro_tokens=150),
    Recipe(recompute="selective"),
    Recipe("streamed", recompute="full"),
    Recipe("streamed", recompute="full", micro_tokens=150, offload=("inputs",)),
    Recipe("streamed", recompute="none", micro_tokens=1),
    Recipe("streamed", recompute="selective", micro_tokens=150),
]


@pytest.mark.parametrize("part", slow_but(["head", "last-1"], PARTS))
@pytest.mark.parametrize("family", slow_but(["olmo2"], ["gpt_neox", "olmo2"]))
def test_gradients_are_those_of_autograd(family, part):
    """Of everything that is trained, and of nothing else; lambda is that of the whole model."""
    torch.manual_seed(0)
    model, pairs = double(small_model(narrow(family))), pairs_of(random_shapes(12))
    names = names_trained(model, part)
    expected, weights = by_autograd(model, names, pairs)
    for recipe in RECIPES:
        recipe = Recipe(**vars(recipe) | {"train": part})
        optimizer = KeepsGradients()
        engine = open_engine(model, optimizer, recipe)
        result = engine.step(pairs, SOURCE, more_objective())
        assert optimizer.gradients.keys() == set(names)
        for name in names:
            torch.testing.assert_close(
                optimizer.gradients[name], expected[name], rtol=1e-8, atol=1e-13, msg=name
            )
        torch.testing.assert_close(result.weights, weights.double(), rtol=0, atol=1e-12)


def test_all_blocks_and_the_embedding_are_everything():
    model = open_model(GOLDENS / "gpt_neox")
    for train_, missing in (("all", []), ("last-2", ["trunk.embedding.weight"])):
        freeze(model, train_)
        names = {name for part in parts_of(model) for name in part}
        assert [n for n, _ in model.named_parameters() if n not in names] == missing
        assert all(is_trained(name, train_, 2) for name in names)


ITEMS = [
    Responses([5, 6, 7], [[8, 9, 10, 2], [3, 2]]),
    Responses([11], [[12], [13, 14, 2]]),
    Responses(list(range(20, 45)), [[3, 4, 2], [5, 2]]),
]


@pytest.mark.slow
@pytest.mark.parametrize("objective, tied", [("language", False), ("preference", True)])
def test_a_policys_last_blocks(transformers, tmp_path, tied, objective):
    """Its unembedding is trained with them unless it is the embedding, which is frozen."""
    theirs = reference_model("llama", head="ForCausalLM", tie_word_embeddings=tied).double()
    checkpoint = write_checkpoint(theirs, tmp_path)
    items, own = ITEMS, LanguageObjective()
    if objective == "preference":
        items = [Comparison(item, torch.zeros(1, 2)) for item in ITEMS]
        weigh = partial(WEIGHTINGS["more"], state={})
        own = PreferenceObjective(2, PreferenceLoss("dpo", 0.1), weigh, "more")

    def opened():
        trunk, _ = checkpoint.load(torch.float64)
        trunk.compute_dtype = torch.float64
        return LanguageModel(trunk, checkpoint.unembedding(trunk))

    model, source = opened(), [0, 1, 0]
    (batch,) = own.batches(items, source, 10**6)
    loss, _ = own.loss(model.unembedding, model.trunk.states_at(batch.stream, batch.reads), [batch])
    named = dict(model.named_parameters())
    everything = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
    prefixes = ("output", "trunk.final_norm.", "trunk.blocks.1.")
    names = [name for name in named if name.startswith(prefixes)]
    assert ("output" in names) == (not tied)
    for recipe in (
        Recipe(train="last-1"),
        Recipe("streamed", recompute="full", micro_tokens=12, train="last-1"),
    ):
        optimizer = KeepsGradients()
        open_engine(opened(), optimizer, recipe).step(items, source, own)
        assert optimizer.gradients.keys() == set(names)
        for name in names:
            torch.testing.assert_close(
                optimizer.gradients[name], everything[name], rtol=1e-8, atol=1e-12, msg=name
            )


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "olmo2"]))
def test_autograd_saves_what_is_planned_of_trained_blocks_only(family):
    """A frozen block saves nothing; of three blocks the first saves one block more than two do."""
    config, shapes = FAMILIES[family], random_shapes(20)
    model, stream = small_model(config), pack_pairs(pairs_of(shapes)).stream
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def bytes_saved(part):
        freeze(model, part)
        sizes, alive = {}, []

        def save(tensor):
            alive.append(tensor)  # so that no address is used twice
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with saved_tensors_hooks(save, lambda tensor: tensor):
            model.trunk(stream)
        return sum(sizes.values())

    none, one, two, three = (bytes_saved(part) for part in ("head", "last-1", "last-2", "last-3"))
    planned = block_activations(config, shapes, 4, "none", flash=False)
    assert none == 0 < one < two
    assert three - two == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("part", PARTS)
def test_a_streamed_step_keeps_trained_blocks_only(part, recompute):
    model = small_model(narrow("llama"))
    freeze(model, part)
    batches = micro_batches(pairs_of(random_shapes(12)), SOURCE, 150)
    step = StreamedStep(model, batches, more_objective(), recompute)
    step.forward()
    trained = len(model.trunk.blocks) - frozen_blocks(model)
    stored = step.inputs.stack if recompute == "full" else step.graphs
    assert len(batches) > 1 and len(stored) == trained * len(batches)
    gradients = list(step.backward())
    assert len(gradients) == len(parts_of(model)) == 1 + trained


@pytest.mark.parametrize("parameters", ["float32", "split"])
@pytest.mark.parametrize("part", ["all", *PARTS])
def test_states_are_planned_to_the_byte(part, parameters):
    """What is frozen has no moments; a split one has the half that bf16 lacks, so it is whole."""
    config = FAMILIES["gpt_neox"]
    recipe = Recipe("streamed", parameters, train=part)
    model, optimizer = small_model(config), AdamW(parameters)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze(model, part)
    optimizer.adopt_all(model)
    shapes = parameter_shapes(config)
    planned = sum(parameter_bytes(p, recipe) for p in shapes.parts)
    assert planned + sum(states_of_parts(shapes, recipe)) == optimizer.bytes(model)
    numbers = sum(p.numel() for name, p in before.items() if is_trained(name, part, config.blocks))
    assert trained_parameters(shapes, recipe) == numbers
    for name, p in model.named_parameters():
        assert ("m" in optimizer.state[name]) == is_trained(name, part, config.blocks)
        assert torch.equal(optimizer.value(name, p), before[name])


PLANNED = [
    Recipe(recompute="full", micro_tokens=400),
    Recipe("streamed", "split", recompute="none", micro_tokens=400),
    Recipe("streamed", recompute="full"),
]
# The last block is planned as if all its tokens asked, although only the ends of texts do.
AT_MOST = {"head": 1.3, "last-1": 2.7, "last-2": 1.8}  # times what is measured


@pytest.mark.parametrize("recipe", slow_but(PLANNED[:1], PLANNED), ids=str)
@pytest.mark.parametrize("part", slow_but(["last-1"], PARTS))
@pytest.mark.parametrize("family", ["gpt_neox"])
def test_the_memory_of_a_step_is_planned(family, part, recipe):
    """All live bytes, of which parameters and states are planned to the byte."""
    recipe = Recipe(**vars(recipe) | {"train": part})
    config, shapes = FAMILIES[family], random_shapes(20)
    model, optimizer = small_model(config), AdamW(recipe.parameters)
    freeze(model, part)
    optimizer.adopt_all(model)
    engine = open_engine(model, optimizer, recipe)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    always = sum(tensor.nbytes for tensor in [*model.parameters(), *states])
    objective = RewardObjective(2, partial(uniform_weights, state={}))
    with PeakBytes([*model.parameters(), *states]) as live:
        engine.step(pairs_of(shapes), [0, 1] * 10, objective)
    planned = memory_of(config, Workload(shapes, 1, tokens_of(shapes)), recipe, 4, False)
    measured = live.peak - always
    assert measured <= planned.peak - always <= AT_MOST[part] * measured


def test_a_frozen_model_fits_where_a_trained_one_does_not():
    """6.9 billion parameters: the head in a third of what plain fp32 takes, and of the FLOPs."""
    peaks, useful, hosts = {}, {}, {}
    for part in ("all", "last-4", "head"):
        recipe = Recipe(train=part, recompute="full")
        peaks[part] = memory_of(PYTHIA, PAPER, recipe, 2, True).peak
        useful[part], _ = step_flops(PYTHIA, PAPER, recipe)
        split = Recipe("streamed", "split", recompute="full", offload=("states",), train=part)
        hosts[part] = memory_of(PYTHIA, PAPER, split, 2, True)
    assert peaks["head"] < peaks["last-4"] < 0.5 * peaks["all"]
    assert useful["all"] / useful["head"] == pytest.approx(3, abs=0.01)
    assert hosts["head"].peak < 16e9  # bf16 parameters, and what computes
    halves = 2 * (parameter_shapes(PYTHIA).parameters - 500_000)
    assert hosts["head"].offloaded == pytest.approx(halves, rel=1e-3)


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", slow_but(["last-1"], PARTS))
@pytest.mark.parametrize("family", ["olmo2"])
def test_flops_are_counted_as_planned(family, part):
    """All products of a step; attention, which is none here, is left out on both sides."""
    config, shapes = narrow(family), random_shapes(12)
    model, work = small_model(config), Workload(shapes, 1, tokens_of(shapes))
    blocks = 0 if part == "head" else int(part[-1])

    def attention(last_blocks):
        """FLOPs of the attention of so many last blocks, going forward."""
        one_less = replace(config, blocks=last_blocks)
        with Products() as forward, torch.no_grad():
            small_model(one_less).trunk(pack_pairs(pairs_of(shapes)).stream)
        return forward_flops(config, shapes, True, last_blocks) - forward.total

    attention_of_all = attention(config.blocks)
    attention_of_trained = attention(blocks) if blocks else 0
    for recipe in RECIPES[:2] + RECIPES[3:5]:
        recipe = Recipe(**vars(recipe) | {"train": part})
        engine = open_engine(model, KeepsGradients(), recipe)
        with Products() as counted:
            engine.step(pairs_of(shapes), SOURCE, more_objective())
        _, executed = step_flops(config, work, recipe)
        is_twice_forward = recipe.engine == "plain" and recipe.micro_tokens == 150 and blocks > 0
        executed -= (1 + is_twice_forward) * attention_of_all
        executed -= (2 + (recipe.recompute == "full")) * attention_of_trained
        assert executed == pytest.approx(counted.total, rel=1e-4), recipe


# ---- runs ----------------------------------------------------------------------------------------


FROZEN_RUNS = {
    "last-1": {"engine": "streamed", "parameters": "split", "recompute": "full"},
    "head": {"method": "uniform"},
}


@pytest.mark.parametrize("part", slow_but(["last-1"], FROZEN_RUNS))
def test_a_run_of_what_is_trained(world, tmp_path, monkeypatch, capsys, part):
    """It resumes bitwise, is saved whole, and everything frozen is to the bit what it was."""
    changes = FROZEN_RUNS[part] | {"save_steps": 2, "train": part}
    assert train(options(world, tmp_path / "whole", **changes)) == 0
    assert "are trained" in capsys.readouterr().out
    real, calls = AdamW.update, []

    def crash(optimizer, name, *arguments):
        calls.append(name)
        if calls.count("head") == 4:
            raise RuntimeError("crash")
        return real(optimizer, name, *arguments)

    monkeypatch.setattr(AdamW, "update", crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(options(world, tmp_path / "cut", **changes))
    monkeypatch.undo()
    assert [path.name for path in training.checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    other = "last-2" if part == "head" else "all"
    with pytest.raises(InputError, match=f"--train is '{other}' but the run"):
        train(options(world, tmp_path / "cut", resume=True, **changes | {"train": other}))
    unsaid = changes | {"train": None}  # then what the run trains
    assert train(options(world, tmp_path / "cut", resume=True, **unsaid)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    assert stored_recipe(tmp_path / "whole")["train"] == part
    before = load_file(world[0] / "model" / "model.safetensors")
    after = load_file(tmp_path / "whole" / "model.safetensors")
    changed = {name for name in after if name in before and not equal(before, after, name)}
    blocks = {name.split(".")[2] for name in changed if ".layers." in name}
    assert before.keys() - after.keys() == {"embed_out.weight"}
    assert after.keys() - before.keys() == {"score.weight"}
    assert blocks == (set() if part == "head" else {"1"})
    assert bool(changed) == (part != "head") and "gpt_neox.embed_in.weight" not in changed


def equal(before, after, name):
    return torch.equal(before[name].float(), after[name])


@pytest.mark.slow
def test_a_policy_is_fine_tuned_in_its_last_block(world, tmp_path, capsys):
    directory, paths = world
    run = tmp_path / "run"
    words = ["align", "finetune", "--model", str(directory / "model"), "--output", str(run)]
    words += ["--input", str(paths["ana"][0]), "--learning-rate", "0.01", "--batch-size", "10"]
    assert main([*words, "--train", "last-1"]) == 0
    before = load_file(directory / "model" / "model.safetensors")
    after = load_file(run / "model.safetensors")
    changed = {name for name in before if not equal(before, after, name)}
    assert "embed_out.weight" in changed and "gpt_neox.embed_in.weight" not in changed
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {"1"}


REFUSED = {
    "last-3": "--train last-3: the model has 2 blocks; expected at most that",
    "last-0": "--train last-0: expected all, head or last-N",
    "tail": "--train tail: expected all, head or last-N",
    "": "--train : expected all, head or last-N",
}


@pytest.mark.parametrize("part", REFUSED)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_what_cannot_be_trained_is_refused_in_one_line(world, tmp_path, capsys, verb, part):
    directory, paths = world
    words = [verb, "--model", str(directory / "model"), "--source", f"ana={paths['ana'][0]}"]
    words += ["--output", str(tmp_path / "run")] if verb == "train" else []
    assert main([*words, "--batch-size", "4", "--train", part]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and REFUSED[part] in error
    assert not (tmp_path / "run").exists()


def test_a_policys_head_alone_and_several_gpus_are_refused(tmp_path, capsys):
    golden = str(GOLDENS / "llama")
    for words, reason in (
        (["plan", golden, "--objective", "language", "--train", "head"], "--train head: expected"),
        (["plan", golden, "--gpus", "2", "--train", "head"], "2 processes train with all only"),
        (
            ["align", "finetune", "--model", golden, "--output", "run", "--train", "head"],
            "--train head: expected all or last-N",
        ),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err
