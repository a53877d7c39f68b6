"""Validation: prompts of the training sources that are held out, so that training never sees them.

    hash of seed and prompt    -> one order of all prompts, the same in every source
    the first of every source  -> held out, of this source and of every other one that has them

So no prompt is on both sides, and sources that have the same prompts hold out the same ones.
"""

from collections.abc import Sequence
from dataclasses import replace

from ..options import InputError
from .pairs import Source
from .prompts import normalised, seeded_hash


def hold_out(
    sources: Sequence[Source], share: float, seed: int
) -> tuple[list[Source], list[Source]]:
    """The sources without what is held out, and what is held out, as sources of the same names.

    share: of the prompts of each source, rounded, but at least one of them; what other sources hold
    out comes on top. Raises InputError where a source would have nothing left to train on.
    """
    held_out = {key for source in sources for key in first_keys(source, share, seed)}
    training, validation = [], []
    for source in sources:
        is_held_out = {prompt: key_of(prompt, seed) in held_out for prompt in source.prompts}
        training.append(
            source_of_prompts(source, [p for p in source.prompts if not is_held_out[p]])
        )
        validation.append(source_of_prompts(source, [p for p in source.prompts if is_held_out[p]]))
        if not training[-1].pairs:
            raise InputError(
                f"--validation {share}: source {source.name!r} has {len(source.prompts)} different"
                " prompts, and none would be left to train on; expected a smaller share, or more"
                " prompts"
            )
    return training, validation


def first_keys(source: Source, share: float, seed: int) -> list[bytes]:
    """The keys of the prompts that a source holds out: the first ones in the order of all keys."""
    keys = sorted({key_of(prompt, seed) for prompt in source.prompts})
    return keys[: max(1, round(share * len(keys)))]


def key_of(prompt: str, seed: int) -> bytes:
    """A hash of the seed and a prompt; the case of letters and white space make no difference."""
    return seeded_hash(normalised(prompt), seed)


def source_of_prompts(source: Source, prompts: Sequence[str]) -> Source:
    """A source of the pairs of some prompts alone. Its counts stay those of the whole file."""
    numbers = {prompt: source.prompts[prompt] for prompt in prompts}
    in_part = set(numbers.values())
    pairs = [pair for pair in source.pairs if pair.prompt in in_part]
    return replace(source, pairs=pairs, prompts=numbers)


def held_out_line(training: Source, validation: Source) -> str:
    """How much of a source is held out, in one line."""
    held_out, prompts = len(validation.prompts), len(validation.prompts) + len(training.prompts)
    return (
        f"held out for validation: {held_out} of {prompts} prompts, {len(validation.pairs)} of"
        f" {len(validation.pairs) + len(training.pairs)} pairs"
    )
