"""config.json: everything that can be wrong with a directory or a config is one clear line."""

import fnmatch
import json

import pytest
from checkpoints import (
    assert_refused,
)
from conftest import GOLDENS
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import minimore.model.checkpoint
import minimore.model.tensors
from minimore.cli import main
from minimore.model.checkpoint import Checkpoint
from minimore.model.config_json import Json
from minimore.model.families import FAMILIES
from minimore.options import InputError

# ---- no directory --------------------------------------------------------------------------------


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


# ---- config.json ---------------------------------------------------------------------------------


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
            dict(rope_scaling=dict(type="longrope", factor=2.0)),
            ["'longrope'", "default, dynamic, linear, llama3"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="yarn", factor=2.0)),
            ["'yarn'", "default, dynamic, linear, llama3"],
        ),
        (
            "llama",
            dict(rope_parameters=dict(rope_type=["llama3"])),
            ["['llama3']", "default, dynamic, linear, llama3"],
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


GPT2 = dict(model_type="gpt2", n_embd=24, n_head=4, n_layer=2, vocab_size=300)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_embd=None), ['"n_embd"', "expected a positive whole number"]),
        (dict(n_embd=25), ["n_embd 25, n_head 4", "do not divide"]),
        (dict(n_layer="2"), ['"n_layer"']),
        (dict(scale_attn_weights=False), ['"scale_attn_weights" is false', "expected true"]),
        (dict(scale_attn_by_inverse_layer_idx=True), ["inverse_layer_idx", "expected false"]),
        (dict(add_cross_attention=True), ["add_cross_attention", "expected false"]),
    ],
)
def test_a_gpt2_that_is_none_is_refused_in_its_own_words(changes, words):
    with pytest.raises(InputError) as error:
        FAMILIES["gpt2"].config(Json(GPT2 | changes, "config.json"))
    assert all(word in str(error.value) for word in ["config.json", *words])
