"""Thousands of damaged inputs: never a traceback, never a leftover. MINIMORE_FUZZ=10000 sets the number (default 400)."""

import json
import os
import random
import shutil

import pytest
from conftest import GOLDENS

from minimore.cli import main

COUNT = int(os.environ.get("MINIMORE_FUZZ", 400))
PAIRS = [{"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": " 2", "rejected": " three"}, {"text": ["a", "b", "c"], "score": [1, 2.5, 1]},
         {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}]
ODD = [None, True, False, 0, -1, 1, 2, 3, 10 ** 6, 2 ** 31, 2 ** 63, 10 ** 400, 1e308, -1e-308, float("nan"), float("inf"), "", "a", "\0", "\ud800", "x" * 5000,
       [], [[]], {}, {"a": {}}, [1, 2], "../x", "default", "linear", "llama3", "BPE", "gelu"]


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes in up to three places."""
    for _ in range(chance.randint(1, 3)):
        a = chance.randrange(len(data) + 1)
        b = min(len(data), a + chance.choice((1, 2, 8, 100, 10 ** 6)))
        new = chance.choice((b"", data[a:b] * 2, bytes(chance.randrange(256) for _ in range(b - a if b - a < 200 else 7)), b"\xff", b'"', b"{", b"[", b"}"))
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
        return value[:i] + [damage_value(value[i], chance)] * chance.randint(0, 2) + value[i + 1:]
    return chance.choice(ODD)


def damage_file(path, chance: random.Random):
    data = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.7:
        path.write_text(json.dumps(damage_value(json.loads(data), chance)))
    elif path.suffix == ".safetensors" and chance.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = data[8:8 + length]
        if chance.random() < 0.5:
            header = json.dumps(damage_value(json.loads(header), chance)).encode()
        else:
            header = damage_bytes(header, chance)
        path.write_bytes((len(header) if chance.random() < 0.8 else chance.choice((0, 1, 2 ** 40, 2 ** 64 - 1))).to_bytes(8, "little") + header + data[8 + length:])
    else:
        path.write_bytes(damage_bytes(data, chance))


@pytest.mark.parametrize("part", range(4))
def test_damaged_inputs_end_in_one_line(part, tmp_path, capsys):
    chance, codes, model = random.Random(part), {}, tmp_path / "model"
    for case in range(COUNT // 4):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(GOLDENS / ("llama" if case % 2 else "gpt_neox"), model)
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
        target = chance.choice([pairs, pairs, *(model / n for n in ("config.json", "tokenizer.json", "model.safetensors"))])
        damage_file(target, chance)
        kept = target.read_bytes()
        arguments = [["evaluate", "--source", f"a={pairs}", "--json"], ["score", "--input", str(pairs), "--output"]][case % 3 == 0]
        capsys.readouterr()
        code = main([arguments[0], "--model", str(model), *arguments[1:], str(tmp_path / "out")])
        said = capsys.readouterr().err
        label = f"part {part}, case {case}, {target.name}, {kept[:300]!r}: {said}"
        assert code in (0, 1, 2) and (code == 0 or (said.count("\n") == 1 and said.startswith(f"minimore {arguments[0]}: "))), label
        assert (tmp_path / "out").exists() == (code == 0), label
        (tmp_path / "out").unlink(missing_ok=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "pairs.jsonl"], label
        codes[code] = codes.get(code, 0) + 1
    assert codes[2] > COUNT // 20, codes                                         # the damage is real
