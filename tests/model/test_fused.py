"""A compiled block computes what it says, in one version for every number of tokens."""

import numpy as np
import pytest
import torch
from conftest import GOLDENS, open_model, write_checkpoint
from reference import reference_model

from minimore.data.pairs import TokenPair, pack_pairs
from minimore.model import fused

# All of them import torch's compiler, and wait for it.
pytestmark = pytest.mark.slow


@pytest.fixture
def pairs():
    """Pairs of random tokens, of many lengths, that share a prompt."""
    random = np.random.default_rng(0)
    sides = [random.integers(5, 250, n) for n in range(20, 30)]
    prompt = random.integers(5, 250, 7)
    return [
        TokenPair(np.concatenate([prompt, a]), np.concatenate([prompt, b]), 7, 0)
        for a, b in zip(sides[0::2], sides[1::2])
    ]


@pytest.fixture
def on_cpu(monkeypatch):
    """Compile on a CPU, too, without a compiler of C++."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused.compiled.cache_clear()
    yield
    fused.compiled.cache_clear()


def gradients(model, batch, recompute):
    """Features and gradients of all parameters, as one vector."""
    model.trunk.recompute = recompute
    features = torch.cat(model.features(batch))
    upstream = torch.linspace(-1, 1, features.numel()).view(features.shape)
    parameters = list(model.trunk.parameters())
    rows = torch.autograd.grad(features, parameters, upstream)
    return torch.cat([features.flatten(), *(row.flatten() for row in rows)])


def test_a_compiled_block_is_the_block(golden, pairs, on_cpu, monkeypatch):
    model = open_model(golden)
    batches = [pack_pairs(pairs[:n]) for n in (2, 3, 5)]
    for recompute in ("none", "full"):
        for batch in batches:
            compiled = gradients(model, batch, recompute)
            with monkeypatch.context() as patch:
                patch.setattr(fused, "DEVICES", set())
                expected = gradients(model, batch, recompute)
            torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the halves of a block


def test_blocks_with_a_norm_behind_share_their_three_compiled_parts(
    transformers, pairs, on_cpu, monkeypatch, tmp_path
):
    """One block has a window and a base of rotation of its own, and the other one has not."""
    write_checkpoint(reference_model("gemma3_text"), tmp_path)
    model, batch = open_model(tmp_path), pack_pairs(pairs[:3])
    compiled = gradients(model, batch, "none")
    monkeypatch.setattr(fused, "DEVICES", set())
    torch.testing.assert_close(compiled, gradients(model, batch, "none"), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_selective_is_not_compiled_since_a_compiler_would_decide_what_is_kept(
    golden, pairs, on_cpu
):
    gradients(open_model(golden), pack_pairs(pairs[:2]), "selective")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_without_gradients_there_is_a_version_of_its_own(pairs, on_cpu):
    model = open_model(GOLDENS / "llama")
    with torch.no_grad():
        for n in (2, 3, 5):
            model.features(pack_pairs(pairs[:n]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_where_nothing_compiles_blocks_run_as_they_are_written(pairs, on_cpu, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(fused, "BACKEND", broken)
    model = open_model(GOLDENS / "llama")
    for _ in range(2):
        with torch.no_grad():
            features = torch.cat(model.features(pack_pairs(pairs[:2])))
    assert features.isfinite().all() and not fused.DEVICES
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "blocks run uncompiled" in said
