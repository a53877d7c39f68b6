"""What is planned is what is there: states to the byte, saved activations to 1%, FLOPs as torch counts them; and what fits is chosen."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import minimore.model.trunk
from minimore.cli import main
from minimore.data.pairs import Source, TokenPair, pack_pairs
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.engine.cost import (
    PairShape,
    Workload,
    forward_flops,
    block_activations,
    memory_of,
    parameter_bytes,
    segments_of,
    parameter_shapes,
    state_bytes,
    step_flops,
    workload,
)
from minimore.engine.objective import RewardObjective, micro_batches
from minimore.engine.optim import AdamW
from minimore.engine.plan import RECIPES, choose, is_exact, parse_memory, recipes
from minimore.engine.recipe import MOMENTS, OFFLOADS, PARAMETERS, Recipe
from minimore.engine.streamed import Walk
from minimore.model.attention import tile_shapes
from minimore.model.checkpoint import read_config
from minimore.model.trunk import ModelConfig, Trunk, rotary_angles
from minimore.more import uniform_weights
from minimore.options import InputError
from minimore.reward import RewardModel, fresh_head

GPT_NEOX = ModelConfig(
    vocabulary=300,
    width=256,
    blocks=3,
    heads=4,
    kv_heads=4,
    head_width=64,
    mlp_width=1024,
    activation="gelu",
    gated=False,
    norm="layer",
    norm_eps=1e-5,
    parallel_residual=True,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary_width=16,
    rope_base=1e4,
)
LLAMA = replace(
    GPT_NEOX,
    mlp_width=688,
    activation="silu",
    gated=True,
    norm="rms",
    parallel_residual=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    rotary_width=64,
)
ODD = replace(
    GPT_NEOX,
    vocabulary=301,
    width=24,
    heads=3,
    kv_heads=3,
    head_width=8,
    mlp_width=50,
    rotary_width=2,
)  # no matrix is whole blocks of 256
SHAPES = {
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "qwen3": replace(LLAMA, kv_heads=2, qk_norm=True),
    "qwen2": replace(LLAMA, kv_heads=2, qkv_bias=True),
    "opt": replace(
        GPT_NEOX, activation="relu", parallel_residual=False, rotary_width=0, learned_positions=100
    ),
}
PYTHIA = replace(
    GPT_NEOX,
    vocabulary=50432,
    width=4096,
    blocks=32,
    heads=32,
    kv_heads=32,
    head_width=128,
    mlp_width=16384,
    rotary_width=32,
)  # 6.9B
PAPER = Workload((PairShape(140, 101, 101),) * 80, 2500, 200_000 * 342)


def filled(c) -> Trunk:
    trunk = Trunk(c)
    for p in trunk.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    return trunk


def random_shapes(count, seed=0):
    return tuple(
        PairShape(*map(int, row)) for row in np.random.default_rng(seed).integers(2, 30, (count, 3))
    )


def pairs_of(shapes):
    ids = lambda n: np.arange(2, n + 2, dtype=np.int32)
    return [
        TokenPair(np.concatenate([ids(s), ids(a)]), np.concatenate([ids(s), ids(b)]), s, 0)
        for s, a, b in shapes
    ]


# ---- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("family", [*SHAPES, "odd"])
def test_states_are_planned_to_the_byte(family, parameters, moments):
    c, recipe = (SHAPES | {"odd": ODD})[family], Recipe("streamed", parameters, moments)
    model, optimizer, s = (
        RewardModel(filled(c), fresh_head(c.width, 0)),
        AdamW(parameters, moments),
        parameter_shapes(c),
    )
    assert s.parameters == sum(p.numel() for p in model.parameters())
    optimizer.adopt_all(model)
    assert sum(parameter_bytes(part, recipe) for part in s.parts) == sum(
        p.nbytes for p in model.parameters()
    )
    assert sum(
        parameter_bytes(part, recipe) + state_bytes(part, recipe) for part in s.parts
    ) == optimizer.bytes(model)


TABLE = {
    "fp32 AdamW, plain": 16,
    "fp32 AdamW": 12,
    "split master, fp32 moments": 12,
    "split master, bf16 moments (rounds)": 8,
    "split master, 8-bit moments (rounds)": 6.05,
    "stochastic bf16, 8-bit moments (rounds)": 4.05,
    "split master, states on the host": 2,
    "split master, states and inputs on the host": 2,
}


@pytest.mark.parametrize("name", TABLE)
def test_bytes_a_parameter_are_those_of_the_table(name):
    recipe, s = RECIPES[name], parameter_shapes(PYTHIA)
    held = sum(
        parameter_bytes(part, recipe)
        + (0 if "states" in recipe.offload else state_bytes(part, recipe))
        for part in s.parts
    ) + (4 * s.parameters if recipe.engine == "plain" else 0)
    assert held / s.parameters == pytest.approx(TABLE[name], abs=0.005)


def kept_by(trunk, stream, dtype, recompute, monkeypatch):
    """Bytes of what autograd keeps of the first block, counted by storage; parameters, their copies, angles and masks belong to nobody's activations."""
    monkeypatch.setattr(minimore.model.recompute, "_selecting", recompute == "selective")
    rotation, block = rotary_angles(trunk.c, stream.positions), trunk.blocks[0]
    shared = {
        t.untyped_storage().data_ptr()
        for t in (
            *trunk.parameters(),
            *rotation,
            stream.positions,
            *(t for tile in stream.tiles() for t in tile),
            stream.row,
        )
    }
    weights = (
        {p.numel() for p in block.parameters() if p.ndim > 1} if dtype != torch.float32 else set()
    )
    kept = {}

    def keep(t):
        if hasattr(t, "again"):
            return t.again
        if t.untyped_storage().data_ptr() not in shared and not (
            t.ndim == 2 and t.numel() in weights and len(stream.tokens) not in t.shape
        ):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(len(stream.tokens), trunk.c.width, dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(keep, lambda t: t() if callable(t) else t):
        y = block(x, rotation, stream)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SHAPES)
def test_saved_activations_are_planned_to_one_percent(family, dtype, recompute, monkeypatch):
    trunk, shapes = filled(SHAPES[family]), random_shapes(20)
    stream = pack_pairs(pairs_of(shapes)).stream
    assert len(stream.tokens) not in (256, 688, 1024)
    found = kept_by(trunk, stream, dtype, recompute, monkeypatch)
    assert block_activations(trunk.c, shapes, dtype.itemsize, recompute, False) == pytest.approx(
        found, rel=0.01
    )


def test_segments_and_tiles_are_those_of_the_stream():
    shapes = random_shapes(30)
    stream = pack_pairs(pairs_of(shapes)).stream
    assert segments_of(shapes) == stream.segments
    assert tile_shapes(stream.segments) == [
        (len(q), q.shape[1], k.shape[1]) for q, _, k, _ in stream.tiles()
    ]


def test_the_plans_that_the_mission_rests_on():
    """6.9B, 80 pairs of 342 unique tokens: the named lossy recipe on 40 GB without the host, an exact one with the host on 24."""
    peak = lambda name: memory_of(PYTHIA, PAPER, replace(RECIPES[name], recompute="full"), 2, True)
    lossy, exact = (
        peak("stochastic bf16, 8-bit moments (rounds)"),
        peak("split master, states and inputs on the host"),
    )
    assert lossy.peak <= 40e9 and not lossy.host
    assert exact.peak <= 24e9 and sum(exact.host.values()) < 80e9
    assert is_exact(RECIPES["split master, states and inputs on the host"], 2) and not is_exact(
        RECIPES["stochastic bf16, 8-bit moments (rounds)"], 2
    )
    assert is_exact(Recipe("streamed", "split"), 2) and not is_exact(
        Recipe("streamed", "split"), 4
    )  # fp32 computes with more than the half


def test_more_of_anything_takes_more():
    base = memory_of(PYTHIA, PAPER, Recipe("streamed", "split", recompute="full"), 2, True).peak
    longer = replace(PAPER, largest=(PairShape(280, 202, 202),) * 80)
    for work, recipe in (
        (longer, Recipe("streamed", "split", recompute="full")),
        (PAPER, Recipe("streamed", "split", recompute="selective")),
        (PAPER, Recipe("streamed", "split", recompute="full", micro_tokens=16384)),
        (PAPER, Recipe(recompute="full")),
    ):
        assert memory_of(PYTHIA, work, recipe, 2, True).peak > base, recipe


# ---- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHAPES)
def test_flops_are_what_torch_counts(family):
    """Of all matrix products; attention, which torch does not count on a CPU, by hand."""
    c, shapes = SHAPES[family], random_shapes(7)
    trunk, stream = filled(c), pack_pairs(pairs_of(shapes)).stream
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk.residual(stream)
    seen = sum(
        sum(i + 1 for i in range(s.queries)) + s.queries * (s.keys - s.queries)
        for s in stream.segments
    )
    assert (
        forward_flops(c, shapes)
        == counter.get_total_flops() + c.blocks * 4 * c.heads * c.head_width * seen
    )


class Products(TorchDispatchMode):
    """2 x rows x inner x columns of every matrix product. (torch's own counter does not bear autograd.grad.)"""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = arguments[-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*arguments, **named or {})


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_recomputation_costs_what_is_planned(family):
    """Full: the forward pass once more, less the MLP's last product of each block. Attention, counted as no matrix product here, is left out on both sides."""
    c, shapes = SHAPES[family], random_shapes(6)
    model, work = (
        RewardModel(filled(c), fresh_head(c.width, 0)),
        Workload(tuple(shapes), 1, sum(map(sum, shapes))),
    )
    attention = (
        forward_flops(c, shapes)
        - 2 * c.blocks * sum(np.prod(s) for s in parameter_shapes(c).block if len(s) > 1) * work.tokens
    )
    for recompute, forwards in (("none", 3), ("selective", 3), ("full", 4)):
        with Products() as counted:
            list(
                Walk(
                    model,
                    micro_batches(pairs_of(shapes), [0, 1] * 3, 10**9),
                    RewardObjective(2, partial(uniform_weights, state={})),
                    recompute,
                )
            )
        assert step_flops(c, work, Recipe("streamed", recompute=recompute))[
            1
        ] - forwards * attention == pytest.approx(counted.total, rel=1e-3), recompute


# ---- choosing ----------------------------------------------------------------------------------------------------------


def test_workload_is_that_of_the_steps():
    sources = [Source(n, pairs_of(random_shapes(size, size))) for n, size in (("a", 11), ("b", 4))]
    epochs = [epoch_steps([11, 4], "proportional", None, 4, 0, e) for e in range(3)]
    work, totals = (
        workload(sources, epochs),
        [[sum(sources[k].pairs[i].tokens for k, i in step) for step in epoch] for epoch in epochs],
    )
    assert (work.steps, work.tokens) == (12, sum(map(sum, totals))) and sum(
        p.tokens for p in work.largest
    ) == max(map(max, totals))


@pytest.mark.parametrize(
    "limit, fits", [(24e9, True), (40e9, True), (80e9, True), (141e9, True), (12e9, False)]
)
def test_what_is_chosen_is_exact_and_fits(limit, fits, capsys):
    if not fits:
        with pytest.raises(
            InputError, match="the parameters alone take 13.3 GB, training at least"
        ):
            choose(PYTHIA, PAPER, {}, limit, "cuda", torch.bfloat16)
        return
    recipe = choose(PYTHIA, PAPER, {}, limit, "cuda", torch.bfloat16)
    assert is_exact(recipe, 2) and memory_of(PYTHIA, PAPER, recipe, 2, True).peak <= limit
    assert f"of {limit / 1e9:.1f} GB" in (said := capsys.readouterr().out) and str(recipe) in said


def test_the_simplest_is_chosen_where_it_is_as_fast(capsys):
    assert (
        choose(
            GPT_NEOX, replace(PAPER, largest=PAPER.largest[:4]), {}, 24e9, "cuda", torch.bfloat16
        )
        == Recipe()
    )


def test_what_is_given_is_kept_and_lossy_storage_is_never_chosen(capsys):
    recipe = choose(
        PYTHIA, PAPER, {"moments": "int8", "micro_tokens": 4096}, 40e9, "cuda", torch.bfloat16
    )
    assert (
        recipe.moments == "int8" and recipe.parameters != "bfloat16" and recipe.micro_tokens <= 4096
    )
    with pytest.raises(InputError, match="rounds at random"):
        choose(PYTHIA, PAPER, {"offload": ("inputs",)}, 30e9, "cuda", torch.bfloat16)
    with pytest.raises(InputError, match="--parameters split needs --engine streamed"):
        choose(
            PYTHIA, PAPER, {"engine": "plain", "parameters": "split"}, 40e9, "cuda", torch.bfloat16
        )
    for given in ({}, {"engine": "plain"}, {"moments": "int8"}, {"offload": OFFLOADS}):
        assert all(
            getattr(r, k) == v for r in recipes(given) for k, v in given.items()
        ) and recipes(given)


def test_no_more_is_offloaded_than_the_host_has(capsys):
    assert choose(PYTHIA, PAPER, {}, 24e9, "cuda", torch.bfloat16, host=80e9).offload == OFFLOADS
    with pytest.raises(InputError, match="the host has 50.0 GB to offload to; .* rounds at random"):
        choose(PYTHIA, PAPER, {}, 24e9, "cuda", torch.bfloat16, host=50e9)

    with pytest.raises(
        InputError,
        match="--offload states: takes .* of the host's memory, but the host has 50.0 GB to offload to; offload less",
    ):
        choose(PYTHIA, PAPER, {"offload": ("states",)}, 24e9, "cuda", torch.bfloat16, host=50e9)


def test_a_short_window_leaves_flash_attention():
    windowed, shapes = (
        replace(PYTHIA, windows=(50,) * 32),
        replace(PAPER, largest=PAPER.largest[:4]),
    )
    peak = lambda c, flash: memory_of(c, shapes, Recipe(), 2, flash).peak
    assert (
        peak(windowed, True)
        == peak(windowed, False)
        == peak(PYTHIA, False)
        != peak(PYTHIA, True)
        == peak(replace(windowed, windows=(400,) * 32), True)
    )


def test_memory_is_parsed():
    assert parse_memory("24 GB") == 24e9
    assert (parse_memory("24GB"), parse_memory("1.5GiB"), parse_memory("800MB")) == (
        24e9,
        1.5 * 2**30,
        800e6,
    )
    for wrong in (
        "24",
        "GB",
        "-1GB",
        "24 TB",
        "nanGB",
        "infGB",
        "0GB",
        "",
        "1_0GB",
        "٣GB",
        "3\nMB",
        "1e3GB",
    ):
        with pytest.raises(InputError, match="expected a number with its unit"):
            parse_memory(wrong)


# ---- the verb ----------------------------------------------------------------------------------------------------------


def test_a_config_alone_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((GOLDENS / "llama" / "config.json").read_bytes())
    assert (
        main(["plan", str(tmp_path), "--tokens", "100", "--json", str(tmp_path / "plan.json")]) == 0
    )
    said, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    c = read_config(tmp_path)[2]
    assert (
        f"{parameter_shapes(c).parameters:,} parameters" in said
        and found["parameters"] == parameter_shapes(c).parameters
    )
    assert found["fits"]["24"]["engine"] == "plain" and set(found["recipes"]) == set(
        RECIPES
    ) == set(TABLE)
    assert "fullest moment" in said and "H200" in said and "RTX 4090" in said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, World(annotators=("ana", "ben"), train_pairs=(20, 9), test_pairs=6).write(
        directory
    )


def test_plan_reads_the_real_lengths(world, capsys):
    directory, paths = world
    sources = [a for name, (train, _) in paths.items() for a in ("--source", f"{name}={train}")]
    assert main(["plan", str(directory / "model"), *sources, "--batch-size", "4"]) == 0
    assert "7 steps" in (said := capsys.readouterr().out) and "largest step 4 pairs" in said
    assert (
        main(["plan", str(directory / "model"), *sources, "--batch-size", "4", "--epochs", "2000"])
        == 0
    )
    assert "14,000 steps" in capsys.readouterr().out
    assert (
        main(["plan", str(directory / "model"), *sources, "--batch-size", "4", "--seed", "-1"]) == 2
        and "--seed -1: expected" in capsys.readouterr().err
    )
    assert (
        main(["plan", str(directory / "model"), *sources, "--micro-tokens", "-5"]) == 2
        and not capsys.readouterr().out
    )


def test_train_takes_what_fits_and_says_why(world, tmp_path, capsys):
    directory, paths = world
    given = [
        "train",
        "--model",
        str(directory / "model"),
        "--batch-size",
        "4",
        "--output",
        str(tmp_path / "run"),
    ]
    given += [a for name, (train, _) in paths.items() for a in ("--source", f"{name}={train}")]
    assert main([*given, "--memory", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "--memory: " in said and "--engine plain" in said
    assert (
        json.loads((tmp_path / "run" / "options.json").read_text())["recipe"]["engine"] == "plain"
    )
    shutil.rmtree(tmp_path / "run")
    assert main([*given, "--memory", "3.3MB"]) == 0
    assert (
        json.loads((tmp_path / "run" / "options.json").read_text())["recipe"]["recompute"] == "full"
        and "would take" in capsys.readouterr().out
    )
    shutil.rmtree(tmp_path / "run")
    assert (
        main([*given, "--memory", "1GB", "--seed", "-1"]) == 2
        and "--seed -1: expected" in capsys.readouterr().err
    )
    assert main([*given, "--memory", "0.3MB"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tokens", "1"], "--tokens 1: expected"),
        (["--pairs", "0"], "--pairs 0: expected"),
        (["--memory", "24"], "--memory 24: expected"),
        (["--tokens", "5000"], "--tokens 5000: expected"),
        (["--memory", "10kB"], "--memory 10kB: expected"),
        (["--parameters", "split"], "needs --engine streamed"),
        (["--source", "a=missing.jsonl"], "tokenizer.json: no such file"),
        (["--offload", "inputs", "--engine", "streamed"], "needs --recompute full"),
        (["--batch-size", "-3"], "--batch-size -3: expected"),
        (["--batch-size", "1000000"], "--batch-size 1000000: expected 1 to 10000"),
        (["--max-length", "-5"], "--max-length -5: expected"),
        (["--memory", ""], "--memory : expected"),
        (["--micro-tokens", "0"], "--micro-tokens 0: expected"),
    ],
)
def test_bad_plans_are_refused_in_one_line(tmp_path, capsys, words, said):
    (tmp_path / "config.json").write_bytes((GOLDENS / "llama" / "config.json").read_bytes())
    assert main(["plan", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error
