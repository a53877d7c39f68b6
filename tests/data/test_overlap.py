"""Prompts that training and test share: counted, told with an example, silent where it is meant."""

import json

import pytest
from runs import options as train_options

from minimore.cli import main
from minimore.data.overlap import (
    TRAINING_PROMPTS,
    hashes_of,
    overlap_of,
    read_training_prompts,
    refuse_training_files,
    write_training_prompts,
)
from minimore.data.pairs import NO_PROMPT, Source
from minimore.data.prompts import prompt_hash
from minimore.options import InputError
from minimore.train import train


def source_of(*prompts):
    return Source("a", prompts={prompt: i for i, prompt in enumerate(prompts)})


def run_verb(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def leak(world, tmp_path_factory):
    """ana's files, of which the test has two prompts of the training, written otherwise."""
    train_path, test_path = world[1]["ana"]
    lines = train_path.read_text().splitlines()
    records = [json.loads(line) for line in lines[:2]]
    path = tmp_path_factory.mktemp("leak") / "test.jsonl"
    changed = [json.dumps(record).replace("Human: ", "Human:  ") for record in records]
    path.write_text(test_path.read_text() + "".join(line + "\n" for line in changed))
    return train_path, path


@pytest.fixture(scope="module")
def run(world, leak, tmp_path_factory):
    """A run trained on ana's training file."""
    run = tmp_path_factory.mktemp("run") / "run"
    train(train_options(world, run, source=(f"ana={leak[0]}",), batch_size=8))
    return run


def test_prompts_are_the_same_but_for_case_and_white_space():
    assert (
        prompt_hash(" What\n is  IT? ") == prompt_hash("what is it?") != prompt_hash("what is it")
    )
    shared, prompts, example = overlap_of(
        ["b", "A ", "a", "c"], {prompt_hash("a"), prompt_hash("c")}
    )
    assert (shared, prompts, example) == (2, 3, "A ")


def test_the_hashes_in_a_run_are_those_of_its_prompts(tmp_path):
    source = source_of(f"{NO_PROMPT}1", *(f"prompt {i}" for i in range(1000)))
    write_training_prompts(tmp_path, [source])
    path = tmp_path / TRAINING_PROMPTS
    assert read_training_prompts(tmp_path) == {prompt_hash(f"prompt {i}") for i in range(1000)}
    assert path.stat().st_size < 8 * 1000 + 300
    written = path.read_bytes()
    write_training_prompts(tmp_path, [source])
    assert path.read_bytes() == written
    path.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(InputError, match="not as it was written"):
        read_training_prompts(tmp_path)
    assert read_training_prompts(tmp_path / "absent") == set()
    assert hashes_of([source_of(f"{NO_PROMPT}3")]) == set()


@pytest.mark.slow
def test_training_warns_of_a_leak_and_says_nothing_of_clean_files(world, leak, tmp_path, capsys):
    changes = {"source": (f"ana={leak[0]},{leak[1]}",), "batch_size": 8}
    train(train_options(world, tmp_path / "a", **changes))
    said = capsys.readouterr().out
    assert "ana: 2 of 22 test prompts are training prompts, too, such as 'human: " in said
    assert "--allow-overlap" in said
    train(train_options(world, tmp_path / "b", allow_overlap=True, **changes))
    train(train_options(world, tmp_path / "c"))
    assert "prompts are" not in capsys.readouterr().out
    # A run that began without the option may be continued with it.
    resumed = train_options(world, tmp_path / "a", resume=True, allow_overlap=True, **changes)
    assert train(resumed) == 0


def test_evaluation_knows_what_the_run_was_trained_on(world, leak, run, tmp_path, capsys):
    source = ("evaluate", "--model", run, "--source")
    assert run_verb(*source, f"x={leak[1]}") == 0
    assert "x: 2 of 22 test prompts are training prompts" in capsys.readouterr().out
    assert run_verb(*source, f"x={leak[1]}", "--allow-overlap") == 0
    assert run_verb(*source, f"x={world[1]['ana'][1]}") == 0
    assert "prompts are" not in capsys.readouterr().out
    assert run_verb(*source, f"x={leak[1]}", "--calibrate", f"x={world[1]['ana'][1]}") == 0
    assert "x: 20 of 20 calibration prompts are test prompts" in capsys.readouterr().out
    assert run_verb(*source, f"x={leak[0]}") == 2
    assert "the model was trained on this file" in capsys.readouterr().err
    assert run_verb(*source, f"x={leak[0]}", "--allow-overlap") == 0
    # The model of another is compared: it was trained on the test prompts.
    baseline = ("evaluate", "--model", world[0] / "model", "--baseline", run)
    assert run_verb(*baseline, "--source", f"x={leak[1]}") == 0
    assert capsys.readouterr().out.count("test prompts are training prompts") == 1


def test_a_training_file_is_known_under_every_name(tmp_path):
    file, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.touch()
    link.symlink_to(file)
    for trained, tested in ((file, link), (link, file)):
        with pytest.raises(InputError, match="the model was trained on this file"):
            refuse_training_files({"source": [f"a={trained}"]}, {"x": str(tested)})
    refuse_training_files({}, {"x": str(file)})


def test_a_checkpoint_inside_an_unfinished_run_knows_it_too(halted, world, capsys):
    (checkpoint,) = halted.glob("checkpoint-*")
    assert run_verb("evaluate", "--model", checkpoint, "--source", f"x={world[1]['ana'][0]}") == 2
    assert "trained on this file" in capsys.readouterr().err
    assert read_training_prompts(halted)


def test_features_and_reproduce_warn_before_they_compute(world, leak, tmp_path, capsys):
    source = (
        "--source",
        f"ana={leak[0]},{leak[1]}",
        "--source",
        "ben=" + ",".join(map(str, world[1]["ben"])),
    )
    model = ("--model", world[0] / "model")
    grid = ("reproduce", "table2", *model, *source, "--output", tmp_path / "g", "--dry-run")
    for command in (("features", *model, *source, "--output", tmp_path / "f"), grid):
        assert run_verb(*command) == 0
        said = capsys.readouterr().out
        assert said.count("prompts are") == 1 and "ana: 2 of 22 test prompts" in said
    assert run_verb(*grid, "--allow-overlap") == 0
    assert run_verb("features", *model, *source, "--output", tmp_path / "h", "--allow-overlap") == 0
    assert "prompts are" not in capsys.readouterr().out
    same = ("--source", f"ana={leak[0]},{leak[0]}")
    for command in (("features", *model), ("reproduce", "table2", *model)):
        assert run_verb(*command, *same, "--output", tmp_path / "no") == 2
        assert "both training and test file" in capsys.readouterr().err
