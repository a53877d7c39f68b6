"""`minimore check`: its figures are true, and a checkpoint whose parts do not fit is seen."""

import json
import math
import shutil

import pytest
import torch
from conftest import edit_json, write_checkpoint
from reference import SIZES, reference_model
from runs import slow_but
from safetensors.torch import load_file, save_file

import minimore.check
from minimore.alignment.policy import LanguageModel, token_losses
from minimore.check import PARAGRAPH, example_ids, our_ids
from minimore.cli import main
from minimore.model.checkpoint import Checkpoint, save_checkpoint


def page(directory, tmp_path, *more, code=0):
    """What check found, and what it printed."""
    out = tmp_path / f"check-{len(list(tmp_path.glob('check-*')))}.json"
    assert main(["check", str(directory), "--json", str(out), *more]) == code
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A Llama that has learned the paragraph by heart."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("learned")
    checkpoint = write_checkpoint(
        reference_model(
            "llama", head="ForCausalLM", num_key_value_heads=2, max_position_embeddings=1024
        ),
        home / "fresh",
    )
    trunk, _ = checkpoint.load()
    model, ids = (
        LanguageModel(trunk, checkpoint.unembedding(trunk)),
        example_ids(checkpoint)["paragraph"],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        token_losses(model, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (home / "learned").mkdir()
    save_checkpoint(home / "learned", checkpoint, trunk, torch.ones(24))
    change_weights(
        home / "learned",
        lambda t: (
            {k: v for k, v in t.items() if k != "score.weight"}
            | {"lm_head.weight": model.unembedding.detach().clone()}
        ),
    )
    return home / "learned"


def change_weights(directory, change):
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


def copy_of(directory, tmp_path, name="copy"):
    shutil.copytree(directory, tmp_path / name)
    return tmp_path / name


@pytest.mark.slow
def test_what_has_learned_the_paragraph_reads_it_and_is_lost_in_its_words(
    learned, tmp_path, capsys
):
    found = page(learned, tmp_path)
    assert "untrained, or" not in capsys.readouterr().out
    assert found["language"]["paragraph"] < 3
    assert found["language"]["alphabetical"] > 30
    checkpoint = Checkpoint(str(learned))
    ids = example_ids(checkpoint)["paragraph"]
    bits = math.log2(found["language"]["paragraph"]) * (len(ids) - 1) / len(PARAGRAPH.encode())
    assert found["language"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
        dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
        dict(rms_norm_eps=10.0),
    ],
    ids=str,
)
def test_a_part_that_is_not_the_models_own_shows_in_the_perplexity(
    learned, tmp_path, mistake, capsys
):
    damaged = copy_of(learned, tmp_path)
    edit_json(damaged / "config.json", mistake)
    assert main(["check", str(damaged)]) == 2
    assert "not as it was written" in capsys.readouterr().err
    (damaged / "checksums.json").unlink()
    before, after = (
        page(d, tmp_path, "--parity", "none")["language"]["paragraph"] for d in (learned, damaged)
    )
    assert after > 2 * before


def test_an_untrained_model_is_said_to_be_one(transformers, tmp_path, capsys):
    write_checkpoint(reference_model("qwen2", head="ForCausalLM"), tmp_path / "model")
    page(tmp_path / "model", tmp_path)
    printed = capsys.readouterr().out
    assert (
        "it is untrained, or something here is not its own" in printed
        and "the head is untrained" in printed
    )


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but(["gpt_neox", "gemma3_text"], SIZES))
def test_hidden_states_agree_with_transformers(transformers, tmp_path, family, capsys):
    theirs = reference_model(family, head="ForCausalLM", max_position_embeddings=900)
    write_checkpoint(theirs, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    found = page(tmp_path / "model", tmp_path)
    assert found["parity"]["agrees"] is True and found["parity"]["difference"] < 2e-5
    assert found["memory"]["parameters"] == sum(p.numel() for p in theirs.base_model.parameters())
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_difference_is_an_error(transformers, golden, tmp_path, monkeypatch, capsys):
    theirs = minimore.check.transformers_states

    def different(*arguments):
        version, states, ids = theirs(*arguments)
        states[-1] *= 1.01
        return version, states, ids

    monkeypatch.setattr("minimore.check.transformers_states", different)
    found = page(golden, tmp_path, code=1)["parity"]
    assert found["agrees"] is False and found["difference"] == pytest.approx(0.0099, rel=0.01)
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_other_token_ids_are_said(transformers, golden, tmp_path, monkeypatch, capsys):
    theirs = minimore.check.transformers_states
    other_ids = {}
    monkeypatch.setattr(
        "minimore.check.transformers_states",
        lambda *a: (*theirs(*a)[:2], theirs(*a)[2] | other_ids),
    )
    other_ids |= {"letters": [5, 6, 7]}
    assert page(golden, tmp_path, code=1)["parity"]["same_ids"] is False
    said = capsys.readouterr()
    assert "of the letters differ from place 0 on: theirs [5, 6, 7]" in said.out
    assert said.err.count("\n") == 1
    tokenizer = Checkpoint(str(golden)).tokenizer
    ours = our_ids(tokenizer)
    other_ids |= ours | {"paragraph": [*ours["paragraph"], 2]}
    assert page(golden, tmp_path)["parity"]["same_ids"] is True
    assert "it adds [2] behind a text" in capsys.readouterr().out
    other_ids |= {"conversation": ours["conversation"][len(tokenizer.bos) :]}
    assert page(golden, tmp_path)["parity"]["same_ids"] is True
    if tokenizer.bos:
        assert "it adds no BOS" in capsys.readouterr().out


def test_a_saved_model_is_read_alike_in_texts_and_in_conversations(
    transformers, golden, tmp_path, capsys
):
    checkpoint = Checkpoint(str(golden))
    save_checkpoint(tmp_path, checkpoint, *checkpoint.load())
    out = tmp_path / "check.json"
    assert main(["check", str(tmp_path), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("paragraph", "white space", "letters", "code", "conversation"):
        assert name in said.split("same token ids of")[1]
    assert "no BOS" not in said


@pytest.mark.parametrize("damage", [{"lm_head.weight": 1e5}, {"model.norm.weight": 1e38}], ids=str)
def test_numbers_that_are_not_finite_are_an_error(learned, tmp_path, capsys, damage):
    broken = copy_of(learned, tmp_path)
    change_weights(broken, lambda t: {k: v * damage.get(k, 1) for k, v in t.items()})
    for more in ([], ["--parity", "none"]):
        assert main(["check", "--model", str(broken), "--json", str(tmp_path / "out"), *more]) == 1
        assert "is not finite" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_transformers_nothing_is_compared(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert page(golden, tmp_path)["parity"] == {}
    assert "transformers is not installed" in capsys.readouterr().out


def test_what_transformers_does_not_open_is_not_compared(
    transformers, golden, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *a, **k: 1 / 0)
    assert page(golden, tmp_path)["parity"] == {}
    assert "division by zero" in capsys.readouterr().out


def test_rewards_are_those_of_score(golden, tmp_path):
    found = page(golden, tmp_path, "--parity", "none")["rewards"]
    texts = [
        f"\n\nHuman: {minimore.check.QUESTION}\n\nAssistant: {answer}"
        for answer in minimore.check.ANSWERS.values()
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": texts}))
    assert (
        main(
            [
                "score",
                "--model",
                str(golden),
                "--input",
                str(tmp_path / "in.jsonl"),
                "--output",
                str(tmp_path / "out.jsonl"),
            ]
        )
        == 0
    )
    assert list(found.values()) == pytest.approx(
        json.loads((tmp_path / "out.jsonl").read_text())["rewards"], abs=1e-5
    )


def test_types_and_files_are_told(golden, tmp_path, monkeypatch):
    monkeypatch.setattr("minimore.model.tensors.SHARD_BYTES", 20_000)
    checkpoint, directory = Checkpoint(str(golden)), tmp_path / "shards"
    directory.mkdir()
    save_checkpoint(directory, checkpoint, *checkpoint.load(), dtype="bfloat16")
    found = page(directory, tmp_path, "--parity", "none")["weights"]
    assert found["types"] == ["bfloat16"] and found["heads"] == ["score.weight"]
    assert (
        found["files"] == sorted(p.name for p in directory.glob("*.safetensors"))
        and len(found["files"]) > 1
    )
    assert found["bytes"] == sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def test_a_short_context_is_respected(transformers, tmp_path, capsys):
    write_checkpoint(
        reference_model("opt", head="ForCausalLM", max_position_embeddings=40), tmp_path / "opt"
    )
    found = page(tmp_path / "opt", tmp_path)
    assert found["parity"]["difference"] < 2e-5 and found["language"]["bits_per_byte"] is None
    assert "its first 40 tokens" in capsys.readouterr().out


def test_a_template_that_refuses_is_quoted(golden, damaged, tmp_path, capsys):
    directory = damaged("llama")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system, no user') }}")
    assert "no system, no user" in page(directory, tmp_path, "--parity", "none")["template"]
