"""Prompts: when two are the same one, and hashes that stand for them.

The case of letters and white space make no prompt another.
"""

import hashlib


def normalised(text: str) -> str:
    """A text without what does not make it another: the case of letters, and its white space.

    >>> normalised("\\n\\nHuman: What  is it?\\n\\nAssistant:")
    'human: what is it? assistant:'
    """
    return " ".join(text.casefold().split())


def prompt_hash(prompt: str) -> int:
    """The `text_hash` of a prompt without what does not make it another."""
    return text_hash(normalised(prompt))


def text_hash(text: str) -> int:
    """Eight bytes of BLAKE2b of a text, as a signed number."""
    digest = hashlib.blake2b(as_bytes(text), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def seeded_hash(text: str, seed: int) -> bytes:
    """Sixteen bytes of BLAKE2b of a text. Under every seed texts have another random order.

    seed: at least 0, less than 2^63.
    """
    salt = seed.to_bytes(8, "little")
    return hashlib.blake2b(as_bytes(text), digest_size=16, salt=salt).digest()


def as_bytes(text: str) -> bytes:
    """UTF-8, with bytes of their own for halves of surrogate pairs."""
    return text.encode("utf-8", "surrogatepass")
