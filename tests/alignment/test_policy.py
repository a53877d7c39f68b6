"""The language model: its logits and losses are those of transformers, tied or not."""

import pytest
import torch
from conftest import edit_json, write_checkpoint
from reference import SIZES, reference_model, reference_texts
from runs import slow_but
from safetensors.torch import load_file, save_file

from minimore.alignment.policy import LanguageModel, require_language_model, token_losses
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError

TEXTS = [t for t in reference_texts() if len(t) > 1]


def language_model(checkpoint):
    trunk, _ = checkpoint.load()
    return LanguageModel(trunk, checkpoint.unembedding(trunk))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", slow_but(["gpt_neox", "gemma3_text"], SIZES))
@torch.no_grad()
def test_logits_and_losses_are_those_of_transformers(transformers, tmp_path, family, tied):
    theirs = reference_model(family, head="ForCausalLM", tie_word_embeddings=tied)
    checkpoint = write_checkpoint(theirs, tmp_path)
    ours = language_model(checkpoint)
    assert (ours.unembedding is ours.trunk.embedding.weight) == tied
    for text in TEXTS:
        expected = theirs(torch.tensor([text]), labels=torch.tensor([text]))
        logits = ours.logits(ours.trunk.states(pack([([], [text])])))
        tolerance = 1e-5 * float(expected.logits.abs().max())
        torch.testing.assert_close(logits, expected.logits[0], atol=tolerance, rtol=0)
        losses = token_losses(ours, text)
        assert losses.shape == (len(text) - 1,)
        torch.testing.assert_close(losses.mean(), expected.loss, atol=2e-5, rtol=2e-5)


def test_losses_do_not_depend_on_how_many_logits_exist_at_a_time(
    monkeypatch, transformers, tmp_path
):
    model = language_model(write_checkpoint(reference_model("llama", head="ForCausalLM"), tmp_path))
    expected = token_losses(model, TEXTS[-1])
    monkeypatch.setattr("minimore.alignment.policy.CHUNK", 7)
    torch.testing.assert_close(token_losses(model, TEXTS[-1]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_stored_head_that_differs_wins_over_the_tie(transformers, tmp_path):
    theirs = reference_model("llama", head="ForCausalLM", tie_word_embeddings=True)
    write_checkpoint(theirs, tmp_path)
    stored = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.randn(300, 24)}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = language_model(Checkpoint(str(tmp_path)))
    assert torch.equal(ours.unembedding, reopened.lm_head.weight)
    assert torch.equal(reopened.lm_head.weight, stored["lm_head.weight"])
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = language_model(Checkpoint(str(tmp_path)))
    assert model.unembedding is model.trunk.embedding.weight


def test_opt_is_tied_unless_it_says_otherwise(transformers, tmp_path):
    checkpoint = write_checkpoint(reference_model("opt", head="ForCausalLM"), tmp_path)
    edit_json(tmp_path / "config.json", dict(tie_word_embeddings=...))
    assert language_model(Checkpoint(str(tmp_path))).unembedding.shape == (300, 24)
    assert "lm_head.weight" not in checkpoint.tensors.files


def test_a_checkpoint_without_a_language_model_head_has_none(golden, damaged):
    checkpoint = Checkpoint(str(golden))
    assert checkpoint.unembedding(checkpoint.load()[0]) is None
    checkpoint = Checkpoint(str(damaged("llama", dict(tie_word_embeddings="yes"))))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        checkpoint.unembedding(checkpoint.load()[0])


def test_a_reward_model_is_no_policy_even_if_its_config_says_tied(damaged):
    with_both = damaged("llama", dict(tie_word_embeddings=True))
    assert Checkpoint(str(with_both)).has_head and Checkpoint(str(with_both)).is_tied
    with pytest.raises(InputError, match="no language-model head, so it cannot write"):
        require_language_model(Checkpoint(str(with_both)))
    tied = damaged(
        "llama",
        dict(tie_word_embeddings=True),
        weights=lambda t: {key: value for key, value in t.items() if key != "score.weight"},
    )
    require_language_model(Checkpoint(str(tied)))


def test_a_head_of_another_shape_is_refused(damaged):
    checkpoint = Checkpoint(
        str(damaged("llama", weights=lambda t: t | {"lm_head.weight": torch.zeros(299, 24)}))
    )
    with pytest.raises(InputError, match="299"):
        checkpoint.unembedding(checkpoint.load()[0])
