"""What fits is chosen, and it is exact; the verb says so on one page."""

import argparse
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDENS
from shapes import GPT_NEOX, PAPER, PYTHIA

from minimore.cli import main
from minimore.data.world import World
from minimore.engine.choose import (
    Job,
    choose,
    exact_recipes,
    is_exact,
    leanest,
    parse_memory,
    recipes,
    what_would_fit,
)
from minimore.engine.flops import GPUS
from minimore.engine.memory import memory_of
from minimore.engine.plan import RECIPES
from minimore.engine.recipe import OFFLOADS, Recipe, RecipeOptions
from minimore.engine.sizes import checkpoint_bytes, parameter_shapes
from minimore.model.checkpoint import read_config
from minimore.options import InputError, add_options


def chosen_on_cuda(fixed, limit, config=PYTHIA, work=PAPER, **host):
    return choose(config, work, fixed, limit, "cuda", torch.bfloat16, **host)


# ---- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [24e9, 40e9, 80e9, 141e9])
def test_what_is_chosen_is_exact_and_fits(limit, capsys):
    recipe = chosen_on_cuda({}, limit)
    assert is_exact(recipe, 2)
    assert memory_of(PYTHIA, PAPER, recipe, 2, True).peak <= limit
    said = capsys.readouterr().out
    assert f"of {limit / 1e9:.1f} GB" in said and str(recipe) in said


def test_too_little_memory_is_refused():
    with pytest.raises(InputError, match="the parameters alone take 13.3 GB, training at least"):
        chosen_on_cuda({}, 12e9)


def test_the_simplest_is_chosen_where_it_is_as_fast(capsys):
    work = replace(PAPER, largest=PAPER.largest[:4])
    assert chosen_on_cuda({}, 24e9, config=GPT_NEOX, work=work) == Recipe()


def test_what_is_fixed_is_kept(capsys):
    recipe = chosen_on_cuda({"moments": "int8", "micro_tokens": 4096}, 40e9)
    assert recipe.moments == "int8" and recipe.micro_tokens <= 4096
    assert recipe.parameters != "bfloat16"  # lossy storage is never chosen
    for fixed in ({}, {"engine": "plain"}, {"moments": "int8"}, {"offload": OFFLOADS}):
        consistent = recipes(fixed)
        assert consistent
        for name, value in fixed.items():
            assert all(getattr(recipe, name) == value for recipe in consistent), name


def test_lossy_storage_is_named_where_nothing_exact_fits():
    with pytest.raises(InputError, match="rounds at random"):
        chosen_on_cuda({"offload": ("inputs",)}, 30e9)


SMALL = Job(GPT_NEOX, PAPER, 4, False)


def recipe_of(words):
    """The recipe that an offer names, and the pairs a step."""
    named = re.search(r" with (--batch-size (\d+) )?(--engine [^,;]*)", words)
    parser = argparse.ArgumentParser()
    add_options(parser, RecipeOptions)
    parser.add_argument("--micro-tokens", type=int)
    values = vars(parser.parse_args(named[3].split()))
    values["offload"] = tuple(values["offload"])
    return Recipe(**{k: v for k, v in values.items() if v}), int(named[2] or len(PAPER.largest))


@pytest.mark.parametrize("share, pairs", [(0.75, 40), (0.6, 20), (0.3, 10)])
def test_what_is_offered_fits_and_rounds_only_where_it_must(share, pairs):
    """Of the leanest exact recipe's peak: with fewer pairs a step, and then with what rounds."""
    streamed = {"engine": "streamed", "offload": ()}
    limit = share * leanest(SMALL, exact_recipes(streamed, 4), math.inf).memory.peak
    words = what_would_fit(SMALL, streamed, limit, math.inf)
    recipe, offered = recipe_of(words)
    smaller = replace(SMALL, work=replace(PAPER, largest=PAPER.largest[:offered]))
    assert smaller.memory(recipe).peak <= limit and offered == pairs
    assert is_exact(recipe, 4) == ("rounds" not in words) == (share > 0.5)


def test_fewer_tokens_at_a_time_come_before_fewer_pairs():
    limit = leanest(SMALL, exact_recipes({}, 4), math.inf).memory.peak - 1
    recipe, pairs = recipe_of(what_would_fit(SMALL, {}, limit, math.inf))
    assert recipe.micro_tokens < 1024 and is_exact(recipe, 4) and pairs == 80


def test_nothing_is_offered_where_nothing_fits():
    words = what_would_fit(SMALL, {}, 1e6, math.inf)
    assert "do not fit either" in words and "--engine" not in words and "--batch-size" not in words


def test_what_contradicts_itself_is_refused():
    with pytest.raises(InputError, match="--parameters split needs --engine streamed"):
        chosen_on_cuda({"engine": "plain", "parameters": "split"}, 40e9)


@pytest.mark.slow
def test_no_more_is_offloaded_than_the_host_has(capsys):
    assert chosen_on_cuda({}, 24e9, host=80e9).offload == OFFLOADS
    with pytest.raises(InputError, match="the host has 50.0 GB to offload to; .* rounds at random"):
        chosen_on_cuda({}, 24e9, host=50e9)
    expected = (
        "--offload states: takes .* of the host's memory, but the host has 50.0 GB to offload to; "
        "offload less"
    )
    with pytest.raises(InputError, match=expected):
        chosen_on_cuda({"offload": ("states",)}, 24e9, host=50e9)


def test_memory_is_parsed():
    right = {"24 GB": 24e9, "24GB": 24e9, "1.5GiB": 1.5 * 2**30, "800MB": 800e6}
    assert {text: parse_memory(text) for text in right} == right
    wrong = ("24", "GB", "-1GB", "24 TB", "nanGB", "infGB", "0GB", "", "1_0GB", "٣GB", "3\nMB")
    for text in (*wrong, "1e3GB", "1.5kB"):
        with pytest.raises(InputError, match="expected a number with its unit"):
            parse_memory(text)


# ---- the verb ------------------------------------------------------------------------------------


@pytest.fixture
def config_only(tmp_path):
    """A directory that holds a config.json and nothing else."""
    config = (GOLDENS / "llama" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    return tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The directory of a model, and the options that name two training files of 20 and 9 pairs."""
    home = tmp_path_factory.mktemp("world")
    world = World(annotators=("ana", "ben"), train_pairs=(20, 9), test_pairs=6)
    options = []
    for name, (train, _) in world.write(home).items():
        options += ["--source", f"{name}={train}"]
    return home / "model", options


def test_a_config_alone_is_enough(config_only, capsys):
    written = config_only / "plan.json"
    assert main(["plan", str(config_only), "--tokens", "100", "--json", str(written)]) == 0
    said, figures = capsys.readouterr().out, json.loads(written.read_text())
    parameters = parameter_shapes(read_config(config_only)[2]).parameters
    assert f"{parameters:,} parameters" in said and figures["parameters"] == parameters
    assert figures["fits"]["24"]["engine"] == "plain"
    assert set(figures["recipes"]) == set(RECIPES)
    for words in ("fullest phase", "H200", "RTX 4090"):
        assert words in said


def test_the_page_is_about_the_recipe_that_is_named(config_only, capsys):
    written = config_only / "plan.json"
    named = ["--engine", "streamed", "--moments", "bfloat16", "--recompute", "selective"]
    assert main(["plan", str(config_only), *named, "--json", str(written)]) == 0
    expected = Recipe("streamed", moments="bfloat16", recompute="selective")
    shown = json.loads(written.read_text())["recipe"]["recipe"]
    assert str(expected) in capsys.readouterr().out
    assert Recipe(**shown | {"offload": tuple(shown["offload"])}) == expected


def test_plan_reads_the_real_lengths(world, capsys):
    model, sources = world
    plan = ["plan", str(model), *sources, "--batch-size", "4"]
    assert main(plan) == 0
    said = capsys.readouterr().out
    assert "7 steps" in said and "largest step 4 pairs" in said
    assert main([*plan, "--epochs", "2000"]) == 0
    assert "14,000 steps" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seed", "--micro-tokens"])
def test_plan_refuses_before_it_prints(world, option, capsys):
    model, sources = world
    assert main(["plan", str(model), *sources, "--batch-size", "4", option, "-1"]) == 2
    said = capsys.readouterr()
    assert f"{option} -1: expected" in said.err and not said.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory, field, value, reason",
    [("1GB", "engine", "plain", "--engine plain"), ("3.3MB", "recompute", "full", "would take")],
)
def test_train_takes_what_fits_and_says_why(world, tmp_path, capsys, memory, field, value, reason):
    model, sources = world
    run = tmp_path / "run"
    train = ["train", "--model", str(model), *sources, "--batch-size", "4", "--output", str(run)]
    assert main([*train, "--memory", memory]) == 0
    said = capsys.readouterr().out
    assert "--memory: " in said and reason in said
    assert json.loads((run / "options.json").read_text())["recipe"][field] == value


@pytest.mark.parametrize(
    "words, error",
    [
        (["--memory", "1GB", "--seed", "-1"], "--seed -1: expected"),
        (["--memory", "0.3MB"], "--memory: 300.0 kB are too little"),
    ],
)
def test_train_makes_nothing_where_nothing_fits(world, tmp_path, capsys, words, error):
    model, sources = world
    run = tmp_path / "run"
    train = ["train", "--model", str(model), *sources, "--batch-size", "4", "--output", str(run)]
    assert main([*train, *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and error in said and not run.exists()


@pytest.mark.parametrize(
    "words, error",
    [
        (["--tokens", "1"], "--tokens 1: expected"),
        (["--pairs", "0"], "--pairs 0: expected"),
        (["--memory", "24"], "--memory 24: expected"),
        (["--tokens", "5000"], "--tokens 5000: expected 2 to 1024 (twice --max-length)"),
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
def test_bad_plans_are_refused_in_one_line(config_only, capsys, words, error):
    assert main(["plan", str(config_only), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and error in said, said


# ---- the host and the disk -----------------------------------------------------------------------


def test_what_is_offloaded_counts_against_the_host(config_only, capsys):
    lean = ["--engine", "streamed", "--offload", "states"]
    for host, is_enough in (("1GB", True), ("0.01MB", False)):
        assert main(["plan", str(config_only), "--host-memory", host, *lean]) == 0
        said = capsys.readouterr().out
        row = next(line for line in said.splitlines() if line.startswith("split master, states on"))
        assert ("  host " in row) == ("too little" in said) == (not is_enough)
    assert main(["plan", str(config_only), "--host-memory", "1"]) == 2
    assert "--host-memory 1: expected a number with its unit" in capsys.readouterr().err


def test_the_disk_is_compared_with_what_checkpoints_take(
    config_only, tmp_path, capsys, monkeypatch
):
    each = checkpoint_bytes(parameter_shapes(read_config(config_only)[2]), Recipe())
    plan = ["plan", str(config_only), "--keep", "2"]
    assert main(plan) == 0
    assert f"at most {3 * each / 1e3:.1f} kB: --keep 2 and" in capsys.readouterr().out
    for free, verdict in ((3 * each, "enough"), (3 * each - 1000, "too little by 1.0 kB")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("minimore.engine.plan.shutil.disk_usage", lambda _, usage=usage: usage)
        assert main([*plan, "--output", str(tmp_path / "not" / "yet")]) == 0
        assert verdict in capsys.readouterr().out.replace("\n    ", " ")


# ---- several GPUs --------------------------------------------------------------------------------


def test_several_gpus_share_model_and_pairs():
    one = Job(PYTHIA, PAPER, 2, True)
    four = replace(one, gpus=4)
    recipe = Recipe(recompute="full")
    ours, theirs = one.memory(recipe).device, four.memory(recipe).device
    for kind in ("parameters", "optimizer states"):
        assert theirs[kind] == ours[kind] // 4
    assert four.share.largest_tokens * 4 == PAPER.largest_tokens
    assert 3.9 < one.seconds(recipe, GPUS["H200"]) / four.seconds(recipe, GPUS["H200"]) < 6
    slow = GPUS["H200"]._replace(peers=1e9)  # then sending is what takes the time
    assert four.seconds(recipe, slow) == pytest.approx(3 * 0.75 * 4 * 6650736640 / 1e9)


def test_the_page_of_several_gpus(config_only, capsys):
    assert main(["plan", str(config_only), "--gpus", "4"]) == 0
    said = capsys.readouterr().out
    assert "each of 4 GPUs" in said and "streamed" not in said
    assert main(["plan", str(config_only), "--gpus", "4", "--memory", "24GB"]) == 0
    for words in (
        ["--engine", "streamed"],
        ["--moments", "int8"],
        ["--moments", "int8", "--memory", "24GB"],
        ["--batch-size", "3"],
        ["--objective", "language"],
    ):
        assert main(["plan", str(config_only), "--gpus", "4", *words]) == 2, words
