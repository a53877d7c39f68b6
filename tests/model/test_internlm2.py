"""InternLM2, whose classes are no part of transformers: a LLaMA in another layout is the oracle."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import GOLDENS
from reference import SIZES, reference_model, reference_rewards, reference_texts
from safetensors.torch import load_file, save_file

from minimore.alignment.policy import LanguageModel
from minimore.cli import main
from minimore.model.attention import pack
from minimore.model.checkpoint import (
    Checkpoint,
    random_checkpoint,
    save_checkpoint,
)
from minimore.options import InputError
from minimore.reward import ModelOptions, ReadingOptions, RewardModel, load_reward_model

TEXTS = reference_texts()
HEADS, KEY_HEADS, HEAD_WIDTH = 4, 2, 6
CONFIG = dict(
    model_type="internlm2",
    bias=False,
    max_position_embeddings=512,
    num_key_value_heads=KEY_HEADS,
    rms_norm_eps=1e-6,
    rope_scaling=dict(type="dynamic", factor=2.0),
    rope_theta=500.0,
    tie_word_embeddings=False,
    hidden_act="silu",
    **{k: v for k, v in SIZES["llama"].items() if k.endswith("size") or k.startswith("num")},
)
NAMES = {
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "lm_head": "output",
}


def fused(query, key, value):
    """Row by row: the queries that share a key head, that key head, its value head, and so on."""
    rows = []
    for group in range(KEY_HEADS):
        for head in range(group * HEADS // KEY_HEADS, (group + 1) * HEADS // KEY_HEADS):
            rows += [query[head * HEAD_WIDTH + i] for i in range(HEAD_WIDTH)]
        for part in (key, value):
            rows += [part[group * HEAD_WIDTH + i] for i in range(HEAD_WIDTH)]
    return torch.stack(rows)


def in_its_layout(llama):
    """A LLaMA's tensors as InternLM2 stores them."""
    tensors = {}
    for name, tensor in llama.state_dict().items():
        for theirs, its in NAMES.items():
            name = name.replace(theirs, its)
        tensors[name] = tensor.clone()
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = fused(*parts)
    return tensors


def llama(head="ForSequenceClassification", bias=False):
    rope = dict(rope_type="default", rope_theta=500.0)
    return reference_model(
        "llama",
        head=head,
        num_key_value_heads=KEY_HEADS,
        rope_parameters=rope,
        attention_bias=bias,
    )


def write(directory, tensors, **changes):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    shutil.copy(GOLDENS / "llama" / "tokenizer.json", directory)
    return Checkpoint(str(directory))


@torch.no_grad()
def rewards_of(model):
    return model.rewards(pack([([], [text]) for text in TEXTS]))


@pytest.mark.parametrize("bias", [False, True])
def test_rewards_are_those_of_the_llama_and_what_is_saved_is_what_was_read(
    transformers, tmp_path, bias
):
    theirs = llama(bias=bias)
    tensors = in_its_layout(theirs)
    checkpoint = write(tmp_path / "read", tensors, bias=bias)
    ours = RewardModel(*checkpoint.load())
    expected = reference_rewards(theirs, TEXTS)
    torch.testing.assert_close(rewards_of(ours), expected, atol=2e-5, rtol=2e-5)
    (tmp_path / "saved").mkdir()
    save_checkpoint(tmp_path / "saved", checkpoint, ours.trunk, ours.head)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    reopened = Checkpoint(str(tmp_path / "saved"))
    assert torch.equal(rewards_of(RewardModel(*reopened.load())), rewards_of(ours))
    assert reopened.json["architectures"] == ["InternLM2ForSequenceClassification"]


@torch.no_grad()
def test_logits_are_those_of_the_llama(transformers, tmp_path):
    theirs = llama("ForCausalLM")
    checkpoint = write(tmp_path, in_its_layout(theirs))
    trunk, head = checkpoint.load()
    model = LanguageModel(trunk, checkpoint.unembedding(trunk))
    assert head is None
    text = TEXTS[5]
    logits = model.logits(trunk.states(pack([([], [text])])))
    torch.testing.assert_close(logits, theirs(torch.tensor([text])).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "mistake", [dict(groups=None), dict(groups="heads"), dict(names=("query", "value", "key"))]
)
def test_another_order_of_the_fused_rows_shows(transformers, tmp_path, mistake):
    theirs = llama()
    checkpoint = write(tmp_path, in_its_layout(theirs))
    if "names" in mistake:
        order = tuple(f"blocks.{{}}.attention.{part}.*" for part in mistake["names"])
        names = dict(checkpoint.family.names) | {"layers.{}.attention.wqkv.*": order}
        mistake = dict(names=names)
    checkpoint.family = dataclasses.replace(checkpoint.family, **mistake)
    found = rewards_of(RewardModel(*checkpoint.load()))
    assert (found - reference_rewards(theirs, TEXTS)).abs().max() > 1e-2


def test_texts_beyond_those_of_its_pretraining_are_refused(transformers, tmp_path):
    checkpoint = write(tmp_path, in_its_layout(llama()))
    assert ReadingOptions(model=str(tmp_path), max_length=512).rules(checkpoint).max_length == 512
    with pytest.raises(InputError, match="a rope scaling that stays the same for 512 tokens only"):
        ReadingOptions(model=str(tmp_path), max_length=513).rules(checkpoint)


def test_a_published_reward_model_of_its_family_is_refused(transformers, tmp_path):
    """It reads its reward at a token that is appended."""
    tensors = in_its_layout(llama())
    tensors["v_head.weight"] = tensors.pop("score.weight")
    with pytest.raises(InputError, match=r"v_head\.weight not part of this model"):
        write(tmp_path, tensors).load()


def test_check_says_that_transformers_does_not_open_it(transformers, tmp_path, capsys):
    write(tmp_path, in_its_layout(llama()))
    assert main(["check", str(tmp_path), "--device", "cpu"]) == 0
    assert "not compared: transformers fails on this directory" in capsys.readouterr().out


def test_a_random_one_opens(tmp_path):
    random_checkpoint(tmp_path / "a", CONFIG, GOLDENS / "llama" / "tokenizer.json", 0)
    model = load_reward_model(Checkpoint(str(tmp_path / "a")), ModelOptions(model="a"))
    assert rewards_of(model).isfinite().all()
    assert "output.weight" in load_file(tmp_path / "a" / "model.safetensors")
