"""Sample, select, fine-tune: with a real model of children's stories and a reward that is known."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from minimore.alignment.finetune import FinetuneOptions, finetune
from minimore.alignment.sample import SampleOptions, sample

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
STORIES = DATA / "models" / "stories260k"
NAMES = ("Lily", "Tim", "Sue", "Ben", "Mia", "Tom", "Anna", "Max", "Sara", "Jack", "Amy", "Sam")
OPENINGS = ("Once upon a time, there was", "One day,", "In a big house, there lived", "There was")


def quoted_share(story):
    """The share of its sentences in which somebody speaks: what we want more of."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", story) if part.strip()]
    return np.mean(['"' in sentence for sentence in sentences]) if sentences else 0.0


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="MINIMORE_DATA has no models/stories260k")
def test_a_policy_learns_to_let_people_speak(tmp_path):
    """Best of eight by the known reward, against any one of the eight, on openings not seen."""
    prompts = [{"prompt": f"{opening} {name}"} for opening in OPENINGS for name in NAMES]
    seen = write(tmp_path / "seen.jsonl", prompts[:36])
    new = write(tmp_path / "new.jsonl", prompts[36:])

    def stories(model, path, output, count):
        options = SampleOptions(
            model=str(model),
            input=path,
            output=str(tmp_path / output),
            samples=count,
            max_new_tokens=100,
            max_length=32,
            batch_size=96,
        )
        sample(options)
        return lines_of(tmp_path / output)

    def trained_on(name, choice):
        chosen = []
        for record in stories_of_base:
            place = choice([quoted_share(story) for story in record["responses"]])
            pair = {"response": record["responses"][place], "finished": record["finished"][place]}
            chosen.append({"prompt": record["prompt"]} | pair)
        options = FinetuneOptions(
            model=str(STORIES),
            input=(write(tmp_path / f"{name}.jsonl", chosen),),
            output=str(tmp_path / name),
            learning_rate=1e-3,
            epochs=4,
            batch_size=9,
        )
        assert finetune(options) == 0
        answers = stories(tmp_path / name, new, f"{name}-new.jsonl", 8)
        return [np.mean([quoted_share(s) for s in record["responses"]]) for record in answers]

    stories_of_base = stories(STORIES, seen, "samples.jsonl", 8)
    random = np.random.default_rng(0)
    best = np.array(trained_on("best", np.argmax))
    other = np.array(trained_on("random", lambda shares: random.integers(len(shares))))
    gain = best - other  # of every opening that was not seen
    assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain))
    assert gain.mean() > 0.05
