"""Thousands of damaged inputs: never a traceback, never a leftover.

MINIMORE_FUZZ=10000 sets their number (default 200).
"""

import json
import os
import random
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

from minimore.cli import main
from minimore.model.sandbox import peak_memory

COUNT = int(os.environ.get("MINIMORE_FUZZ", 200))
PAIRS = [
    {"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": " 2", "rejected": " three"},
    {"text": ["a", "b", "c"], "score": [1, 2.5, 1]},
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
    },
]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    10**6,
    2**31,
    2**63,
    10**400,
    1e308,
    -1e-308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\0",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": {}},
    [1, 2],
    "../x",
    "default",
    "linear",
    "llama3",
    "BPE",
    "gelu",
]


MOST_SECONDS = 60  # a guard against hangs, no measurement
MOST_MEMORY = 1_500_000_000  # bytes more than the process had before


@contextmanager
def within_limits(label):
    """Within, one command may take neither minutes nor all of the memory."""
    began, peak = time.monotonic(), peak_memory()
    yield
    seconds, memory = time.monotonic() - began, peak_memory() - peak
    assert seconds < MOST_SECONDS and memory < MOST_MEMORY, f"{label}: {seconds} s, {memory} bytes"


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes in up to three places."""
    for _ in range(chance.randint(1, 3)):
        a = chance.randrange(len(data) + 1)
        b = min(len(data), a + chance.choice((1, 2, 8, 100, 10**6)))
        new = chance.choice(
            (
                b"",
                data[a:b] * 2,
                bytes(chance.randrange(256) for _ in range(b - a if b - a < 200 else 7)),
                b"\xff",
                b'"',
                b"{",
                b"[",
                b"}",
            )
        )
        data = data[:a] + new + data[b:]
    return data


def damage_value(value, chance: random.Random):
    """Replace, delete or repeat one value somewhere in a JSON document."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damage_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        i = chance.randrange(len(value))
        return value[:i] + [damage_value(value[i], chance)] * chance.randint(0, 2) + value[i + 1 :]
    return chance.choice(ODD)


def damage_file(path, chance: random.Random):
    data = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.7:
        path.write_text(json.dumps(damage_value(json.loads(data), chance)))
    elif path.suffix == ".safetensors" and chance.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        if chance.random() < 0.5:
            header = json.dumps(damage_value(json.loads(header), chance)).encode()
        else:
            header = damage_bytes(header, chance)
        path.write_bytes(
            (
                len(header) if chance.random() < 0.8 else chance.choice((0, 1, 2**40, 2**64 - 1))
            ).to_bytes(8, "little")
            + header
            + data[8 + length :]
        )
    else:
        path.write_bytes(damage_bytes(data, chance))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories in every format that opens, with each kind of tokenizer file.

    One file, shards, .bin, sharded .bin.
    """
    home, made = tmp_path_factory.mktemp("models"), []
    for name, family in (
        ("plain", "gpt_neox"),
        ("plain-too", "llama"),
        ("shards", "llama"),
        ("bin", "gpt_neox"),
        ("bin-shards", "llama"),
        ("chat", "llama"),
        ("merges", "llama"),
    ):
        directory = home / name
        shutil.copytree(GOLDENS / family, directory)
        tensors = load_file(directory / "model.safetensors")
        if name != "plain":
            (directory / "expected.json").unlink(missing_ok=True)
        if name in ("shards", "bin-shards"):
            kind, save = ("model", save_file) if name == "shards" else ("pytorch_model", torch.save)
            suffix = ".safetensors" if name == "shards" else ".bin"
            (directory / "model.safetensors").unlink()
            where = {k: f"{kind}-0000{1 + (i % 2)}-of-00002{suffix}" for i, k in enumerate(tensors)}
            for file in set(where.values()):
                save({k: t for k, t in tensors.items() if where[k] == file}, directory / file)
            (directory / f"{kind}{suffix}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": where})
            )
        if name == "bin":
            (directory / "model.safetensors").unlink()
            torch.save(tensors, directory / "pytorch_model.bin")
        if name == "chat":
            (directory / "tokenizer_config.json").write_text(
                json.dumps(
                    {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
                )
            )
            (directory / "special_tokens_map.json").write_text(
                json.dumps({"pad_token": "</s>", "unk_token": {"content": "<unk>"}})
            )
            (directory / "chat_template.jinja").write_text(
                "{% for m in messages %}"
                "{{ bos_token + m['role'] + '|' + m['content'] + '\\n' }}{% endfor %}"
            )
        if name == "merges":
            model = json.loads((directory / "tokenizer.json").read_text())["model"]
            (directory / "tokenizer.json").unlink()
            (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
            (directory / "merges.txt").write_text(
                "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
            )
        made.append(directory)
    return made


VERBS = (
    ["evaluate", "--source", "a=PAIRS", "--json"],
    ["score", "--input", "PAIRS", "--output"],
    ["check", "--parity", "none", "--json"],
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_damaged_inputs_end_in_one_line(part, models, tmp_path, capsys):
    chance, codes, model, damaged = random.Random(part), {}, tmp_path / "model", set()
    for case in range(COUNT // 2):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(models[case % len(models)], model)
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
        verb = VERBS[chance.randrange(3)]
        target = chance.choice(
            sorted(p for p in model.iterdir() if p.name != "expected.json")
            + [pairs, pairs] * (verb[0] != "check")
        )
        damage_file(target, chance)
        damaged.add(target.name)
        kept = target.read_bytes()
        capsys.readouterr()
        words = [verb[0], "--model", model, *verb[1:], tmp_path / "out"]
        with within_limits(f"part {part}, case {case}, {target.name}, {kept[:300]!r}"):
            code = main([str(word).replace("PAIRS", str(pairs)) for word in words])
        said = [
            line
            for line in capsys.readouterr().err.splitlines()
            if "the chat template may write a date" not in line
        ]
        label = f"part {part}, case {case}, {verb[0]}, {target.name}, {kept[:300]!r}: {said}"
        assert code in (0, 1, 2) and (
            code == 0 or (len(said) == 1 and said[0].startswith(f"minimore {verb[0]}: "))
        ), label
        assert (tmp_path / "out").exists() == (code == 0), label
        for path in tmp_path.glob("out*"):
            path.unlink()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "pairs.jsonl"], label
        codes[code] = codes.get(code, 0) + 1
    assert codes[2] > COUNT // 20, codes  # the damage is real
    assert len(damaged) > 8, damaged
