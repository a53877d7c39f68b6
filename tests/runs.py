"""What several tests share: small trainings and what must be equal of two, marks of parameters."""

import json
from dataclasses import replace

import pytest
from processes import run_to_the_end

from minimore.lab import grid
from minimore.lab.policies import QUICK, Fitting
from minimore.reward_training import TrainOptions


def slow_but(quick, parameters):
    """Parameters of a test, of which only some are not marked as slow."""
    return [
        parameter if parameter in quick else pytest.param(parameter, marks=pytest.mark.slow)
        for parameter in parameters
    ]


def options(world, output, **changes):
    directory, paths = world
    return TrainOptions(
        **{
            "model": str(directory / "model"),
            "output": str(output),
            "learning_rate": 1e-3,
            "batch_size": 6,
            "source": tuple(f"{n}={a},{b}" for n, (a, b) in paths.items()),
            "log_steps": 100,
        }
        | changes
    )


def content(run):
    """Everything that must be equal to the bit; wall time is left out."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        (run / "model.safetensors").read_bytes(),
        json.loads((run / "evaluation.json").read_text()),
        [{k: v for k, v in s.items() if k != "seconds"} for s in steps],
        [
            (run / name).read_bytes()
            for name in ("config.json", "tokenizer_config.json", "checksums.json")
        ],
    )


# The quick cut of figure7 and table1, smaller: policies that have barely learned the world's words.
SMALL_DESIGN = replace(
    QUICK,
    base=Fitting(40, 8, 1e-2),
    tuning=Fitting(4, 10, 2e-3),
    prompts=40,
    curve_prompts=8,
    curve_samples=8,
    test_prompts=20,
    preferred=4,
)


def use_small_design(patch=None):
    """Let --quick mean the small design, in this process or as long as a patch lasts."""
    (patch or pytest.MonkeyPatch()).setattr(grid, "QUICK", SMALL_DESIGN)


RECIPES = {
    "streamed": {"engine": "streamed"},
    "split": {
        "engine": "streamed",
        "parameters": "split",
        "recompute": "selective",
        "micro_tokens": 100,
    },
    "offloaded": {
        "engine": "streamed",
        "parameters": "split",
        "recompute": "full",
        "offload": ("inputs", "states"),
        "micro_tokens": 100,
    },
    "lossy": {
        "engine": "streamed",
        "parameters": "bfloat16",
        "moments": "int8",
        "recompute": "full",
    },
    "half lossy": {"engine": "streamed", "parameters": "split", "moments": "bfloat16"},
    "8 bits, plain": {"moments": "int8"},
}


def command(train_options):
    """The command line that gives these options."""
    words = ["train"]
    for key, value in vars(train_options).items():
        flag = "--" + key.replace("_", "-")
        for single in value if isinstance(value, tuple) else [value]:
            if single is True:
                words.append(flag)
            elif single is not None and single is not False:
                words += [flag, str(single)]
    return words


def run_command(train_options):
    """Train in a process of its own, to the end."""
    run_to_the_end(command(train_options))


def unfinished(run):
    """Nothing in it looks finished, and nothing half-written lies about."""
    return not (run / "config.json").exists() and not list(run.rglob("*.partial*"))
