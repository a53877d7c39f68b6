"""The streamed engine against the plain one, whatever is kept, cut or offloaded; what contradicts itself is refused."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, open_model
from reference import SIZES, reference_model

from minimore.data.pairs import TokenPair
from minimore.engine.host import Host
from minimore.engine.objective import NonFiniteGradient, RewardObjective, micro_batches
from minimore.engine.optim import AdamW, split
from minimore.engine.recipe import Recipe
from minimore.engine.streamed import Walk, open_engine, parts_of
from minimore.model.attention import pack
from minimore.model.recompute import RECOMPUTE, run_block
from minimore.model.trunk import rotary_angles
from minimore.more import WEIGHTINGS
from minimore.options import InputError


def random_pairs(count, seed=0, vocabulary=280, longest=14):
    random, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, a, b = (
            random.integers(2, vocabulary, random.integers(1, longest)).astype(np.int32)
            for _ in range(3)
        )
        pairs.append(
            TokenPair(np.concatenate([prompt, a]), np.concatenate([prompt, b]), len(prompt), 0)
        )
    return pairs


def double(family):
    model = open_model(GOLDENS / family).double()
    model.trunk.compute_dtype = torch.float64
    return model


def weighing(K, method="more", scope="step"):
    return RewardObjective(K, partial(WEIGHTINGS[method], state={}), method, scope)


def after_steps(model, recipe, K, method="more", scope="step", steps=5, rate=1e-2):
    """All parameters, as one vector, and what the last step told."""
    optimizer = AdamW(recipe.parameters, recipe.moments, weight_decay=0.1)
    optimizer.adopt_all(model)
    engine, how, optimizer.learning_rate = (
        open_engine(model, optimizer, recipe),
        weighing(K, method, scope),
        rate,
    )
    for step in range(steps):
        told = engine.step(random_pairs(3 * K, step), list(range(K)) * 3, how)
    return torch.cat(
        [optimizer.value(name, p).flatten() for name, p in model.named_parameters()]
    ), told


STREAMED = [
    Recipe("streamed", recompute=recompute, micro_tokens=tokens)
    for recompute in RECOMPUTE
    for tokens in (10**9, 60, 1)
]
STREAMED += [
    Recipe("streamed", recompute="full", micro_tokens=60, offload=offload)
    for offload in (("inputs",), ("states",), ("inputs", "states"))
]


@pytest.mark.parametrize("scope", ["step", "group"])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_streamed_steps_are_plain_steps(family, K, scope):
    expected, told = after_steps(double(family), Recipe(micro_tokens=10**9), K, scope=scope)
    for recipe in STREAMED:
        found, also_told = after_steps(double(family), recipe, K, scope=scope)
        assert (found - expected).abs().max() < 1e-9, recipe
        assert recipe.micro_tokens < 10**9 or torch.equal(found, expected), (
            recipe
        )  # one chunk: to the bit
        assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(told, also_told)), (
            recipe
        )


@pytest.mark.parametrize("method", list(WEIGHTINGS))
def test_every_weighting_streams(method):
    expected, _ = after_steps(double("llama"), Recipe(), 3, method)
    found, _ = after_steps(
        double("llama"), Recipe("streamed", recompute="full", micro_tokens=50), 3, method
    )
    assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("family", [f for f in SIZES if f not in ("gpt_neox", "llama")])
def test_other_families_stream(family, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((GOLDENS / "llama" / "tokenizer.json").read_bytes())
    vectors = []
    for recipe in (Recipe(), *STREAMED[::4]):
        model = open_model(tmp_path).double()
        model.trunk.compute_dtype = torch.float64
        vectors.append(after_steps(model, recipe, 3)[0])
        assert (vectors[0] - vectors[-1]).abs().max() < 1e-9, recipe


@pytest.mark.parametrize("tokens", [10**9, 60, 1])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_fp32_gradients_agree(family, recompute, tokens):
    """To 1e-5 of the global norm; and every parameter is in its part, once."""
    pairs, source, how = random_pairs(15), [0, 1, 2, 3, 4] * 3, weighing(5)
    model = open_model(GOLDENS / family)
    plain = open_engine(model, AdamW(), Recipe(micro_tokens=10**9))
    plain.optimizer.adopt_all(model)
    expected = {}
    plain.optimizer.update = lambda name, p, gradient: expected.update({name: gradient.clone()})
    plain.step(pairs, source, how)
    walk, found = Walk(model, micro_batches(pairs, source, tokens), how, recompute), {}
    for names, gradients in zip(parts_of(model), walk):
        assert set(names) == set(gradients)
        found.update(gradients)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    error = torch.cat([(found[name] - expected[name]).flatten() for name in found]).norm()
    assert 0 <= error <= 1e-5 * norm and norm > 0


def test_an_update_may_come_while_the_walk_goes_on():
    """The engine changes a block as soon as its gradient is there; a walk whose blocks are changed too early is caught by the comparison."""
    model = double("gpt_neox")
    pairs, source = random_pairs(6), [0, 1, 2] * 2
    gradients = lambda spoil: torch.cat(
        [
            g.flatten()
            for part in spoilt(
                Walk(double("gpt_neox"), micro_batches(pairs, source, 30), weighing(3)), spoil
            )
            for g in part.values()
        ]
    )

    def spoilt(walk, spoil):
        for b, part in enumerate(walk):
            yield part
            if b == 0 and spoil:  # the last block, before its gradient is taken
                with torch.no_grad():
                    walk.model.trunk.blocks[-1].mlp.down.weight.mul_(1.5)
            if b == 1:  # the last block, after
                with torch.no_grad():
                    walk.model.trunk.blocks[-1].mlp.down.weight.mul_(3)

    clean = torch.cat(
        [
            g.flatten()
            for part in Walk(model, micro_batches(pairs, source, 30), weighing(3))
            for g in part.values()
        ]
    )
    assert torch.equal(gradients(False), clean) and not torch.allclose(
        gradients(True), clean, rtol=1e-3
    )


def test_recomputed_blocks_do_not_repeat_their_last_product(monkeypatch):
    import minimore.model.trunk as module

    calls = []
    real = module.F.linear
    monkeypatch.setattr(module.F, "linear", lambda *a: (calls.append(a[1].shape), real(*a))[1])
    model, pairs = double("gpt_neox"), random_pairs(6)
    walk = Walk(model, micro_batches(pairs, [0, 1, 2] * 2, 10**9), weighing(3))
    forward = len(calls)
    list(walk)
    assert forward == 6 * 2 and len(calls) - forward == 5 * 2


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_dropped_is_made_again_to_the_bit(family, recompute):
    model, results = double(family), []
    stream = pack([([], [list(range(3, 40))]), ([5, 6], [[7], [8, 9]])])
    rotation = rotary_angles(model.trunk.c, stream.positions)
    for kind in ("none", recompute):
        x = model.trunk.embed(stream).detach().requires_grad_()
        y = run_block(model.trunk.blocks[0], x, rotation, stream, kind)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *model.trunk.blocks[0].parameters()])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_split_is_bitwise_fp32_whose_compute_copy_is_rounded():
    """The reference: an fp32 master, of which the model holds bf16 copies by the same rule, in plain autograd, 5 steps."""
    found, _ = after_steps(
        open_model(GOLDENS / "gpt_neox"), Recipe("streamed", "split", micro_tokens=10**9), 3
    )
    model, master, optimizer = open_model(GOLDENS / "gpt_neox"), {}, AdamW(weight_decay=0.1)
    for name, p in model.named_parameters():
        master[name] = optimizer.adopt(name, p.detach().clone())
    optimizer.learning_rate = 1e-2
    for step in range(5):
        for name, p in model.named_parameters():
            p.data = (
                split(master[name].flatten())[0].float().view(p.shape)
                if p.ndim > 1
                else master[name].clone()
            )
        engine = open_engine(model, AdamW(), Recipe(micro_tokens=10**9))
        engine.optimizer.update = lambda name, p, gradient: optimizer.update(
            name, master[name], gradient
        )
        engine.step(random_pairs(9, step), list(range(3)) * 3, weighing(3))
        optimizer.steps += 1
    assert torch.equal(found, torch.cat([m.flatten() for m in master.values()]))


def test_lossy_storage_streams_in_any_chunks():
    """Rounding is a function of seed, step and place: the same run twice is the same, another seed is another."""
    run = lambda **changes: after_steps(
        open_model(GOLDENS / "llama"), Recipe("streamed", "bfloat16", "int8", "full", **changes), 3
    )[0]
    first = run()
    assert torch.equal(first, run()) and torch.equal(first, run(offload=("inputs", "states")))
    exact, _ = after_steps(open_model(GOLDENS / "llama"), Recipe(), 3)
    assert 0.001 < (first - exact).norm() / exact.norm() < 0.05


def test_states_live_where_the_recipe_says():
    """On a host that is another place, nothing of the optimizer is left on the device, and what is sent back arrives."""
    device = Host("cpu")
    ticket = device.put(torch.ones(3))
    device.fetch(ticket)
    copy = device.get(ticket)
    copy += 1
    assert ticket.tolist() == [1, 1, 1] and not device.coming
    device.put_back(copy, ticket)
    assert ticket.tolist() == device.get(ticket).tolist() == [2, 2, 2]


def test_clipping_is_torchs():
    vectors = []
    for clip in (None, 0.01):
        model, source = double("llama"), [0, 1, 2] * 2
        engine = open_engine(model, AdamW(), Recipe(max_grad_norm=clip))
        engine.optimizer.adopt_all(model)
        gradients = []
        engine.optimizer.update = lambda name, p, gradient: gradients.append(
            gradient.flatten().clone()
        )
        engine.step(random_pairs(6), source, weighing(3))
        vectors.append(torch.cat(gradients))
    assert vectors[0].norm() > 0.1 and vectors[1].norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(vectors[1], vectors[0] * (0.01 / vectors[0].norm()), rtol=1e-3)


def test_chunks_of_bf16_gradients_are_summed_in_fp32():
    """Ten chunks whose gradients bf16 holds: their sum is that of fp32 numbers, not of bf16 ones."""
    model, pairs, source = open_model(GOLDENS / "llama"), random_pairs(30), [0, 1, 2] * 10
    model.trunk.compute_dtype = torch.bfloat16
    name = "trunk.blocks.1.mlp.down.weight"
    part = lambda tokens: next(
        g
        for part in Walk(model, micro_batches(pairs, source, tokens), weighing(3))
        for n, g in part.items()
        if n == name
    )
    assert part(10**9).dtype == torch.bfloat16 and part(100).dtype == torch.float32
    assert not torch.equal(part(100), part(100).bfloat16().float())
    assert torch.allclose(
        part(100), part(10**9).float(), rtol=0, atol=0.03 * float(part(100).abs().max())
    )


def test_states_are_sent_for_before_they_are_needed(monkeypatch):
    """Whatever `get` asks for is on its way already, but for the first part of a walk; and inputs but for the first of a step."""
    late, real = [], Host.get
    monkeypatch.setattr(
        Host,
        "get",
        lambda host, ticket: (late.append(id(ticket) not in host.coming), real(host, ticket))[1],
    )
    after_steps(
        open_model(GOLDENS / "gpt_neox"),
        Recipe(
            "streamed", "split", recompute="full", micro_tokens=60, offload=("inputs", "states")
        ),
        3,
        steps=2,
    )
    first = 2 * (1 + 3 * 2)  # two steps: one input, and two moments each of head and norm
    assert sum(late) == first and len(late) > 5 * first


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe("streamed", recompute="full")], ids=["plain", "streamed"]
)
def test_a_gradient_that_is_not_finite_is_told(recipe):
    model = open_model(GOLDENS / "gpt_neox")
    optimizer = AdamW()
    optimizer.adopt_all(model)
    with (
        torch.no_grad()
    ):  # the forward pass stays finite, the gradient of the MLP's weights overflows
        model.trunk.blocks[0].attention.query.weight.mul_(1e-30)
        model.trunk.blocks[0].attention_norm.weight.mul_(1e38)
    with pytest.raises(FloatingPointError):
        open_engine(model, optimizer, recipe).step(random_pairs(6), [0, 1, 2] * 2, weighing(3))


def test_non_finite_gradients_have_their_own_name(monkeypatch):
    model, optimizer = open_model(GOLDENS / "gpt_neox"), AdamW()
    optimizer.adopt_all(model)
    engine = open_engine(model, optimizer, Recipe("streamed", recompute="full"))
    monkeypatch.setattr(
        Walk,
        "_embedding_gradients",
        lambda self, dx: {"trunk.embedding.weight": torch.full((300, 32), torch.inf)},
    )
    with pytest.raises(NonFiniteGradient):
        engine.step(random_pairs(6), [0, 1, 2] * 2, weighing(3))


REFUSED = [
    (Recipe(parameters="split"), "--parameters split needs --engine streamed"),
    (Recipe(offload=("states",)), "--offload states needs --engine streamed"),
    (Recipe("streamed", offload=("inputs",)), "--offload inputs needs --recompute full"),
    (Recipe("streamed", max_grad_norm=1.0), "--max-grad-norm needs --engine plain"),
    (Recipe(max_grad_norm=0.0), "expected more than 0"),
    (Recipe("streamed", "float8"), "--parameters float8: expected one of float32, split, bfloat16"),
    (Recipe(micro_tokens=0), "expected at least 1"),
]


@pytest.mark.parametrize("recipe, said", REFUSED, ids=[said for _, said in REFUSED])
def test_contradictions_are_refused(recipe, said):
    with pytest.raises(InputError, match=said):
        open_engine(double("llama"), AdamW(), recipe)


def peak_of(recipe):
    """Peak of the anonymous memory of two training steps in a fresh process, the interpreter's own subtracted; and what was planned."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench" / "cpu_memory.py"), *recipe.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_leanest_recipe_trains_in_a_third_of_the_plain_peak():
    plain, lean = (
        peak_of("--engine plain"),
        peak_of("--engine streamed --parameters bfloat16 --moments int8 --recompute full"),
    )
    assert plain["parameters"] == lean["parameters"] >= 300e6
    assert lean["peak"] <= plain["peak"] / 3
    for found in (plain, lean):
        assert found["states"] == found["planned_states"]
        assert (
            0.8 < found["peak"] / found["planned_peak"] < 1.25
        )  # a CPU's allocator keeps what it likes


def test_the_gpu_benchmark_runs_its_lines_on_a_cpu(tmp_path):
    """At tiny size: every check passes, every recipe runs, and the table has a line for each."""
    script = ROOT / "tests" / "bench" / "gpu.py"
    result = subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path / "gpu.json")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["checks"]) >= 25 and all(c["passed"] for c in found["checks"])
    assert (
        not any("skipped" in s for s in found["steps"])
        and len(found["steps"]) == 14
        and found["disk"]["gigabytes"] > 0
    )
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == 1 + 14
