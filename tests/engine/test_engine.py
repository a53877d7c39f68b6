"""The streamed engine against the plain one, however a step is cut, kept or offloaded."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, KeepsGradients, open_model, write_checkpoint
from processes import run_to_the_end
from reference import SIZES, reference_model
from runs import slow_but

import minimore.model.trunk
from minimore.data.pairs import TokenPair
from minimore.engine.host import Host
from minimore.engine.objective import NonFiniteGradient, RewardObjective, micro_batches
from minimore.engine.optim import AdamW
from minimore.engine.plain import PlainEngine
from minimore.engine.recipe import Recipe
from minimore.engine.storage import split
from minimore.engine.streamed import StreamedStep, open_engine, parts_of
from minimore.model.attention import pack
from minimore.model.recompute import RECOMPUTE, run_block
from minimore.model.rotation import rotary_angles
from minimore.more import WEIGHTINGS
from minimore.options import InputError

WHOLE = 10**9  # tokens of a micro-batch that holds the whole step


def random_pairs(count, seed=0, vocabulary=280, longest=14):
    random, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, chosen, rejected = (
            random.integers(2, vocabulary, random.integers(1, longest)).astype(np.int32)
            for _ in range(3)
        )
        sides = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
        pairs.append(TokenPair(*sides, len(prompt), 0))
    return pairs


def double(directory):
    """A stored model, held and computed in float64."""
    model = open_model(directory).double()
    model.trunk.compute_dtype = torch.float64
    return model


def objective_of(sources, method="more", scope="step"):
    weigh = partial(WEIGHTINGS[method], state={})
    return RewardObjective(sources, weigh, method, scope)


def flat(tensors):
    """All numbers of these tensors, as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


# ---- steps ---------------------------------------------------------------------------------------


def after_steps(model, recipe, sources, method="more", scope="step", steps=3, rate=1e-2):
    """All parameters after some steps of 3 pairs a source, and what the last step returned."""
    optimizer = AdamW(recipe.parameters, recipe.moments, weight_decay=0.1)
    optimizer.adopt_all(model)
    optimizer.learning_rate = rate
    engine = open_engine(model, optimizer, recipe)
    objective = objective_of(sources, method, scope)
    for step in range(steps):
        pairs = random_pairs(3 * sources, seed=step)
        result = engine.step(pairs, list(range(sources)) * 3, objective)
    return flat(optimizer.value(name, p) for name, p in model.named_parameters()), result


STREAMED = [
    *(
        Recipe("streamed", recompute=recompute, micro_tokens=micro_tokens)
        for recompute in RECOMPUTE
        for micro_tokens in (WHOLE, 60, 1)
    ),
    *(
        Recipe("streamed", recompute="full", micro_tokens=60, offload=offload)
        for offload in (("inputs",), ("states",), ("inputs", "states"))
    ),
]


@pytest.mark.parametrize("scope", ["step", "group"])
@pytest.mark.parametrize("sources", slow_but([3], (1, 3, 5)))
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_streamed_steps_are_plain_steps(family, sources, scope):
    """A fourth of the recipes each time; each meets every family, scope and number of sources."""
    first = (sources + (family == "llama") + 2 * (scope == "group")) % 4

    def after_two_steps(recipe):
        return after_steps(double(GOLDENS / family), recipe, sources, scope=scope, steps=2)

    expected, expected_result = after_two_steps(Recipe(micro_tokens=WHOLE))
    for recipe in STREAMED[first::4]:
        vector, result = after_two_steps(recipe)
        assert (vector - expected).abs().max() < 1e-9, recipe
        if recipe.micro_tokens == WHOLE:  # one micro-batch: to the bit
            assert torch.equal(vector, expected), recipe
        for ours, theirs in zip(result, expected_result):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-11), recipe


@pytest.mark.parametrize("method", slow_but(["more"], WEIGHTINGS))
def test_every_weighting_streams(method):
    streamed = Recipe("streamed", recompute="full", micro_tokens=50)
    expected, _ = after_steps(double(GOLDENS / "llama"), Recipe(), 3, method)
    vector, _ = after_steps(double(GOLDENS / "llama"), streamed, 3, method)
    assert (vector - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    "family",
    slow_but(["gemma3_text"], [f for f in SIZES if f not in ("gpt_neox", "llama")]),
)
def test_other_families_stream(family, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((GOLDENS / "llama" / "tokenizer.json").read_bytes())
    expected, _ = after_steps(double(tmp_path), Recipe(), 2, steps=2)
    for recipe in STREAMED[::4]:
        vector, _ = after_steps(double(tmp_path), recipe, 2, steps=2)
        assert (vector - expected).abs().max() < 1e-9, recipe


@pytest.mark.slow
def test_a_scaled_embedding_has_the_same_gradient_in_bf16_by_both_engines(transformers, tmp_path):
    """The scale is rounded to the type of the activations, and so is the gradient behind it."""
    write_checkpoint(reference_model("gemma"), tmp_path)
    found = []
    for engine in ("plain", "streamed"):
        model, optimizer = open_model(tmp_path), KeepsGradients()
        model.trunk.compute_dtype = torch.bfloat16
        assert model.trunk.embedding_scale == 4.90625 != model.trunk.c.embedding_scale
        step = open_engine(model, optimizer, Recipe(engine)).step
        step(random_pairs(6), [0, 1] * 3, objective_of(2, "uniform"))
        found.append(optimizer.gradients["trunk.embedding.weight"])
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_split_is_bitwise_fp32_whose_compute_copy_is_rounded():
    """The reference is an fp32 master in plain autograd; the model holds its bf16 copies."""
    recipe = Recipe("streamed", "split", micro_tokens=WHOLE)
    vector, _ = after_steps(open_model(GOLDENS / "gpt_neox"), recipe, 3)

    model, optimizer = open_model(GOLDENS / "gpt_neox"), AdamW(weight_decay=0.1)
    optimizer.learning_rate = 1e-2
    master = {
        name: optimizer.adopt(name, p.detach().clone()) for name, p in model.named_parameters()
    }
    for step in range(3):
        for name, p in model.named_parameters():
            p.data = rounded_copy(master[name])
        gradients = plain_gradients(model, random_pairs(9, seed=step), [0, 1, 2] * 3)
        for name, gradient in gradients.items():
            optimizer.update(name, master[name], gradient)
        optimizer.steps += 1
    assert torch.equal(vector, flat(master.values()))


def rounded_copy(value):
    """A matrix rounded to what bf16 holds, a vector as it is."""
    if value.ndim == 1:
        return value.clone()
    high, _ = split(value.flatten())
    return high.float().view(value.shape)


@pytest.mark.slow
def test_lossy_storage_streams_wherever_it_lies():
    """Rounding is a function of seed, step and place, and the places stay the same."""

    def run(**changes):
        recipe = Recipe("streamed", "bfloat16", "int8", "full", **changes)
        return after_steps(open_model(GOLDENS / "llama"), recipe, 3, steps=5)[0]

    first = run()
    assert torch.equal(first, run())
    assert torch.equal(first, run(offload=("inputs", "states")))
    exact, _ = after_steps(open_model(GOLDENS / "llama"), Recipe(), 3, steps=5)
    assert 0.001 < (first - exact).norm() / exact.norm() < 0.05


def test_clipping_is_torchs():
    vectors = []
    for max_grad_norm in (None, 0.01):
        model = double(GOLDENS / "llama")
        recipe = Recipe(max_grad_norm=max_grad_norm)
        vectors.append(
            flat(plain_gradients(model, random_pairs(6), [0, 1, 2] * 2, recipe).values())
        )
    whole, clipped = vectors
    assert whole.norm() > 0.1 and clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped, whole * (0.01 / whole.norm()), rtol=1e-3)


# ---- gradients -----------------------------------------------------------------------------------


def plain_gradients(model, pairs, source, recipe=None):
    """The gradient of every parameter that the plain engine gives to its optimizer."""
    optimizer = KeepsGradients()
    objective = objective_of(max(source) + 1)
    PlainEngine(model, optimizer, recipe or Recipe(micro_tokens=WHOLE)).step(
        pairs, source, objective
    )
    return optimizer.gradients


def streamed_step(model, pairs, source, micro_tokens, recompute="full"):
    """A streamed step that has gone forward."""
    batches = micro_batches(pairs, source, micro_tokens)
    step = StreamedStep(model, batches, objective_of(max(source) + 1), recompute)
    step.forward()
    return step


@pytest.mark.parametrize("micro_tokens", [WHOLE, 60, 1])
@pytest.mark.parametrize("recompute", slow_but(["full"], RECOMPUTE))
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_fp32_gradients_agree(family, recompute, micro_tokens):
    """To 1e-5 of the global norm; and every parameter is in its part, once."""
    pairs, source, model = random_pairs(15), [0, 1, 2, 3, 4] * 3, open_model(GOLDENS / family)
    expected = plain_gradients(model, pairs, source)
    gradients = {}
    step = streamed_step(model, pairs, source, micro_tokens, recompute)
    for names, part in zip(parts_of(model), step.backward(), strict=True):
        assert set(names) == set(part) and not set(names) & set(gradients)
        gradients.update(part)
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    error = flat(gradients[name] - expected[name] for name in expected).norm()
    norm = flat(expected.values()).norm()
    assert 0 <= error <= 1e-5 * norm and norm > 0


def test_nothing_happens_before_forward():
    """A step is made without work, so that its verbs say what happens when."""
    model = double(GOLDENS / "gpt_neox")
    batches = micro_batches(random_pairs(6), [0, 1, 2] * 2, 30)
    step = StreamedStep(model, batches, objective_of(3))
    with torch.no_grad():
        model.head.mul_(2)
    doubled = step.forward()
    assert torch.equal(doubled.loss, StreamedStep(model, batches, objective_of(3)).forward().loss)


@pytest.mark.parametrize("part, is_harmless", [(0, False), (1, True)])
def test_a_part_may_be_changed_as_soon_as_its_gradient_is_there(part, is_harmless):
    """The last block is part 1; changing it while part 0 is out is too early, and it shows."""

    def gradients(changed_at):
        model = double(GOLDENS / "gpt_neox")
        step = streamed_step(model, random_pairs(6), [0, 1, 2] * 2, 30)
        for i, gradients_of_part in enumerate(step.backward()):
            yield from gradients_of_part.values()
            if i == changed_at:
                with torch.no_grad():
                    model.trunk.blocks[-1].mlp.down.weight.mul_(1.5)

    undisturbed, vector = flat(gradients(None)), flat(gradients(part))
    assert torch.equal(vector, undisturbed) == is_harmless
    assert torch.allclose(vector, undisturbed, rtol=1e-3) == is_harmless


@pytest.mark.parametrize("family, products", [("gpt_neox", 6), ("llama", 7)])
def test_recomputed_blocks_do_not_repeat_their_last_product(monkeypatch, family, products):
    """q, k, v, output, (gate,) up and down go forward; all but down are computed again."""
    calls, linear = [], torch.nn.functional.linear

    def counted(x, weight, bias=None):
        calls.append(weight.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(minimore.model.trunk.F, "linear", counted)
    model = double(GOLDENS / family)
    blocks = len(model.trunk.blocks)
    step = streamed_step(model, random_pairs(6), [0, 1, 2] * 2, WHOLE)
    assert len(calls) == products * blocks
    calls.clear()
    list(step.backward())
    assert len(calls) == (products - 1) * blocks
    assert model.trunk.blocks[0].mlp.down.weight.shape not in calls


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_dropped_is_computed_again_to_the_bit(family, recompute):
    trunk, results = double(GOLDENS / family).trunk, []
    stream = pack([([], [list(range(3, 40))]), ([5, 6], [[7], [8, 9]])])
    rotation = rotary_angles(trunk.c, stream.positions)
    for kind in ("none", recompute):
        x = trunk.embed(stream).detach().requires_grad_()
        y = run_block(trunk.blocks[0], x, rotation, stream, kind)
        inputs = [x, *trunk.blocks[0].parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32():
    """The sum of gradients that bf16 holds is one of fp32 numbers, not of bf16 ones."""
    pairs, source, model = random_pairs(30), [0, 1, 2] * 10, open_model(GOLDENS / "llama")
    model.trunk.compute_dtype = torch.bfloat16

    def gradient(micro_tokens):
        step = streamed_step(model, pairs, source, micro_tokens)
        gradients = {name: g for part in step.backward() for name, g in part.items()}
        return gradients["trunk.blocks.1.mlp.down.weight"]

    at_once, summed = gradient(WHOLE), gradient(100)
    assert at_once.dtype == torch.bfloat16 and summed.dtype == torch.float32
    assert not torch.equal(summed, summed.bfloat16().float())
    bound = 0.03 * float(summed.abs().max())
    assert torch.allclose(summed, at_once.float(), rtol=0, atol=bound)


# ---- the host ------------------------------------------------------------------------------------


def test_numbers_go_to_their_home_and_come_back():
    """What is fetched is a copy: the home keeps its numbers until others are put back."""
    host = Host("cpu")
    home = host.put(torch.ones(3))
    host.fetch(home)
    copy = host.get(home)
    copy += 1
    assert home.tolist() == [1, 1, 1] and not host.fetched
    host.put_back(copy, home)
    assert home.tolist() == host.get(home).tolist() == [2, 2, 2]


def test_what_lies_on_the_host_is_fetched_before_it_is_needed(monkeypatch):
    """But for the first input of a step's way back, and the states of its first part."""
    is_late, get = [], Host.get

    def observed(host, home):
        is_late.append(id(home) not in host.fetched)
        return get(host, home)

    monkeypatch.setattr(Host, "get", observed)
    offload = ("inputs", "states")
    recipe = Recipe("streamed", "split", recompute="full", micro_tokens=60, offload=offload)
    after_steps(open_model(GOLDENS / "gpt_neox"), recipe, 3, steps=2)
    first = 2 * (1 + 3 * 2)  # two steps: an input, and two moments of head, norm weight and bias
    assert sum(is_late) == first and len(is_late) > 5 * first


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("streamed", recompute="full")], ids=["plain", "streamed"]
)
def test_a_gradient_that_is_not_finite_is_refused(recipe):
    model, optimizer = open_model(GOLDENS / "gpt_neox"), AdamW()
    optimizer.adopt_all(model)
    # The forward pass stays finite, and the gradient of the attention's weights overflows.
    with torch.no_grad():
        model.trunk.blocks[0].attention.query.weight.mul_(1e-30)
        model.trunk.blocks[0].attention_norm.weight.mul_(1e38)
    engine = open_engine(model, optimizer, recipe)
    with pytest.raises(FloatingPointError):
        engine.step(random_pairs(6), [0, 1, 2] * 2, objective_of(3))


def test_non_finite_gradients_have_their_own_name(monkeypatch):
    model, optimizer = open_model(GOLDENS / "gpt_neox"), AdamW()
    optimizer.adopt_all(model)
    engine = open_engine(model, optimizer, Recipe("streamed", recompute="full"))

    def infinite(step, d_activations):
        return {"trunk.embedding.weight": torch.full((300, 32), torch.inf)}

    monkeypatch.setattr(StreamedStep, "_embedding_gradients", infinite)
    with pytest.raises(NonFiniteGradient):
        engine.step(random_pairs(6), [0, 1, 2] * 2, objective_of(3))


REFUSED = [
    (Recipe(parameters="split"), "--parameters split needs --engine streamed"),
    (Recipe(offload=("states",)), "--offload states needs --engine streamed"),
    (Recipe("streamed", offload=("inputs",)), "--offload inputs needs --recompute full"),
    (Recipe("streamed", max_grad_norm=1.0), "--max-grad-norm needs --engine plain"),
    (Recipe(max_grad_norm=0.0), "expected more than 0"),
    (Recipe("streamed", "float8"), "--parameters float8: expected one of float32, split, bfloat16"),
    (Recipe(micro_tokens=0), "expected at least 1"),
]


@pytest.mark.parametrize("recipe, message", REFUSED, ids=[message for _, message in REFUSED])
def test_contradictions_are_refused(recipe, message):
    with pytest.raises(InputError, match=message):
        open_engine(double(GOLDENS / "llama"), AdamW(), recipe)


# ---- in processes of their own -------------------------------------------------------------------


def peak_of(recipe):
    """The memory that two training steps took in a process of its own, and what was planned.

    A model of 30 million parameters, with the depth of the benchmark's own, and narrower.
    """
    script = ROOT / "tests" / "bench" / "cpu_memory.py"
    printed = run_to_the_end(["--width", "320", *recipe.split()], ".", script)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_leanest_recipe_trains_in_a_third_of_the_plain_peak():
    plain = peak_of("--engine plain")
    lean = peak_of("--engine streamed --parameters bfloat16 --moments int8 --recompute full")
    assert plain["parameters"] == lean["parameters"] >= 29e6
    assert lean["peak"] <= plain["peak"] / 3
    for measured in (plain, lean):
        assert measured["states"] == measured["planned_states"]
        # A CPU's allocator does not return all that is freed: a fourth here, a tenth of 5 GB.
        assert 0.8 < measured["peak"] / measured["planned_peak"] < 1.35


@pytest.mark.slow
def test_the_gpu_benchmark_runs_its_lines_on_a_cpu(tmp_path):
    """At tiny size every stage ends, every check passes, and the table has a line a step."""
    script = ROOT / "tests" / "bench" / "gpu.py"
    output = tmp_path / "gpu.json"
    short = ["--stages", "facts", "--output", str(tmp_path / "short.json")]  # in a process each
    # "command", "kills" and "align" are subjects of test_demo.py, test_resume.py, test_kills.py.
    stages = ["facts", "attention", "steps", "repeat", "1.4B", "profile", "6.9B", "2.8B", "7B"]
    stages = ["--stages", *stages, "24GB", "launches", "writing", "peer", "policy", "disk"]
    long = ["--one-process", *stages, "--output", str(output)]
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for options in (short, long):
        run_to_the_end(options, tmp_path, script, environment)
    records = json.loads(output.read_text())
    checks, steps = ([r for r in records if r["kind"] == kind] for kind in ("check", "step"))
    assert len(checks) == 47 and all(check["passed"] for check in checks)
    assert len(steps) == 18 and not any("skipped" in step for step in steps)
    assert len({r["stage"] for r in records}) == 15
    assert output.with_suffix(".md").read_text().count("\n| Pythia") == 17
