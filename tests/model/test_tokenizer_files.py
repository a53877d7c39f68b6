"""Tokenizer files: BOS once, EOS never, and everything unusable is one clear line."""

import json

import pytest
import torch
from checkpoints import (
    TEXTS,
    assert_refused,
    edit_tokenizer,
    fill_vocabulary,
    plain_ids,
)
from conftest import GOLDENS
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.processors import TemplateProcessing

from minimore.model.checkpoint import Checkpoint, save_checkpoint
from minimore.model.tokenizer import Tokenizer

# ---- tokenizer -----------------------------------------------------------------------------------


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


def test_a_tokenizer_larger_than_the_embedding_is_refused(damaged):
    directory = damaged()
    edit_tokenizer(directory, fill_vocabulary)
    Checkpoint(str(directory)).load()
    edit_tokenizer(directory, lambda file: file.add_tokens(["one more"]))
    assert_refused(directory, "tokenizer has ids up to 300", "300 rows")


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


# ---- in two files --------------------------------------------------------------------------------


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
