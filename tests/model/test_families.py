"""Families with norms behind, scaled embeddings and fused matrices: trained, resumed, planned."""

import re
import shutil

import pytest
import torch
from conftest import GOLDENS, ROOT, write_checkpoint
from reference import SIZES, reference_model
from runs import RECIPES, content, options
from safetensors.torch import load_file

from minimore.alignment.policy import LanguageModel
from minimore.cli import main
from minimore.data.world import World
from minimore.engine.optim import AdamW
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint, random_checkpoint
from minimore.train import train

INTERNLM2 = dict(
    model_type="internlm2",
    num_key_value_heads=2,
    **{k: v for k, v in SIZES["llama"].items() if k.endswith("size") or k.startswith("num")},
)


def written(family, directory):
    """A directory with a model of this family, and a tokenizer."""
    if family == "internlm2":
        random_checkpoint(directory, INTERNLM2, GOLDENS / "llama" / "tokenizer.json", 0, 0.2)
    else:
        write_checkpoint(reference_model(family, head="ForCausalLM"), directory)
    return directory


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two sources of a few pairs."""
    directory = tmp_path_factory.mktemp("few")
    return directory, World(annotators=("ana", "ben"), train_pairs=(9, 7), test_pairs=2).write(
        directory
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, recipe",
    [
        ("gemma3_text", "offloaded"),
        ("olmo2", "split"),
        ("internlm2", "lossy"),
        ("gemma", "streamed"),
        ("phi3", "half lossy"),
    ],
)
def test_a_crashed_run_resumes_bitwise(transformers, few, tmp_path, family, recipe, monkeypatch):
    changes = RECIPES[recipe] | {"save_steps": 2, "batch_size": 4}
    changes["model"] = str(written(family, tmp_path / "model"))
    assert train(options(few, tmp_path / "whole", **changes)) == 0
    update = AdamW.update

    def crash(optimizer, name, *arguments):
        if name == "trunk.blocks.0.mlp.up.weight" and optimizer.steps == 3:
            raise RuntimeError("crash")
        return update(optimizer, name, *arguments)

    monkeypatch.setattr(AdamW, "update", crash)
    with pytest.raises(RuntimeError):
        train(options(few, tmp_path / "cut", **changes))
    monkeypatch.setattr(AdamW, "update", update)
    assert train(options(few, tmp_path / "cut", resume=True, **changes)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    read, saved = (load_file(tmp_path / d / "model.safetensors") for d in ("model", "whole"))
    assert saved.keys() - read.keys() == {"score.weight"}
    moved = [key for key in saved.keys() & read.keys() if not torch.equal(saved[key], read[key])]
    assert len(moved) == len(saved) - 1


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "internlm2"])
def test_a_plan_counts_its_parameters(transformers, tmp_path, family, capsys):
    written(family, tmp_path / "model")
    parameters = sum(p.numel() for p in open_trunk(tmp_path / "model").parameters())
    assert main(["plan", str(tmp_path / "model"), "--tokens", "90"]) == 0
    width = SIZES["llama"]["hidden_size"]
    assert f"{family}, {parameters + width:,} parameters" in capsys.readouterr().out


def test_the_norms_of_a_random_gemma_multiply_by_one(tmp_path):
    config = dict(model_type="gemma", **SIZES["gemma"])
    random_checkpoint(tmp_path / "gemma", config, GOLDENS / "llama" / "tokenizer.json", 0)
    trunk = open_trunk(tmp_path / "gemma")
    assert not trunk.final_norm.weight.any()
    x = torch.randn(3, trunk.c.width)
    torch.testing.assert_close(trunk.final_norm(x).square().mean(1), torch.ones(3))


def open_trunk(directory):
    trunk, _ = Checkpoint(str(directory)).load()
    return trunk


# ---- the text model of a Gemma 3 that reads images -----------------------------------------------


@torch.no_grad()
def test_the_text_model_in_a_gemma_3_for_images_is_saved_alone_as_the_page_says(
    transformers, tmp_path
):
    """The lines of code are those of model/README.md."""
    sizes = {k: v for k, v in SIZES["gemma3_text"].items() if k != "layer_types"}
    vision = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
    )
    DIR, NEW = str(tmp_path / "whole"), str(tmp_path / "text")
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    whole.save_pretrained(DIR)
    page = (ROOT / "minimore" / "model" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"DIR": DIR, "NEW": NEW})
    shutil.copy(GOLDENS / "llama" / "tokenizer.json", NEW)
    checkpoint, ids = Checkpoint(NEW), list(range(5, 45))
    trunk, _ = checkpoint.load()
    logits = LanguageModel(trunk, checkpoint.unembedding(trunk)).logits(
        trunk.states(pack([([], [ids])]))
    )
    torch.testing.assert_close(logits, whole(torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5)
