"""The doors on real preference data, where it is at hand.

MINIMORE_DATA names its directory (default ../shared/data).
"""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import slow_but

from minimore.data.forms import record_pairs
from minimore.data.pairs import load_source
from minimore.data.records import read_records
from minimore.data.world import small_gpt_neox
from minimore.model.checkpoint import Checkpoint, random_checkpoint
from minimore.model.tokenizer import Tokenizer
from minimore.reward import RewardModel, fresh_head, pair_rewards

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
SOURCES = ("hh_helpful", "hh_harmless", "oasst1", "webgpt", "summeval")
pytestmark = pytest.mark.skipif(
    not (DATA / "pairs").is_dir(), reason=f"no preference data in {DATA}; set MINIMORE_DATA"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DATA / "tokenizers" / "pythia")


def normalised(name):
    """Every (prompt, chosen, rejected) of a source, train and test."""
    for split in ("train", "test"):
        for _, r in read_records(str(DATA / "pairs" / f"{name}.{split}.jsonl.gz")):
            yield r["prompt"], r["chosen"], r["rejected"]


def usable(pairs):
    return {
        p[:3] for p in pairs if p.chosen.strip() and p.rejected.strip() and p.chosen != p.rejected
    }


def test_implicit_prompts_of_hh_are_cut_where_they_should():
    path = DATA / "native" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    found = [
        pair
        for line, record in read_records(str(path))
        for pair in record_pairs(record, str(line))[0]
    ]
    assert len(found) == 2312 and usable(found) == set(normalised("hh_harmless"))


@pytest.mark.parametrize("name, ties", [("helpful", 0), ("webgpt", 245)])
def test_text_and_score_records_become_pairs_and_ties(name, ties):
    records = json.loads(
        gzip.decompress((DATA / "native" / "text-score" / f"{name}.test.json.gz").read_bytes())
    )
    found = [record_pairs(r, "") for r in records]
    assert sum(t for _, t in found) == ties
    assert usable(p for pairs, _ in found for p in pairs) == set(
        normalised("hh_helpful" if name == "helpful" else name)
    )


@pytest.mark.parametrize("name", slow_but(["pythia"], ["pythia", "gpt2"]))
def test_tokenizers_give_the_published_ids(name):
    tokenizer, vectors = Tokenizer(DATA / "tokenizers" / name), DATA / "tokenizers" / "vectors"
    stem = {"pythia": "mpt", "gpt2": "gpt-2"}[name]
    texts = (vectors / f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [
        [int(i) for i in line.split()] for line in (vectors / f"{stem}.out").read_text().split("\n")
    ]
    assert tokenizer.encode(texts) == expected[: len(texts)]


@pytest.mark.slow
def test_opt_in_two_files_reads_as_gpt2_does():
    """The same merges in the same order: the tokens have the same texts under other ids."""
    opt, gpt2 = (Tokenizer(DATA / "tokenizers" / name) for name in ("opt", "gpt2"))
    texts = [
        r["prompt"] + r["chosen"]
        for _, r in read_records(str(DATA / "pairs" / "oasst1.test.jsonl.gz"))
    ][:100]
    for a, b in zip(opt.encode(texts), gpt2.encode(texts)):
        assert [opt.file.id_to_token(i) for i in a] == [gpt2.file.id_to_token(i) for i in b]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_real_pair_is_read(name, tokenizer):
    source = load_source(name, str(DATA / "pairs" / f"{name}.test.jsonl.gz"), tokenizer, 512)
    total = len(source.pairs) + source.identical + source.dropped
    assert (
        total == sum(1 for _ in read_records(str(DATA / "pairs" / f"{name}.test.jsonl.gz")))
        and source.dropped == 0
    )
    for p in source.pairs:
        assert max(len(p.chosen), len(p.rejected)) <= 512 and p.shared < min(
            len(p.chosen), len(p.rejected)
        )
        assert (p.chosen[: p.shared] == p.rejected[: p.shared]).all()


@pytest.mark.slow
def test_rewards_of_real_pairs_do_not_depend_on_sharing_or_company(tokenizer, tmp_path):
    random_checkpoint(
        tmp_path / "m",
        small_gpt_neox(64, 2, 4, 50304),
        DATA / "tokenizers" / "pythia" / "tokenizer.json",
        0,
        std=0.1,
    )
    trunk, _ = Checkpoint(str(tmp_path / "m")).load()
    model = RewardModel(trunk, fresh_head(64, 0))
    pairs = [
        p
        for name in SOURCES
        for p in load_source(
            name, str(DATA / "pairs" / f"{name}.test.jsonl.gz"), tokenizer, 512
        ).pairs[:5]
    ]
    together = pair_rewards(model, pairs)
    assert torch.allclose(together, pair_rewards(model, pairs, share=False), rtol=0, atol=1e-5)
    assert torch.allclose(
        together, pair_rewards(model, pairs[::-1], micro_tokens=1).flip(0), rtol=0, atol=1e-5
    )
    assert together.std() > 0.1


@pytest.mark.slow
def test_a_step_takes_a_quarter_of_the_flops_of_a_padded_one(monkeypatch):
    """16 pairs in one step, all blocks computed again; counted, so it is the same everywhere."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    import flops

    pairs = flops.read_pairs(
        DATA / "pairs" / "hh_helpful.train.jsonl.gz", DATA / "tokenizers" / "pythia"
    )
    longest = max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected))
    padded, ours = flops.padded_flops(pairs, longest), flops.our_flops(pairs)
    assert padded / ours >= 4.0
