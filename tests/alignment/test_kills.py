"""Every step of an alignment is killed at random moments, continued, and ends with the same bytes.

SIGKILL, whatever is going on. MINIMORE_KILLS=20 kills every step so often.
"""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from processes import Command, run_to_the_end
from safetensors.torch import load_file

from minimore.data.world import World
from minimore.model.tensors import write_tensors

KILLS = int(os.environ.get("MINIMORE_KILLS", 2))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy and a reward model with random weights, pairs, and samples to select from."""
    home = tmp_path_factory.mktemp("home")
    World(annotators=("ana", "ben"), train_pairs=(90,), test_pairs=5).write(home)
    (home / "reward").mkdir()
    for path in (home / "model").iterdir():
        shutil.copy(path, home / "reward")
    weights = home / "reward" / "model.safetensors"
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    write_tensors(weights, load_file(weights) | {"score.weight": head})
    lines = (home / "data/ana.train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines] * 6
    samples = [
        {"prompt": record["prompt"], "responses": [record["chosen"], record["rejected"]] * 2}
        for record in records
    ]
    (home / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return home


STEPS = {
    "sample": "--model model --input data/ana.train.jsonl --samples 4 --max-new-tokens 24"
    " --batch-size 16",
    "select": "--model reward --input samples.jsonl",
    "finetune": "--model model --input data/ana.train.jsonl --batch-size 6 --save-steps 1",
}


def command(step, output):
    return ["align", step, *STEPS[step].split(), "--output", output, "--resume"]


def content(output):
    """The bytes of a file, or of those of a run that hold no time."""
    if output.is_file():
        return output.read_bytes()
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return (output / "model.safetensors").read_bytes(), [line["loss"] for line in log]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_random_moments(home, tmp_path, step):
    random = np.random.default_rng(0)
    began = time.monotonic()
    whole = tmp_path / "whole"
    run_to_the_end(command(step, whole), home)
    seconds = time.monotonic() - began
    output, killed, in_the_middle = tmp_path / "output", 0, 0
    while killed < KILLS:
        process = Command(command(step, output), home)
        code = process.wait(seconds * random.uniform(0.1, 1.0))
        if code is not None:
            assert code == 0, process.error
            assert content(output) == content(whole)
            shutil.rmtree(output) if output.is_dir() else output.unlink()
            continue
        process.signal(signal.SIGKILL)
        process.wait()
        killed += 1
        in_the_middle += any(tmp_path.glob("output*"))
        if output.is_file():  # the kill came when all was done: nothing is left to continue
            assert content(output) == content(whole)
            for path in tmp_path.glob("output*"):
                path.unlink()
    if not output.is_file():  # else the last kill came when all was done
        run_to_the_end(command(step, output), home)
    assert content(output) == content(whole)
    assert not list(tmp_path.rglob("*.partial"))
    if KILLS >= 20:
        assert in_the_middle > KILLS // 4  # the kills met the work, not the imports alone
