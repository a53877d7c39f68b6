"""Signatures against the Jaccard similarity of naive sets; near duplicates against all pairs."""

import random

import numpy as np
import pytest

from minimore.data.inspection.near_duplicates import (
    BINS,
    PIECE,
    near_copies,
    piece_hashes,
    signature,
)
from minimore.data.world import WORDS


def words(rng, count):
    return rng.choices(WORDS, k=count)


def changed(rng, text, share):
    """The words, of which a share are others."""
    return [rng.choice(WORDS) if rng.random() < share else word for word in text]


def pieces(text):
    data = text.encode()
    return {data[i : i + PIECE] for i in range(len(data) - PIECE + 1)}


def jaccard(a, b):
    return len(pieces(a) & pieces(b)) / len(pieces(a) | pieces(b))


def test_equal_pieces_have_equal_hashes_and_others_have_others():
    text = " ".join(words(random.Random(0), 400)) + " café é"
    hashes = piece_hashes(text)
    data = text.encode()
    of_piece = {}
    for i, value in enumerate(hashes.tolist()):
        of_piece.setdefault(data[i : i + PIECE], set()).add(value)
    assert len(hashes) == len(data) - PIECE + 1
    assert all(len(values) == 1 for values in of_piece.values())
    assert len(set(hashes.tolist())) == len(of_piece)


def test_a_text_shorter_than_a_piece_has_no_signature():
    assert signature("a" * (PIECE - 1)) is None and signature("") is None
    assert len(signature("a" * PIECE)) == BINS


@pytest.mark.parametrize("count, share", [(12, 0.05), (60, 0.02), (60, 0.2), (300, 0.03)])
def test_signatures_estimate_the_jaccard_similarity(count, share):
    rng, errors = random.Random(1), []
    for _ in range(100):
        text = words(rng, count)
        a, b = " ".join(text), " ".join(changed(rng, text, share))
        errors.append(np.mean(signature(a) == signature(b)) - jaccard(a, b))
    # 64 bins: a standard deviation of at most .0625, and somewhat more where many are empty.
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.08


def test_near_copies_are_those_of_all_pairs():
    rng = random.Random(2)
    texts = [words(rng, 60) for _ in range(60)]
    texts += [changed(rng, texts[i], 0.008) for i in range(20)]  # near
    texts += [changed(rng, texts[i], 0.3) for i in range(20, 40)]  # far
    lines = [" ".join(text) for text in texts]
    sets = [pieces(line) for line in lines]
    similarity = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    signatures = np.array([signature(line) for line in lines])
    place, original = near_copies(signatures)
    found = dict(zip(place.tolist(), original.tolist()))
    for i in range(1, len(lines)):
        nearest = similarity[i, :i].max()
        assert i in found or nearest < 0.92
        assert i not in found or nearest > 0.68
    assert len(found) > 15
    assert all(first < i and similarity[i, first] > 0.68 for i, first in found.items())
    # One file against another.
    between = near_copies(signatures[60:], signatures[:60])
    assert {i + 60: o for i, o in zip(*between)} == {i: o for i, o in found.items() if i >= 60}
    for nothing in ((signatures[:0],), (signatures[:0], signatures), (signatures, signatures[:0])):
        assert not len(near_copies(*nothing).place)
