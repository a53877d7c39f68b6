"""Weights: what is stored is what is read, and everything damaged is one clear line."""

import json
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import (
    NORM,
    assert_refused,
    assert_same_parameters,
)
from conftest import GOLDENS, open_model
from processes import run_to_the_end
from safetensors.torch import load_file, save_file

from minimore.model.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from minimore.model.tensors import STORAGE
from minimore.options import InputError

# ---- weights -------------------------------------------------------------------------------------


def test_a_directory_without_weights_is_refused(damaged):
    directory = damaged()
    (directory / "model.safetensors").rename(directory / "model.gguf")
    assert_refused(directory, str(directory), "no model.safetensors", "safetensors format")


def without(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def having(**changes):
    """Weights with some tensors replaced or added; __ stands for the point."""
    return lambda tensors: (
        tensors | {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.mark.parametrize(
    "weights, words",
    [
        (without(NORM), [NORM, "missing", "llama with 2 blocks"]),
        (
            without("model.layers.1.self_attn.q_proj.bias"),
            ["model.layers.1.self_attn.q_proj.bias missing"],
        ),
        (without("model.embed_tokens.weight"), ["model.embed_tokens.weight missing"]),
        (
            lambda tensors: {"score.weight": tensors["score.weight"]},
            ["embed_tokens.weight", "and 31 more missing"],
        ),
        (
            having(model__layers__2__mlp__up_proj__bias=torch.zeros(40)),
            ["model.layers.2.mlp.up_proj.bias not part of this model"],
        ),
        (having(model__norm__bias=torch.zeros(24)), ["model.norm.bias not part of this model"]),
        (having(score__bias=torch.zeros(1)), ["score.bias not part of this model"]),
        (lambda tensors: tensors | {"two\nlines": torch.zeros(1)}, ["not part of this model"]),
    ],
    ids=["norm", "bias", "embedding", "all", "third block", "norm bias", "head bias", "two lines"],
)
def test_missing_and_extra_tensors_are_refused(damaged, weights, words):
    directory = damaged(weights=weights)
    assert_refused(directory, str(directory), *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(attention_bias=False), ["q_proj.bias", "not part of this model"]),
        (dict(mlp_bias=...), ["up_proj.bias", "not part of this model"]),
        (dict(num_hidden_layers=3), ["model.layers.2.", "missing", "llama with 3 blocks"]),
        (dict(num_hidden_layers=1), ["model.layers.1.", "not part of this model"]),
        (dict(num_key_value_heads=4), ["k_proj", "(16, 24)", "(32, 24)"]),
        (dict(intermediate_size=48), ["(40,", "(48,"]),
    ],
    ids=str,
)
def test_config_and_weights_that_disagree_are_refused(damaged, changes, words):
    assert_refused(damaged(config=changes), *words)


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.ones(23), ["has shape (23,)", "asks for (24,)"]),
        (torch.ones(24, 1), ["has shape (24, 1)", "asks for (24,)"]),
        (torch.tensor(1.0), ["has shape ()", "asks for (24,)"]),
        (
            torch.ones(24, dtype=torch.int64),
            ["torch.int64", "not a tensor of finite floating-point numbers"],
        ),
        (
            torch.ones(24, dtype=torch.bool),
            ["torch.bool", "not a tensor of finite floating-point numbers"],
        ),
        (
            torch.ones(24, dtype=torch.complex64),
            ["torch.complex64", "not a tensor of finite floating-point numbers"],
        ),
        (torch.ones(24).to(torch.float8_e4m3fn), ["torch.float8_e4m3fn"]),
        (torch.ones(24).to(torch.float8_e5m2), ["torch.float8_e5m2"]),
        (
            torch.tensor([1.0] * 23 + [float("nan")]),
            ["torch.float32", "not a tensor of finite floating-point numbers"],
        ),
        (
            torch.tensor([float("-inf")] + [1.0] * 23).bfloat16(),
            ["torch.bfloat16", "not a tensor of finite floating-point numbers"],
        ),
        (
            torch.full((24,), 1e300, dtype=torch.float64),
            ["torch.float64", "finite"],
        ),  # not finite in fp32
    ],
    ids=lambda x: (
        f"{x.dtype} {tuple(x.shape)} {x.flatten()[-1].item()}"
        if isinstance(x, torch.Tensor)
        else ""
    ),
)
def test_a_tensor_of_another_shape_or_kind_is_refused(damaged, tensor, words):
    assert_refused(
        damaged(weights=lambda tensors: tensors | {NORM: tensor}),
        "model.safetensors",
        repr(NORM),
        *words,
    )


def test_a_head_with_two_rows_is_refused(damaged):
    assert_refused(
        damaged(weights=having(score__weight=torch.ones(2, 24))),
        "model.safetensors",
        "'score.weight' has 2 labels; a reward model has one",
    )


def test_a_pointer_in_the_place_of_weights_is_told(damaged):
    directory = damaged()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    (directory / "model.safetensors").write_text(pointer)
    assert_refused(directory, "model.safetensors", "git lfs pull")


def test_a_name_that_stands_twice_is_refused(damaged):
    directory = damaged()
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header = header[:-1] + b"," + json.dumps({NORM: json.loads(header)[NORM]}).encode()[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert_refused(directory, NORM, "twice")


def test_a_flipped_bit_of_saved_weights_is_refused(tmp_path, golden):
    checkpoint = Checkpoint(str(golden))
    trunk, head = checkpoint.load()
    save_checkpoint(tmp_path, checkpoint, trunk, head)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(InputError):
            Checkpoint(str(tmp_path)).load()
    path.write_bytes(content)
    Checkpoint(str(tmp_path)).load()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "checksums.json"):
        content = (tmp_path / name).read_bytes()
        half = len(content) // 2
        (tmp_path / name).write_bytes(
            content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        )
        with pytest.raises(InputError):
            Checkpoint(str(tmp_path))
        (tmp_path / name).write_bytes(content)


def test_no_memory_is_no_fault_of_a_file(damaged, monkeypatch):
    def no_memory(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("safetensors.safe_open", no_memory)
    with pytest.raises(OSError, match="Cannot allocate"):
        Checkpoint(str(damaged()))


def test_a_fused_projection_of_another_shape_is_refused(damaged):
    key = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert_refused(
        damaged("gpt_neox", weights=lambda t: t | {key: torch.ones(95, 32)}),
        "model.safetensors",
        repr(key),
        "(95, 32)",
        "(96, 32)",
    )


WHOLE = (GOLDENS / "llama" / "model.safetensors").read_bytes()
HEADER = 8 + struct.unpack("<Q", WHOLE[:8])[0]  # bytes before the data


@pytest.mark.parametrize(
    "content",
    [
        *(
            WHOLE[:n]
            for n in (
                0,
                1,
                7,
                8,
                9,
                HEADER // 2,
                HEADER - 1,
                HEADER,
                HEADER + 1,
                len(WHOLE) // 2,
                len(WHOLE) - 1,
            )
        ),
        WHOLE + b"\0",
        b"<html>502 Bad Gateway</html>" * 20,
        random.Random(0).randbytes(500),
        struct.pack("<Q", 2**62) + WHOLE[8:],
        struct.pack("<Q", 90_000_000) + WHOLE[8:],
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2**64 - 1) + b"{}",
    ],
    ids=lambda content: (
        f"{len(content)} bytes {content[:8]!r}"
        if content[:6] == WHOLE[:6]
        else str(content[:8] if len(content) != 500 else "random")
    ),
)
def test_a_damaged_file_is_refused(damaged, content):
    directory = damaged()
    (directory / "model.safetensors").write_bytes(content)
    assert_refused(
        directory,
        str(directory / "model.safetensors"),
        "not a whole safetensors file",
        "fetch it again",
    )


def test_a_file_that_may_not_be_read_is_told_as_such(damaged, monkeypatch):
    """As root every file may be read, so the system's refusal is played."""

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("minimore.model.tensors.open", refuse, raising=False)
    directory = damaged()
    message = assert_refused(
        directory, str(directory / "model.safetensors"), "cannot be read (Permission denied)"
    )
    assert "not a whole" not in message


@pytest.mark.slow
def test_a_damaged_header_never_ends_in_anything_but_one_line(damaged):
    directory, generator = damaged(), torch.Generator().manual_seed(0)
    refused = 0
    for place, byte in torch.randint(0, 256, (200, 2), generator=generator).tolist():
        content = bytearray(WHOLE)
        content[8 + place * (HEADER - 8) // 256] = byte
        (directory / "model.safetensors").write_bytes(content)
        try:
            Checkpoint(str(directory)).load()
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture
def sharded(damaged):
    """The stored Llama in a.safetensors and b.safetensors, with an index that a test may change."""

    def write(index=None, **moved):
        directory = damaged()
        tensors = load_file(directory / "model.safetensors")
        files = {key: ("a" if i % 2 else "b") + ".safetensors" for i, key in enumerate(tensors)}
        for name in set(files.values()):
            save_file({k: t for k, t in tensors.items() if files[k] == name}, directory / name)
        (directory / "model.safetensors").unlink()
        content = (
            index
            if index is not None
            else {"weight_map": files | {k.replace("__", "."): v for k, v in moved.items()}}
        )
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))
        return directory

    return write


def test_shards_are_read(sharded):
    assert_same_parameters(open_model(sharded()), open_model(GOLDENS / "llama"))


@pytest.mark.parametrize(
    "index, words",
    [
        ([], ["list", "expected a JSON object"]),
        ({}, ["weight_map", "missing or empty"]),
        ({"weight_map": {}}, ["weight_map", "missing or empty"]),
        ({"weight_map": ["a.safetensors"]}, ["weight_map", "expected an object"]),
    ],
    ids=str,
)
def test_an_index_without_a_weight_map_is_refused(sharded, index, words):
    assert_refused(sharded(index), "model.safetensors.index.json", *words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("c.safetensors", ["'c.safetensors'", "missing from"]),
        ("../a.safetensors", ["'../a.safetensors'", "outside"]),
        ("/elsewhere/a.safetensors", ["'/elsewhere/a.safetensors'", "outside"]),
        ("sub/a.safetensors", ["'sub/a.safetensors'", "expected a plain file name"]),
        ("..", ["'..'"]),
        (".", ["'.'"]),
        ("", ["''"]),
        ("a\0b", ["missing from"]),
        ("a\nb", ["missing from"]),
        ("x" * 300, ["xxx"]),
        (None, ["'None'"]),
        (5, ["'5'"]),
        (["a.safetensors"], ["missing from"]),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_an_index_that_names_a_file_that_is_not_there_is_refused(sharded, name, words):
    assert_refused(
        sharded(**{NORM.replace(".", "__"): name}), "model.safetensors.index.json", *words
    )


def test_an_outside_file_is_refused_even_if_it_exists(sharded):
    directory = sharded(**{NORM.replace(".", "__"): "../a.safetensors"})
    shutil.copy(directory / "a.safetensors", directory.parent)
    assert_refused(directory, "model.safetensors.index.json", "outside")


def test_an_index_that_names_a_tensor_its_shard_does_not_hold_is_refused(sharded):
    assert_refused(
        sharded(model__norm__bias="a.safetensors"),
        "index.json",
        "'model.norm.bias'",
        "a.safetensors, which does not hold it",
    )
    in_b = next(key for key in load_file(sharded() / "b.safetensors"))
    assert_refused(
        sharded(**{in_b.replace(".", "__"): "a.safetensors"}),
        "index.json",
        repr(in_b),
        "does not hold it",
    )


def test_a_damaged_shard_is_named(sharded):
    directory = sharded()
    (directory / "b.safetensors").write_bytes(b"half")
    assert_refused(directory, str(directory / "b.safetensors"), "not a whole safetensors file")


# ---- which keys are read -------------------------------------------------------------------------


def test_keys_without_the_family_prefix_are_read(golden, damaged):
    prefix = {"gpt_neox": "gpt_neox.", "llama": "model."}[golden.name]
    bare = damaged(
        golden.name, weights=lambda tensors: {k.removeprefix(prefix): t for k, t in tensors.items()}
    )
    assert_same_parameters(open_model(bare), open_model(golden))
    headless = damaged(
        golden.name,
        weights=lambda tensors: {
            k.removeprefix(prefix): t for k, t in tensors.items() if k != "score.weight"
        },
    )
    checkpoint = Checkpoint(str(headless))
    trunk, head = checkpoint.load()
    assert head is None and not checkpoint.has_head
    assert_same_parameters(trunk, open_model(golden).trunk)


@pytest.mark.parametrize(
    "family, keys",
    [
        (
            "gpt_neox",
            [
                "embed_out.weight",
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
            ],
        ),
        (
            "llama",
            [
                "lm_head.weight",
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "model.rotary_emb.inv_freq",
            ],
        ),
    ],
)
def test_keys_that_a_reward_does_not_need_are_ignored(damaged, family, keys):
    directory = damaged(
        family,
        weights=lambda tensors: tensors | {key: torch.ones(3, 3, dtype=torch.bool) for key in keys},
    )
    assert_same_parameters(open_model(directory), open_model(GOLDENS / family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_stored_in_another_type_are_read_as_fp32(golden, damaged, dtype):
    narrow = open_model(
        damaged(golden.name, weights=lambda tensors: {k: t.to(dtype) for k, t in tensors.items()})
    )
    for (name, found), (_, expected) in zip(
        narrow.named_parameters(), open_model(golden).named_parameters()
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected.to(dtype).float()), name


# ---- .bin weights and tokenizers in two files ----------------------------------------------------


def as_bin(directory, zipped=True, change=lambda tensors: tensors):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(
        change(tensors), directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    return directory


def test_compressed_parts_of_a_bin_are_refused(damaged, tmp_path):
    """They would be mapped as they are, and the compressed bytes taken for weights."""
    path = as_bin(damaged()) / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, content in parts.items():
            deflated.writestr(name, content)
    assert_refused(path.parent, "pytorch_model.bin", "compressed")


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_weights_are_read(golden, damaged, zipped):
    assert_same_parameters(open_model(as_bin(damaged(golden.name), zipped)), open_model(golden))


def test_sharded_bin_weights_are_read(golden, damaged):
    directory = damaged(golden.name)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, keys in parts.items():
        torch.save({k: tensors[k] for k in keys}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}})
    )
    assert_same_parameters(open_model(directory), open_model(golden))


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("hostile-code-ran"),))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"model.norm.weight": Hostile()},
        lambda t: list(t.values()),
        lambda t: t | {"step": 3},
    ],
    ids=["hostile", "a list", "a number"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_of_anything_but_tensors_are_refused_and_run_nothing(
    damaged, monkeypatch, tmp_path, change, zipped
):
    monkeypatch.chdir(tmp_path)
    assert_refused(as_bin(damaged(), zipped, change), "pytorch_model.bin")
    assert not Path("hostile-code-ran").exists()


def test_a_hostile_pickle_is_named_by_what_it_would_call(damaged):
    assert_refused(
        as_bin(damaged(), True, lambda t: t | {"model.norm.weight": Hostile()}),
        "Unsupported global: GLOBAL getattr was not an allowed global by default.);"
        " nothing in it was run",
    )


@pytest.mark.filterwarnings("error")
def test_bin_files_of_parameters_are_read_and_those_of_no_memory_refused(damaged):
    open_model(as_bin(damaged(), True, lambda t: {k: torch.nn.Parameter(v) for k, v in t.items()}))
    assert_refused(
        as_bin(damaged(), True, lambda t: t | {"model.norm.weight": torch.ones(24, device="meta")}),
        "model.norm.weight",
    )


def test_special_files_and_empty_ones_are_refused(damaged):
    directory = damaged()
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    assert_refused(directory, "config.json", "not a plain file")
    assert_refused(damaged(weights=lambda t: {}), "holds no tensor")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bin_files_are_refused(damaged, zipped):
    directory = as_bin(damaged(), zipped)
    whole = (directory / "pytorch_model.bin").read_bytes()
    for length in (0, 1, 10, 100, len(whole) // 2, len(whole) - 100):
        (directory / "pytorch_model.bin").write_bytes(whole[:length])
        assert_refused(directory, "pytorch_model.bin")


PEAK = """
import sys, threading, time
import torch
from minimore.model.checkpoint import Checkpoint

def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done, before = 0, threading.Event(), anonymous()

def watch():
    global peak
    while not done.wait(.0005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
trunk, _ = Checkpoint(sys.argv[1]).load()
time.sleep(.01)
done.set()
watcher.join()
print((peak - before) / sum(p.nbytes for p in trunk.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 13 million parameters, a sixth of them one matrix."""
    config = dict(
        model_type="gpt_neox",
        vocab_size=6000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=1536,
    )
    directory = tmp_path_factory.mktemp("large") / "m"
    random_checkpoint(directory, config, GOLDENS / "llama" / "tokenizer.json", seed=0)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is counted in /proc"
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "bin", "bin before torch 1.6"])
def test_loading_peaks_below_1_3_times_the_parameters(large, tmp_path, kind):
    """As stored in memory (fp32), file-backed pages not counted, in a process of its own."""
    shutil.copytree(large, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    if kind in STORAGE:
        save_file({k: t.to(STORAGE[kind]) for k, t in load_file(weights).items()}, weights)
    else:
        tensors = {k: t.half() for k, t in load_file(weights).items()}
        weights.unlink()
        torch.save(
            tensors,
            tmp_path / "m" / "pytorch_model.bin",
            _use_new_zipfile_serialization=kind == "bin",
        )
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    ratio = float(run_to_the_end([tmp_path / "m"], tmp_path, script))
    assert 0.9 < ratio < 1.3, ratio
