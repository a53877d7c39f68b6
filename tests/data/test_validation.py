"""What is held out: no prompt on both sides, in any source, and the same with the same seed."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from minimore.data.pairs import Source, TokenPair, load_source
from minimore.data.validation import hold_out
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
TEXT = np.arange(3, dtype=np.int32)


def source_of(name, prompts):
    """A source with a pair for each of these prompts, in order; pair number i has index i."""
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    pairs = [
        TokenPair(TEXT, TEXT, 2, 0, prompt=numbers[prompt], index=i)
        for i, prompt in enumerate(prompts)
    ]
    return Source(name, pairs, prompts=numbers, label_ties=7)


def prompts_of(source):
    """The prompt of every pair, by the number that the pair has."""
    text_of = {number: prompt for prompt, number in source.prompts.items()}
    return [text_of[pair.prompt] for pair in source.pairs]


def some_sources():
    """Three sources with repeated prompts, of which any two share some."""
    random = np.random.default_rng(5)
    return [
        source_of(name, [f"prompt {i}" for i in random.integers(low, low + 100, 300)])
        for name, low in (("ana", 0), ("ben", 60), ("cleo", 120))
    ]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_no_prompt_crosses_and_no_pair_is_lost(share):
    sources = some_sources()
    training, validation = hold_out(sources, share, seed=3)
    trained_on = {prompt for source in training for prompt in prompts_of(source)}
    held_out = {prompt for source in validation for prompt in prompts_of(source)}
    assert not trained_on & held_out
    for whole, left, out in zip(sources, training, validation):
        indices = [pair.index for pair in left.pairs + out.pairs]
        assert sorted(indices) == list(range(300))
        assert indices[: len(left.pairs)] == sorted(indices[: len(left.pairs)])
        assert set(left.prompts) == set(prompts_of(left))
        assert set(out.prompts) == set(prompts_of(out))
        assert len(out.prompts) >= round(share * len(whole.prompts))
        assert (out.name, out.label_ties) == (left.name, left.label_ties) == (whole.name, 7)


@pytest.mark.parametrize("share, expected", [(0.1, 5), (0.03, 2), (0.001, 1), (0.5, 25)])
def test_the_share_is_exact_where_no_prompt_is_shared(share, expected):
    sources = [source_of(name, [f"{name} {i % 50}" for i in range(120)]) for name in "ab"]
    for out in hold_out(sources, share, seed=0)[1]:
        assert len(out.prompts) == expected


def test_sources_of_the_same_prompts_hold_out_the_same_ones():
    prompts = [f"prompt {i}" for i in range(200)]
    sources = [source_of("a", prompts), source_of("b", prompts[::-1])]
    validation = hold_out(sources, 0.1, seed=1)[1]
    assert len(validation[0].prompts) == 20
    assert set(validation[0].prompts) == set(validation[1].prompts)


def test_the_seed_decides_and_nothing_else():
    first, again, other = (
        [set(source.prompts) for source in hold_out(some_sources(), 0.2, seed)[1]]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    backwards = hold_out(some_sources()[::-1], 0.2, 0)[1]
    assert [set(source.prompts) for source in backwards[::-1]] == first


def test_case_and_white_space_make_no_other_prompt():
    sources = [source_of("a", [f"What is {i}?" for i in range(40)])]
    sources.append(source_of("b", [f" what  IS\n{i}? " for i in range(40)]))
    validation = hold_out(sources, 0.25, seed=0)[1]
    numbers = [{prompt.split()[-1] for prompt in source.prompts} for source in validation]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 10


def test_a_source_with_nothing_left_to_train_on_is_refused():
    with pytest.raises(InputError, match="source 'one' has 1 different prompts, and none would be"):
        hold_out([source_of("one", ["the same"] * 9)], 0.1, seed=0)
    # What the large source holds out, the small one must hold out, too.
    large = source_of("large", [f"prompt {i}" for i in range(100)])
    out = next(iter(hold_out([large], 0.1, seed=0)[1][0].prompts))
    with pytest.raises(InputError, match="source 'small'"):
        hold_out([large, source_of("small", [out])], 0.1, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "pairs").is_dir(), reason=f"no preference data in {DATA}; set MINIMORE_DATA"
)
def test_real_sources_that_answer_the_same_prompts_hold_out_the_same_ones():
    tokenizer = Tokenizer(ROOT / "tests" / "goldens" / "gpt_neox")
    sources = [
        load_source(name, str(DATA / "pairs" / f"{name}.test.jsonl.gz"), tokenizer, 64)
        for name in ("dsp_academy", "dsp_literature", "oasst1")
    ]
    training, validation = hold_out(sources, 0.1, seed=0)
    academy, literature, oasst = (set(source.prompts) for source in validation)
    assert academy == literature and len(academy) == round(0.1 * 139)
    assert len(oasst) == round(0.1 * 98)
    trained_on = {prompt for source in training for prompt in source.prompts}
    assert not trained_on & (academy | oasst)
