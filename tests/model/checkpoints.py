"""What tests of checkpoints share."""

import pytest
import torch
from tokenizers import Tokenizer as TokenizerFile

from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError

NORM = "model.norm.weight"  # some tensor of the stored Llama, (24,)


def assert_refused(directory, *words):
    """Opening or loading ends in one line that holds every one of the words: that line."""
    with pytest.raises(InputError) as caught:
        Checkpoint(str(directory)).load()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert not [word for word in words if word not in message], message
    return message


def edit_tokenizer(directory, edit):
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    edit(file)
    file.save(str(directory / "tokenizer.json"))


def fill_vocabulary(file):
    """A token for every one of the 300 rows of the embedding."""
    file.add_tokens([f"filler{i}" for i in range(10)])


TEXTS = ["Hello", " two words", "", "Grüße 🌱", "a long text " * 20]


def plain_ids(directory, texts):
    """Ids without anything around them."""
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    return [file.encode(text, add_special_tokens=False).ids for text in texts]


def assert_same_parameters(found, expected):
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert p.dtype == found[name].dtype and torch.equal(found[name], p), name
