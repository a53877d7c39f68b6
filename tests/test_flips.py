"""One flipped bit in a file that we wrote is noticed, or changes no number that we print.

MINIMORE_FLIPS=500 flips so many bits of every kind of directory; otherwise some.
"""

import json
import os
import random
import shutil

import pytest
from runs import content, options, use_small_design

import minimore.training as training
from minimore.cli import main
from minimore.data.records import read_records
from minimore.figures import plots
from minimore.lab import testbed
from minimore.lab.features import load_features
from minimore.options import InputError
from minimore.train import train

FLIPS = int(os.environ.get("MINIMORE_FLIPS", 16))
# What nobody reads again: a log of a finished run, a model card, what the machine was.
NOT_READ = {"metrics.jsonl", "README.md", "environment.json", "evaluation.json"}


def flipped_copies(directory, tmp_path, chance, flips=FLIPS):
    """Copies of a directory with one flipped bit each, and the name of the file that has it."""
    names = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )
    names = [name for name in names if name not in NOT_READ]
    chance.shuffle(names)
    for flip in range(flips):
        name = names[flip % len(names)]
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        data = bytearray((copy / name).read_bytes())
        # Half of them in the beginning, where headers are.
        end = len(data) if flip % 2 else min(len(data), 400)
        data[chance.randrange(end)] ^= 1 << chance.randrange(8)
        (copy / name).write_bytes(data)
        yield copy, name


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(options(world, run)) == 0
    return run


def score(run, world, out, capsys):
    out.unlink(missing_ok=True)
    path = str(world[1]["ana"][1])
    code = main(["score", "--model", str(run), "--input", path, "--output", str(out)])
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and said.count("\n") == 1), said
    return out.read_bytes() if code == 0 else None


@pytest.mark.slow
def test_a_finished_model(world, finished, tmp_path, capsys):
    expected = score(finished, world, tmp_path / "out", capsys)
    refused = 0
    for copy, name in flipped_copies(finished, tmp_path, random.Random(0)):
        scores = score(copy, world, tmp_path / "out", capsys)
        assert scores in (None, expected), name
        refused += scores is None
    assert refused > FLIPS / 2


@pytest.mark.slow
def test_a_checkpoint(world, tmp_path, monkeypatch):
    changes = {"save_steps": 4}
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert train(options(world, whole, **changes)) == 0
    real = training.Schedule.sampled_at

    def sampled_at(schedule, step):
        if step == 6 and schedule.options.output == str(half):
            raise RuntimeError("crash")
        return real(schedule, step)

    monkeypatch.setattr(training.Schedule, "sampled_at", sampled_at)
    with pytest.raises(RuntimeError, match="crash"):
        train(options(world, half, **changes))
    for copy, name in flipped_copies(half, tmp_path, random.Random(1)):
        try:
            assert train(options(world, copy, resume=True, **changes)) == 0
        except InputError:
            continue
        assert content(copy) == content(whole), name


@pytest.mark.slow
def test_stored_features(world, tmp_path, capsys):
    directory, paths = world
    command = ["features", "--model", str(directory / "model"), "--output", str(tmp_path / "f")]
    for name, (train_path, test_path) in paths.items():
        command += ["--source", f"{name}={train_path},{test_path}"]
    assert main(command) == 0
    for copy, name in flipped_copies(tmp_path / "f", tmp_path, random.Random(2)):
        with pytest.raises(InputError):
            load_features(str(copy))
        (copy / "features.json").unlink()  # as if it had been interrupted
        assert main([*command[:4], str(copy), *command[5:]]) == 0
        for file in copy.glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "f" / file.name).read_bytes(), name


GRIDS = {
    "table2": "table2 --seeds 1 --width 16 --pairs 10 --test-pairs 24 --batch-size 10"
    " --scheme uniform",
    "figure7": "figure7 --quick --seeds 1 --pairs 32 --test-pairs 24",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_a_grid(tmp_path, name, capsys, monkeypatch):
    """The same command makes the same report again, or refuses; it trains again what is lost."""
    use_small_design(monkeypatch)
    monkeypatch.setattr(plots, "available", lambda: False)
    grid, whole = tmp_path / "grid", tmp_path / "whole"

    def report():
        for path in grid.glob("report.*"):
            path.unlink()
        code = main(["reproduce", *GRIDS[name].split(), "--output", str(grid)])
        said = capsys.readouterr().err
        assert code == 0 or (code == 2 and "minimore reproduce: " in said.splitlines()[-1]), said
        return (grid / "report.json").read_bytes() if code == 0 else None

    expected = report()
    grid.rename(whole)
    for copy, file in flipped_copies(whole, tmp_path, random.Random(3), max(1, FLIPS // 24)):
        testbed.open_testbed.cache_clear()
        copy.rename(grid)  # a grid knows its own place
        assert report() in (None, expected), file
        shutil.rmtree(grid)


@pytest.mark.slow
def test_a_policy(world, tmp_path, capsys):
    """A fine-tuned policy that samples are drawn from."""
    directory, paths = world
    train_path = str(paths["ana"][0])
    words = ["align", "finetune", "--model", str(directory / "model"), "--input", train_path]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0

    def samples(policy):
        (tmp_path / "out").unlink(missing_ok=True)
        (tmp_path / "out.unfinished").unlink(missing_ok=True)
        words = ["align", "sample", "--model", str(policy), "--input", train_path]
        words += ["--samples", "1", "--max-new-tokens", "3", "--output", str(tmp_path / "out")]
        return (tmp_path / "out").read_bytes() if main(words) == 0 else None

    expected, refused = samples(tmp_path / "run"), 0
    for copy, name in flipped_copies(tmp_path / "run", tmp_path, random.Random(4)):
        drawn = samples(copy)
        assert drawn in (None, expected), name
        refused += drawn is None
    assert refused > FLIPS / 2


def test_a_world(world, tmp_path, capsys):
    """What a world's true rewards are, from its world.json."""
    directory, paths = world
    lines = [{"prompt": f"p{i}", "response": f"{w} {w}"} for i, w in enumerate(("add", "river"))]
    for name, records in (("a", lines), ("b", [line | {"response": "stone"} for line in lines])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def verdict(home):
        (tmp_path / "out").unlink(missing_ok=True)
        words = ["align", "compare", "--judge", f"world:{home}", "--json", str(tmp_path / "out")]
        words += ["--input", str(tmp_path / "a"), "--other", str(tmp_path / "b")]
        return json.loads((tmp_path / "out").read_text()) if main(words) == 0 else None

    (tmp_path / "world").mkdir()
    shutil.copy(directory / "world.json", tmp_path / "world")
    assert verdict(tmp_path / "world") is not None
    for copy, _ in flipped_copies(tmp_path / "world", tmp_path, random.Random(5)):
        assert verdict(copy) is None


# ---- files of records ----------------------------------------------------------------------------


def files_of_records(world, home):
    """A file of each kind that we write and read again, and how it is damaged in `test_records`."""
    directory, paths = world
    pairs = str(paths["ana"][1])
    samples = home / "samples.jsonl"
    records = [json.loads(line) for line in paths["ana"][1].read_text().splitlines()]
    samples.write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]}) + "\n"
            for r in records
        )
    )
    model = str(directory / "model")
    for words in (
        ["score", "--model", model, "--input", pairs, "--output", "scores.jsonl"],
        ["align", "select", "--by", "longest", "--input", str(samples), "--output", "best.jsonl"],
        ["data", "convert", pairs, "--output", "converted"],
        ["data", "split", pairs, "--output", "parts"],
        ["align", "sample", "--model", model, "--input", pairs, "--max-new-tokens", "2"]
        + ["--samples", "1", "--output", "drawn.jsonl"],
    ):
        place = words.index("--output") + 1
        words[place] = str(home / words[place])
        assert main(words) == 0, words
    shutil.copytree(directory / "data", home / "world" / "data")
    shutil.copy(directory / "checksums.json", home / "world")
    return {
        "scores": home / "scores.jsonl",
        "selection": home / "best.jsonl",
        "samples": home / "drawn.jsonl",
        "conversion": home / "converted" / "pairs.jsonl",
        "split": home / "parts" / "train.jsonl",
        "world": home / "world" / "data" / "ana.test.jsonl",
    }


def test_records(world, tmp_path, capsys):
    """Whatever happens to a file of records that we wrote, it is refused; others are not."""
    chance = random.Random(6)
    for kind, path in files_of_records(world, tmp_path).items():
        whole = path.read_bytes()
        assert list(read_records(str(path))), kind
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        lines = whole.splitlines(keepends=True)
        swapped = b"".join([lines[1], lines[0], *lines[2:]])
        for damaged in (bytes(flipped), b"".join(lines[:-1]), swapped, whole + lines[0], b""):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match="is not as it was written.*changed on purpose"):
                list(read_records(str(path)))
        path.rename(tmp_path / "mine.jsonl")  # a copy of another name has no checksum
        list(read_records(str(tmp_path / "mine.jsonl")))


def test_a_checksum_that_is_damaged_or_somebody_elses(world, tmp_path, capsys):
    path = files_of_records(world, tmp_path)["scores"]
    beside = tmp_path / "scores.jsonl.crc32"
    for damaged in (b"", b"\xff", b"0" * 8, beside.read_bytes()[:7]):
        beside.write_bytes(damaged)
        with pytest.raises(InputError, match="remove .*scores.jsonl.crc32 if it was changed"):
            list(read_records(str(path)))
    beside.unlink()
    assert list(read_records(str(path)))
    (tmp_path / "home").mkdir()
    path = path.rename(tmp_path / "home" / path.name)
    for anothers in ('{"scores.jsonl": "its md5"}', "[1, 2]", "3", "", "md5 scores.jsonl", "{"):
        for directory in (tmp_path, path.parent):
            (directory / "checksums.json").write_text(anothers)
            assert list(read_records(str(path)))
