"""What is saved is what was there; a write that fails leaves nothing that looks finished."""

import json
import os

import numpy as np
import pytest
import torch
from checkpoints import (
    assert_same_parameters,
    edit_tokenizer,
    fill_vocabulary,
)
from conftest import open_model
from reference import reference_rewards, reference_texts
from safetensors import safe_open
from safetensors.torch import load_file

import minimore.model.checkpoint
import minimore.model.tensors
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint, pad_id, save_checkpoint
from minimore.model.tensors import SAFETENSORS_TYPES, Lazy, write_tensors
from minimore.options import InputError
from minimore.reward import ModelOptions, RewardModel, open_reward_model, text_rewards

# ---- saving --------------------------------------------------------------------------------------


def save(golden, directory, **options):
    directory.mkdir()
    checkpoint = Checkpoint(str(golden))
    model = RewardModel(*checkpoint.load())
    save_checkpoint(directory, checkpoint, model.trunk, model.head, **options)
    return directory


def test_saving_what_was_loaded_gives_the_same_tensors(golden, tmp_path):
    directory = save(golden, tmp_path / "saved")
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "crc32"}
    found, expected = (load_file(d / "model.safetensors") for d in (directory, golden))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "checksums.json",
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
        problem_type="regression",
    )
    assert new == {k: v for k, v in old.items() if k not in ("auto_map", "num_labels")} | changed


def test_every_tokenizer_file_is_copied_and_no_other(damaged, tmp_path):
    source = damaged()
    files = {
        "tokenizer_config.json": b'{\n  "a": 1,\n  "tokenizer_class": "PreTrainedTokenizerFast",\n'
        b'  "pad_token": "<pad>",\n  "bos_token": "<s>"\n}\n',
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"<s>{{ x }}",
    }
    edit_tokenizer(source, lambda file: file.add_special_tokens(["<pad>"]))
    for name, content in (files | {"modeling.py": b"import os"}).items():
        (source / name).write_bytes(content)
    saved = save(source, tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.name in files} == files
    assert not (saved / "modeling.py").exists()


@pytest.mark.slow
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
    """A batch padded by the saved tokenizer, on both sides: the rewards are those of the texts."""
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


@pytest.mark.slow
def test_transformers_and_its_pipeline_score_a_hundred_texts_as_we_do(
    transformers, golden, tmp_path
):
    """One by one, in padded batches, and through a pipeline, as other tools score."""
    saved = save(golden, tmp_path / "saved")
    random = np.random.default_rng(0)
    words = ["good", "bad ", "Grüße", "\n\nHuman:", "2+2", "  ", "answer", "<x>"]
    texts = [" ".join(random.choice(words, random.integers(1, 20))) for _ in range(100)]
    model, checkpoint = open_reward_model(ModelOptions(model=str(saved)))
    expected = text_rewards(model, checkpoint.tokenizer.encode(texts)).numpy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    for size in (1, 8):
        rewards = []
        for start in range(0, 100, size):
            batch = tokenizer(texts[start : start + size], padding=True, return_tensors="pt")
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                rewards += theirs(**batch).logits[:, 0].tolist()
        np.testing.assert_allclose(rewards, expected, atol=1e-4)
    pipeline = transformers.pipeline("text-classification", model=str(saved))
    scored = [row["score"] for row in pipeline(texts, function_to_apply="none", batch_size=8)]
    np.testing.assert_allclose(scored, expected, atol=1e-4)
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=False)
    rendered = checkpoint.tokenizer.render(conversation)
    with torch.no_grad():
        reward = theirs(input_ids=ids).logits[0, 0].item()
    ours = text_rewards(model, checkpoint.tokenizer.encode([rendered], rendered=True)).item()
    assert reward == pytest.approx(ours, abs=1e-4)


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


# ---- writes that fail ----------------------------------------------------------------------------


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
    """Every type, odd shapes, a view that is not contiguous, a tensor that is made late.

    The header is that of the format.
    """
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
        assert file.metadata()["note"] == "n"
    content = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for key, entry in json.loads(
        content[8:start]
    ).items():  # aligned, so that others may compute on the mapped file
        assert (
            key == "__metadata__"
            or (start + entry["data_offsets"][0]) % read[key].dtype.itemsize == 0
        )


@pytest.mark.slow
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


# ---- the pad id of a saved config ----------------------------------------------------------------


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
