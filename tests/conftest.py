"""What tests share: the stored tiny models, copies of them to damage, transformers as an oracle."""

import json
import os
import shutil
from pathlib import Path

# Before torch is imported, and for the processes that tests start: with a second thread tiny models
# lose time, on a busy machine 20 times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from reference import quiet_transformers
from runs import options
from safetensors.torch import load_file, save_file

from minimore.data.world import World
from minimore.model.checkpoint import Checkpoint
from minimore.reward import RewardModel
from minimore.train import train

torch.set_num_threads(1)

# The files that take longest, of about 10 to 90 seconds each.
LONGEST = (
    *("test_tutorials.py", "test_engine.py", "test_resume.py", "test_figure7.py"),
    *("test_reproduce.py", "test_trunk.py", "test_look.py", "test_distributed.py"),
    *("test_best.py", "test_world.py", "test_policies.py", "test_language.py"),
    *("test_finetune.py", "test_power_cut.py", "test_flips.py", "test_uncertainty.py"),
    *("test_cli.py", "test_get.py", "test_generate.py", "test_endpoint.py", "test_run.py"),
)

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that none of them is left alone in the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("transformers")
    return quiet_transformers()


@pytest.fixture(params=["gpt_neox", "llama"])
def golden(request) -> Path:
    """The directory of each stored tiny model in turn."""
    return GOLDENS / request.param


@pytest.fixture
def model(golden) -> RewardModel:
    return open_model(golden)


@pytest.fixture
def damaged(tmp_path):
    """damaged(family, config={...}, weights=function): a copy of a stored model, changed.

    The value ... deletes a key.
    """

    def copy(family="llama", config=None, weights=None) -> Path:
        directory = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDENS / family, directory)
        if config:
            edit_json(directory / "config.json", config)
        if weights:
            save_file(
                weights(load_file(directory / "model.safetensors")), directory / "model.safetensors"
            )
        return directory

    return copy


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(30, 24, 12), test_pairs=20).write(
        directory
    )
    return directory, paths


@pytest.fixture(scope="session")
def halted(world, tmp_path_factory):
    """A run with a checkpoint, not finished."""
    run = tmp_path_factory.mktemp("halted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimore.train.finish", lambda *a: None)
        train(options(world, run, save_steps=2, gradient_average=0.5))
    return run


class KeepsGradients:
    """Stands in for an optimizer: changes nothing, and keeps the gradients of the last step."""

    def __init__(self):
        self.gradients, self.steps = {}, 0

    def update(self, name, parameter, gradient):
        self.gradients[name] = gradient.clone()


def open_model(directory, dtype=torch.float32) -> RewardModel:
    return RewardModel(*Checkpoint(str(directory)).load(dtype))


def edit_json(path: Path, changes: dict):
    """Set keys of a JSON object; the value ... deletes one."""
    values = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}), "utf-8")


def write_checkpoint(theirs, directory) -> Checkpoint:
    """Save a model of transformers with a stored tokenizer of its kind, and open it."""
    theirs.save_pretrained(directory)
    family = "gpt_neox" if theirs.config.model_type == "gpt_neox" else "llama"
    shutil.copy(GOLDENS / family / "tokenizer.json", directory)
    if theirs.config.model_type.startswith("qwen"):  # transformers composes letters there
        edit_json(directory / "tokenizer.json", {"normalizer": {"type": "NFC"}})
    return Checkpoint(str(directory))
