"""Checkpoints: everything that can be wrong with a directory is one clear line; what is saved is what was there."""

import fnmatch
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, open_model
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from reference import reference_rewards, reference_texts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.processors import TemplateProcessing

import minimore.model.checkpoint
import minimore.model.tensors
from minimore.cli import main
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint, pad_id, random_checkpoint, save_checkpoint
from minimore.model.tensors import SAFETENSORS_TYPES, STORAGE, Lazy, write_tensors
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError
from minimore.reward import RewardModel

NORM = "model.norm.weight"  # some tensor of the stored Llama, (24,)


def assert_refused(directory, *words):
    """Opening or loading ends in one line that holds every one of the words."""
    with pytest.raises(InputError) as caught:
        Checkpoint(str(directory)).load()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert not [word for word in words if word not in message], message


# ---- no directory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "/nowhere/at/all",
        "./a/b",
        "a b/c",
        "a/b/c",
        "a\0b",
        "two\nlines",
        pytest.param("x" * 300, id="long"),
    ],
)
def test_what_is_neither_a_directory_nor_a_hub_name_is_refused(monkeypatch, name):
    monkeypatch.setattr(minimore.model.checkpoint, "snapshot_download", None)  # not even asked
    assert_refused(
        name, "--model", "no such directory", "expected a checkpoint directory or a hub name"
    )


def test_a_file_is_refused():
    assert_refused(GOLDENS / "llama" / "config.json", "config.json", "no such directory")


TRANSPORT_ERROR = HfHubHTTPError.__mro__[1]  # of the library that huggingface_hub downloads with


@pytest.mark.parametrize(
    "error",
    [
        OSError("Connection refused"),
        LocalEntryNotFoundError("not in\nthe cache"),
        HFValidationError("bad name"),
        ValueError("odd"),
        TRANSPORT_ERROR("connection lost while downloading"),
    ],
    ids=repr,
)
def test_a_hub_name_that_is_not_delivered_is_refused(monkeypatch, error):
    def fail(name, **_):
        assert name == "someone/model"
        raise error

    monkeypatch.setattr(minimore.model.checkpoint, "snapshot_download", fail)
    assert_refused("someone/model", "someone/model", " ".join(str(error).split()))


def test_a_hub_name_opens_what_was_downloaded_and_fetches_no_code(monkeypatch):
    hub = [
        "README.md",
        "config.json",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
        "params.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "training_args.bin",
    ]

    def deliver(name, allow_patterns):
        fetched = [f for f in hub if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]
        assert name == "someone/model" and sorted(set(hub) - set(fetched)) == [
            "README.md",
            "consolidated.safetensors",
            "modeling_own.py",
            "pytorch_model.bin",
            "training_args.bin",
        ]
        return str(GOLDENS / "llama")

    monkeypatch.setattr(minimore.model.checkpoint, "snapshot_download", deliver)
    assert Checkpoint("someone/model").directory == GOLDENS / "llama"


def test_a_plan_fetches_no_weights(monkeypatch, capsys):
    def deliver(name, allow_patterns):
        assert not any(
            fnmatch.fnmatch(f, p)
            for p in allow_patterns
            for f in ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin")
        )
        assert any(fnmatch.fnmatch("config.json", p) for p in allow_patterns)
        return str(GOLDENS / "llama")

    monkeypatch.setattr(minimore.model.checkpoint, "snapshot_download", deliver)
    assert main(["plan", "someone/model", "--tokens", "90"]) == 0
    assert "llama, " in capsys.readouterr().out


# ---- config.json -----------------------------------------------------------------------------------------------------


def test_a_directory_without_config_is_refused(damaged):
    directory = damaged()
    (directory / "config.json").unlink()
    assert_refused(directory, "config.json", "no such file")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b'{"model_type": "llama\xff"}', b"[" * 100_000, b"9" * 5000],
    ids=lambda b: str(b[:12]),
)
def test_config_that_is_not_a_json_object_is_refused(damaged, content):
    directory = damaged()
    (directory / "config.json").write_bytes(content)
    assert_refused(directory, "config.json", "JSON")


@pytest.mark.parametrize(
    "kind", ["bert", "", None, ..., 5, ["llama"], {"llama": 1}, "\ud800"], ids=repr
)
def test_an_unknown_model_type_is_refused(damaged, kind):
    assert_refused(
        damaged(config=dict(model_type=kind)), "config.json", "model_type", "gpt_neox, llama"
    )


WRONG_NUMBERS = ["32", -1, 0, True, float("nan"), float("inf"), [32], {}]
SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [..., None, 2.0, 2.5, *WRONG_NUMBERS], ids=repr)
def test_a_size_that_is_no_positive_whole_number_is_refused(damaged, key, value):
    assert_refused(
        damaged(config={key: value}),
        "config.json",
        f'"{key}"',
        "expected a positive whole number",
        "is missing" if value is ... else f"is {json.dumps(value)}",
    )


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [2.0, *WRONG_NUMBERS], ids=repr)
def test_an_optional_size_may_be_missing_but_not_wrong(damaged, key, value):
    assert_refused(
        damaged(config={key: value}), "config.json", f'"{key}"', "expected a positive whole number"
    )


@pytest.mark.parametrize("family, key", [("gpt_neox", "layer_norm_eps"), ("llama", "rms_norm_eps")])
@pytest.mark.parametrize("value", [*WRONG_NUMBERS, pytest.param(10**400, id="10^400")], ids=repr)
def test_an_eps_that_is_no_positive_number_is_refused(damaged, family, key, value):
    assert_refused(
        damaged(family, config={key: value}),
        "config.json",
        f'"{key}"',
        "expected a positive number",
    )


@pytest.mark.parametrize(
    "family, key",
    [
        ("gpt_neox", "attention_bias"),
        ("gpt_neox", "use_parallel_residual"),
        ("llama", "attention_bias"),
        ("llama", "mlp_bias"),
    ],
)
@pytest.mark.parametrize("value", [1, 0, "true", []], ids=repr)
def test_a_switch_that_is_not_true_or_false_is_refused(damaged, family, key, value):
    assert_refused(
        damaged(family, config={key: value}), "config.json", f'"{key}"', "expected true or false"
    )


@pytest.mark.parametrize(
    "family, changes, words",
    [
        (
            "gpt_neox",
            dict(num_attention_heads=5),
            ["hidden_size 32", "num_attention_heads 5", "do not divide"],
        ),
        (
            "llama",
            dict(hidden_size=25, head_dim=...),
            ["hidden_size 25", "num_attention_heads 4", "do not divide"],
        ),
        (
            "llama",
            dict(num_key_value_heads=3),
            ["num_attention_heads 4", "num_key_value_heads 3", "do not divide"],
        ),
        (
            "llama",
            dict(num_key_value_heads=8),
            ["num_attention_heads 4", "num_key_value_heads 8", "do not divide"],
        ),
        ("llama", dict(hidden_act="mish"), ['"hidden_act"', "'mish'", "gelu_new"]),
        ("llama", dict(hidden_act=["gelu"]), ['"hidden_act"', "expected a string"]),
        ("llama", dict(head_dim=7), ["rotary dimensions", "7"]),
        (
            "gpt_neox",
            dict(rope_parameters=dict(partial_rotary_factor=2.0)),
            ["32 rotary dimensions", "16"],
        ),
        (
            "gpt_neox",
            dict(rope_parameters=dict(partial_rotary_factor=0.01)),
            ["0 rotary dimensions", "16"],
        ),
        (
            "gpt_neox",
            dict(rope_parameters=..., rotary_pct="all"),
            ['"rotary_pct"', "expected a positive number"],
        ),
        (
            "gpt_neox",
            dict(rope_parameters=..., rotary_emb_base=-1),
            ['"rotary_emb_base"', "expected a positive number"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_theta=0)),
            ['"rope_theta"', "expected a positive number"],
        ),
        ("llama", dict(rope_parameters=[1]), ["rope_parameters", "not an object"]),
        ("llama", dict(rope_scaling="linear"), ["rope_scaling", "not an object"]),
        (
            "llama",
            dict(rope_scaling=dict(type="dynamic", factor=2.0)),
            ["'dynamic'", "default, linear, llama3"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="yarn", factor=2.0)),
            ["'yarn'", "default, linear, llama3"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type=["llama3"])),
            ["['llama3']", "default, linear, llama3"],
        ),
        ("llama", dict(rope_parameters=dict(rope_type="linear")), ['"factor"', "is missing"]),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", factor="2")),
            ['"factor"', "expected a positive number"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="llama3", factor=8, high_freq_factor=4)),
            ['"low_freq_factor"', "is missing"],
        ),
        (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4
                )
            ),
            ["low_freq_factor", "high_freq_factor"],
        ),
        (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=1
                )
            ),
            ["low_freq_factor", "high_freq_factor"],
        ),
    ],
    ids=str,
)
def test_config_that_describes_no_model_is_refused(damaged, family, changes, words):
    assert_refused(damaged(family, config=changes), "config.json", *words)


@pytest.mark.parametrize("key", [k for k in SIZES if k != "num_hidden_layers"])
@pytest.mark.parametrize("value", [2**62, 10**30], ids=str)
def test_a_size_that_no_machine_can_hold_is_refused(damaged, key, value):
    assert_refused(damaged(config={key: value, "num_key_value_heads": 1}), "config.json")


# ---- weights ---------------------------------------------------------------------------------------------------------


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
        "'score.weight'",
        "(2, 24)",
        "(1, 24)",
    )


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


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(damaged):
    """The stored Llama with its tensors in a.safetensors and b.safetensors, and an index that a test may change."""

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


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_tokenizer_is_refused(damaged):
    directory = damaged()
    (directory / "tokenizer.json").unlink()
    assert_refused(directory, "tokenizer.json", "no such file")


def word_level(**changes):
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        }
        | changes
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"{" * 1000,
        word_level(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
        word_level(model={"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}),
        word_level(model={"type": "Unheard"}),
        word_level(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
    ],
    ids=lambda b: str(b[:60]) if len(b) < 90 else "template" if b"Template" in b else "model",
)
def test_a_tokenizer_that_cannot_be_used_is_refused(damaged, content):
    directory = damaged()
    (directory / "tokenizer.json").write_bytes(content)
    assert_refused(directory, str(directory / "tokenizer.json"), "not a usable tokenizer")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"], ids=str)
def test_a_tokenizer_config_that_is_not_a_json_object_is_refused(damaged, content):
    directory = damaged()
    (directory / "tokenizer_config.json").write_bytes(content)
    assert_refused(directory, str(directory / "tokenizer_config.json"), "JSON")


def edit_tokenizer(directory, edit):
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    edit(file)
    file.save(str(directory / "tokenizer.json"))


def fill_vocabulary(file):
    """A token for every one of the 300 rows of the embedding."""
    file.add_tokens([f"filler{i}" for i in range(10)])


def test_a_tokenizer_larger_than_the_embedding_is_refused(damaged):
    directory = damaged()
    edit_tokenizer(directory, fill_vocabulary)
    Checkpoint(str(directory)).load()
    edit_tokenizer(directory, lambda file: file.add_tokens(["one more"]))
    assert_refused(directory, "tokenizer has ids up to 300", "300 rows")


TEXTS = ["Hello", " two words", "", "Grüße 🌱", "a long text " * 20]


def plain_ids(directory, texts):
    """Ids without anything around them."""
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    return [file.encode(text, add_special_tokens=False).ids for text in texts]


def test_bos_is_added_once_and_eos_never():
    assert Tokenizer(GOLDENS / "gpt_neox").encode(TEXTS) == plain_ids(GOLDENS / "gpt_neox", TEXTS)
    whole = TokenizerFile.from_file(str(GOLDENS / "llama" / "tokenizer.json")).encode("Hello").ids
    assert (whole[0], whole[-1]) == (1, 2)  # this file adds BOS and EOS
    assert Tokenizer(GOLDENS / "llama").encode(TEXTS) == [
        [1] + ids for ids in plain_ids(GOLDENS / "llama", TEXTS)
    ]


@pytest.mark.parametrize(
    "template, leading", [("$A </s>", []), ("<s> $A", [1]), ("<s> <unk> $A </s> </s>", [1, 0])]
)
def test_only_what_the_tokenizer_puts_in_front_is_added(damaged, template, leading):
    directory = damaged()
    names = [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    edit_tokenizer(
        directory,
        lambda file: setattr(
            file, "post_processor", TemplateProcessing(template, template + " $B", names)
        ),
    )
    assert Tokenizer(directory).encode(TEXTS) == [
        leading + ids for ids in plain_ids(directory, TEXTS)
    ]


def test_truncation_and_padding_stored_in_the_file_are_switched_off(damaged):
    directory = damaged()
    edit_tokenizer(
        directory,
        lambda file: (file.enable_truncation(8), file.enable_padding(length=64, pad_id=0)),
    )
    assert (
        len(TokenizerFile.from_file(str(directory / "tokenizer.json")).encode(TEXTS[-1]).ids) == 64
    )  # in force there
    assert Tokenizer(directory).encode(TEXTS) == Tokenizer(GOLDENS / "llama").encode(TEXTS)


# ---- which keys are read ---------------------------------------------------------------------------------------------


def assert_same_parameters(found, expected):
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert p.dtype == found[name].dtype and torch.equal(found[name], p), name


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


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(golden, directory, **options):
    directory.mkdir()
    checkpoint = Checkpoint(str(golden))
    model = RewardModel(*checkpoint.load())
    save_checkpoint(directory, checkpoint, model.trunk, model.head, **options)
    return directory


def test_saving_what_was_loaded_gives_the_same_tensors(golden, tmp_path):
    directory = save(golden, tmp_path / "saved")
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found, expected = (load_file(d / "model.safetensors") for d in (directory, golden))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    if golden.name == "gpt_neox":  # whose tokenizer has a pad token already
        assert (directory / "tokenizer.json").read_bytes() == (
            golden / "tokenizer.json"
        ).read_bytes()
    assert_same_parameters(open_model(directory), open_model(golden))


def test_the_saved_config_is_the_old_one_as_a_reward_model(damaged, tmp_path):
    of_language_model = dict(
        architectures=["LlamaForCausalLM"],
        num_labels=2,
        id2label={"0": "no", "1": "yes"},
        label2id={"no": 0, "yes": 1},
        auto_map={"AutoModel": "code.Model"},
        dtype="float16",
        torch_dtype="float16",
        something="kept",
        quantization_config={"load_in_8bit": True},
    )
    source = damaged(config=of_language_model)
    old = json.loads((source / "config.json").read_text())
    new = json.loads(
        (save(source, tmp_path / "saved", dtype="bfloat16") / "config.json").read_text()
    )
    changed = dict(
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        pad_token_id=290,
        dtype="bfloat16",
        torch_dtype="bfloat16",
    )
    assert (
        new
        == {
            k: v
            for k, v in old.items()
            if k not in ("auto_map", "num_labels", "quantization_config")
        }
        | changed
    )


def test_every_tokenizer_file_is_copied_and_no_other(damaged, tmp_path):
    source = damaged()
    files = {
        "tokenizer_config.json": b'{ "a": 1, "pad_token": {"content": "<pad>"}}',
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"\xff{{ x }}",
    }
    edit_tokenizer(source, lambda file: file.add_special_tokens(["<pad>"]))
    for name, content in (files | {"modeling.py": b"import os"}).items():
        (source / name).write_bytes(content)
    saved = save(source, tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.name in files} == files
    assert not (saved / "modeling.py").exists()


@pytest.mark.parametrize(
    "family, tokenizer_config, special_tokens",
    [
        ("gpt_neox", None, None),
        ("llama", None, None),
        (
            "gpt_neox",
            dict(
                tokenizer_class="GPTNeoXTokenizer",
                pad_token="<|endoftext|>",
                eos_token="<|endoftext|>",
            ),
            None,
        ),
        (
            "llama",
            dict(
                tokenizer_class="PreTrainedTokenizerFast",
                pad_token="</s>",
                eos_token="</s>",
                bos_token="<s>",
            ),
            dict(pad_token="</s>"),
        ),
        ("llama", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>"), None),
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_pads_with_what_the_saved_model_skips(
    transformers, damaged, tmp_path, family, tokenizer_config, special_tokens
):
    """The saved directory's own tokenizer, a padded batch, on both sides: the rewards are those of the texts alone."""
    source = damaged(family)
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special_tokens),
    ):
        if content:
            (source / name).write_text(json.dumps(content))
    saved = save(source, tmp_path / "saved")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    texts = ["Hello", "a much longer text, to be padded for!", "1 2 3"]
    ours = open_model(saved).rewards(
        pack([([], [ids]) for ids in Checkpoint(str(saved)).tokenizer.encode(texts)])
    )
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        logits = theirs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, 0]
        torch.testing.assert_close(logits, ours, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_saving_in_a_narrow_type_rounds_every_tensor(golden, tmp_path, dtype):
    found, expected = (
        load_file(save(golden, tmp_path / "saved", dtype=dtype) / "model.safetensors"),
        load_file(golden / "model.safetensors"),
    )
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.to(getattr(torch, dtype))), key


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(minimore.model.tensors, "SHARD_BYTES", 20_000)


def test_shards_hold_what_the_single_file_holds(golden, tmp_path, small_shards):
    directory = save(golden, tmp_path / "saved")
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) >= 3 and shards == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    expected, held = load_file(golden / "model.safetensors"), {}
    for name in shards:
        tensors = load_file(directory / name)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
        held |= {key: (name, t) for key, t in tensors.items()}
    assert held.keys() == expected.keys() and all(
        torch.equal(t, expected[key]) for key, (_, t) in held.items()
    )
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": sum(t.nbytes for t in expected.values())},
        "weight_map": {k: name for k, (name, _) in held.items()},
    }
    keys = list(index["weight_map"])
    for before, key in zip(keys, keys[1:]):  # a new shard only where the old one is full
        full = (
            sum(t.nbytes for name, t in held.values() if name == held[before][0])
            + held[key][1].nbytes
            > 20_000
        )
        assert held[key][0] == held[before][0] or full
    assert_same_parameters(open_model(directory), open_model(golden))


def test_transformers_reads_the_shards(transformers, golden, tmp_path, small_shards):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        save(golden, tmp_path / "saved")
    ).eval()
    texts = reference_texts()
    with torch.no_grad():
        ours = open_model(golden).rewards(pack([([], [text]) for text in texts]))
    torch.testing.assert_close(ours, reference_rewards(theirs, texts), rtol=2e-5, atol=2e-5)


# ---- writes that fail ------------------------------------------------------------------------------------------------


def assert_nothing_looks_finished(directory):
    assert not list(directory.glob("*.partial")) and not (directory / "config.json").exists()


def test_a_failing_write_leaves_no_partial_file_and_no_config(golden, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(golden, tmp_path / "saved")
    assert_nothing_looks_finished(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_written_tensors_are_what_safetensors_reads(tmp_path):
    """Every type, odd shapes, a view that is not contiguous, a tensor that is made late; and the header is that of the format."""
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(7),
        "view": torch.randn(4, 6).T,
        "é": torch.tensor([True, False]),
    }
    tensors |= {str(dtype): torch.arange(5).to(dtype) for dtype in SAFETENSORS_TYPES.values()}
    late = {"late": Lazy((2, 2), torch.float32, lambda: torch.ones(2, 2))}
    write_tensors(tmp_path / "x.safetensors", tensors | late, {"note": "n"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == (tensors | late).keys()
    for key, tensor in (tensors | {"late": torch.ones(2, 2)}).items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor), key
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"note": "n"}
    content = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(
        content[8:start]
    ).items():  # aligned, so that others may compute on the mapped file
        assert (
            key == "__metadata__"
            or (start + entry["data_offsets"][0]) % read[key].dtype.itemsize == 0
        )


def test_a_rename_that_fails_at_any_point_leaves_no_partial_file_and_no_config(
    golden, tmp_path, monkeypatch, small_shards
):
    replace, left = os.replace, 0

    def fail_at_last(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_last)
    for allowed in range(100):
        left, directory = allowed, tmp_path / str(allowed)
        try:
            save(golden, directory)
        except OSError as error:
            assert error.errno == 5
            assert_nothing_looks_finished(directory)
            assert len(list(directory.glob("model*"))) == allowed or allowed > 3
        else:
            break
    assert allowed >= 5  # three shards or more, index, config
    assert_same_parameters(open_model(directory), open_model(golden))


# ---- .bin weights and tokenizers in two files ---------------------------------------------------------------------------


def as_bin(directory, zipped=True, change=lambda tensors: tensors):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(
        change(tensors), directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    return directory


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
        "Unsupported global: GLOBAL getattr was not an allowed global by default.; nothing in it was run".replace(
            ".;", ".);"
        ),
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


def in_two_files(directory, **config):
    """tokenizer.json as vocab.json and merges.txt, as OPT has them."""
    file = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    (directory / "tokenizer.json").unlink()
    merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
    (directory / "vocab.json").write_text(json.dumps(file["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config)
    )
    return directory


PEAK = """
import sys, threading, time
import torch
from minimore.model.checkpoint import Checkpoint

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

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


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is counted in /proc"
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "bin", "bin before torch 1.6"])
def test_loading_peaks_below_1_3_times_the_parameters(tmp_path, kind):
    """As stored in memory (fp32), file-backed pages not counted; in a fresh process, 22 million parameters, a sixth of them one matrix."""
    config = dict(
        model_type="gpt_neox",
        vocab_size=8000,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    random_checkpoint(tmp_path / "m", config, GOLDENS / "llama" / "tokenizer.json", seed=0)
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
    ratio = float(
        subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / "m")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert 0.9 < ratio < 1.3, ratio


@pytest.mark.parametrize("add_bos, bos", [(True, [1]), (False, []), (..., [])])
def test_vocabulary_and_merges_are_a_tokenizer(damaged, tmp_path, add_bos, bos):
    directory = in_two_files(damaged(), **({} if add_bos is ... else {"add_bos_token": add_bos}))
    checkpoint = Checkpoint(str(directory))
    assert checkpoint.tokenizer.encode(TEXTS) == [
        bos + ids for ids in plain_ids(GOLDENS / "llama", TEXTS)
    ]
    (tmp_path / "saved").mkdir()
    save_checkpoint(tmp_path / "saved", checkpoint, *checkpoint.load()[:1], torch.zeros(24))
    assert Checkpoint(str(tmp_path / "saved")).tokenizer.encode(
        TEXTS
    ) == checkpoint.tokenizer.encode(TEXTS)


def test_vocabulary_and_merges_of_another_kind_are_refused_with_the_remedy(damaged):
    """Qwen's two files, for one, look the same and cut texts differently before they merge."""
    assert_refused(
        in_two_files(damaged(), tokenizer_class="Qwen2Tokenizer"),
        "Qwen2Tokenizer",
        "save_pretrained",
    )
    assert_refused(
        in_two_files(damaged("llama", dict(model_type="qwen2"))), "qwen2", "save_pretrained"
    )
    directory = in_two_files(damaged(), tokenizer_class="GPT2Tokenizer")
    Checkpoint(str(directory))
    merges = directory / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert Checkpoint(str(directory)).tokenizer.encode(TEXTS) == [
        ids for ids in plain_ids(GOLDENS / "llama", TEXTS)
    ]
    (directory / "added_tokens.json").write_text('{"<pad>": 290}')
    assert_refused(directory, "added_tokens.json", "save_pretrained")


def test_a_lone_sentencepiece_model_is_refused_with_the_remedy(damaged):
    directory = damaged()
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    assert_refused(directory, "SentencePiece", "save_pretrained")


@pytest.mark.parametrize(
    "vocabulary, merges", [("[]", ""), ("{", ""), ("{}", "a b c"), ('{"a": 0}', "a b")]
)
def test_damaged_vocabularies_are_refused(damaged, vocabulary, merges):
    directory = in_two_files(damaged())
    (directory / "vocab.json").write_text(vocabulary)
    (directory / "merges.txt").write_text(merges)
    assert_refused(directory, "vocab.json")


# ---- the pad id of a saved config ------------------------------------------------------------------------------------


def nothing(file):
    pass


PADS = [  # family, config.json, tokenizer_config.json, change of the tokenizer, pad id
    ("gpt_neox", {}, {}, nothing, 1),  # its own <|padding|>
    ("gpt_neox", {}, {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, nothing, 1),
    ("gpt_neox", {"pad_token_id": 0}, {}, nothing, 1),  # 0 is EOS
    ("llama", {}, {}, nothing, 290),  # the first row without a token
    ("llama", {"pad_token_id": 5}, {}, nothing, 290),  # 5 is a letter: texts may end in it
    ("llama", {"pad_token_id": 0}, {}, nothing, 0),
    ("llama", {"pad_token_id": 2}, {}, nothing, 290),  # 2 is EOS
    ("llama", {"pad_token_id": 5, "eos_token_id": [2, 5]}, {}, nothing, 290),
    ("llama", {"pad_token_id": 2, "eos_token_id": ...}, {"eos_token": "</s>"}, nothing, 290),
    (
        "llama",
        {"pad_token_id": 2, "eos_token_id": ...},
        {"eos_token": {"content": "</s>"}},
        nothing,
        290,
    ),
    ("llama", {"pad_token_id": -1}, {}, nothing, 290),
    ("llama", {"pad_token_id": 300}, {}, nothing, 290),  # no such row
    ("llama", {"pad_token_id": True}, {}, nothing, 290),
    ("llama", {}, {"pad_token": "</s>", "eos_token": "</s>"}, nothing, 290),
    ("llama", {}, {"pad_token": "!"}, nothing, 290),
    ("llama", {}, {"pad_token": {"content": "<unk>", "lstrip": False}}, nothing, 0),
    ("llama", {}, {}, lambda file: file.add_special_tokens(["one", "[PAD]", "two"]), 291),
    ("llama", {}, {}, lambda file: file.add_tokens(["paddle"]), 291),  # a word, not special
    (
        "llama",
        {},
        {"eos_token": "</s>"},
        lambda file: file.add_tokens(["None", "two"]),
        292,
    ),  # a word, not a missing name
    (
        "llama",
        {},
        {"eos_token": "</s>", "pad_token": None},
        lambda file: file.add_tokens(["None"]),
        291,
    ),
    ("llama", {}, {}, fill_vocabulary, 0),  # no row left: <unk>
    ("llama", {}, {"unk_token": "<s>"}, fill_vocabulary, 1),
    (
        "llama",
        {"eos_token_id": 0},
        {"unk_token": "<unk>"},
        fill_vocabulary,
        None,
    ),  # <unk> is EOS: nothing is left
]


@pytest.mark.parametrize("family, config, tokenizer_config, edit, expected", PADS)
def test_the_pad_id_is_one_that_no_text_ends_in(
    damaged, family, config, tokenizer_config, edit, expected
):
    directory = damaged(family, config=config)
    edit_tokenizer(directory, edit)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    checkpoint = Checkpoint(str(directory))
    if expected is not None:
        assert pad_id(checkpoint) == expected
        return
    with pytest.raises(InputError, match="no id is left for padding") as caught:
        pad_id(checkpoint)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
