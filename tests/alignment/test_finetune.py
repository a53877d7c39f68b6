"""Fine-tuning: an ordinary run that is safe to kill, and that transformers opens."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json, write_checkpoint
from power_cut import Disk, restore
from reference import SIZES, reference_model
from runs import RECIPES, slow_but
from safetensors.torch import load_file, save_file

import minimore.training as training
from minimore.alignment.finetune import FinetuneOptions, finetune, workload_of
from minimore.alignment.perplexity import response_losses
from minimore.alignment.policy import open_policy
from minimore.alignment.responses import read_responses
from minimore.cli import main
from minimore.data.world import World
from minimore.engine.optim import AdamW
from minimore.model.attention import pack
from minimore.model.checkpoint import Checkpoint
from minimore.options import InputError
from minimore.reward import ModelOptions

SAMPLES = [
    {"prompt": "Hello ", "response": "world and more", "finished": True},
    {"prompt": "1 2 ", "responses": ["3 4 5", "x y"], "finished": [True, False]},
    {"prompt": "a b ", "chosen": "c d", "rejected": "e"},
    {"prompt": "who ", "response": "are you today"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small world: a policy with random weights, and files of pairs."""
    home = tmp_path_factory.mktemp("home")
    World(annotators=("ana", "ben"), train_pairs=(36,), test_pairs=5).write(home)
    return home


def options(home, output, **changes):
    values = {
        "model": str(home / "model"),
        "input": (str(home / "data/ana.train.jsonl"), str(home / "data/ben.train.jsonl")),
        "output": str(output),
        "learning_rate": 1e-3,
        "batch_size": 6,
        "log_steps": 100,
    }
    return FinetuneOptions(**values | changes)


def content(run):
    """Everything that must be equal to the bit; wall time is left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        (run / "model.safetensors").read_bytes(),
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        [(run / name).read_bytes() for name in ("config.json", "checksums.json")],
    )


# ---- what is trained -----------------------------------------------------------------------------


def test_steps_are_those_of_torch(transformers, tmp_path):
    """Three steps in float32 against transformers, autograd and torch's AdamW, text by text."""
    theirs = reference_model("gpt_neox", head="ForCausalLM")
    checkpoint = write_checkpoint(theirs, tmp_path / "model")
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in SAMPLES))
    changes = {"batch_size": 4, "epochs": 3, "schedule": "constant", "warmup": 0.0}
    changes |= {"model": str(tmp_path / "model"), "input": (str(path),), "learning_rate": 1e-3}
    assert finetune(options(tmp_path, tmp_path / "run", **changes)) == 0
    items = read_responses(str(path), checkpoint, 512).items
    texts = [(prompt, response) for prompt, responses in items for response in responses]
    targets = sum(len(response) for _, response in texts)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        total = 0.0
        for prompt, response in texts:
            logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(response), reduction="sum")
        (total / targets).backward()
        losses.append(total.item() / targets)
        optimizer.step()
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["targets"] for line in log] == [targets] * 3
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    "family, tied",
    [
        ("gpt_neox", True),
        ("gemma3_text", True),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in SIZES),
    ],
)
def test_transformers_opens_it_with_equal_logits(transformers, tmp_path, family, tied):
    theirs = reference_model(family, head="ForCausalLM", tie_word_embeddings=tied)
    write_checkpoint(theirs, tmp_path / "model")
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in SAMPLES))
    changes = {"model": str(tmp_path / "model"), "input": (str(path),), "batch_size": 2}
    assert finetune(options(tmp_path, tmp_path / "run", max_length=60, **changes)) == 0
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert type(trained) is type(theirs)
    run = ModelOptions(model=str(tmp_path / "run"))
    checkpoint = Checkpoint(run.model)
    ours = open_policy(checkpoint, run)
    assert checkpoint.is_tied == tied
    ids = checkpoint.tokenizer.encode(["Hello world"])[0]
    with torch.no_grad():
        expected = trained(torch.tensor([ids])).logits[0]
        logits = ours.logits(ours.trunk.states(pack([([], [ids])])))
        before = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5 * expected.abs().max(), rtol=0)
    assert (logits - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stored, saved", [(None, 2), (2, 2), ([5, 2], [5, 2]), (5, [2, 5])])
def test_transformers_stops_at_the_end_that_is_learned(transformers, tmp_path, stored, saved):
    """The tokenizer names </s>, which has the id 2; config.json may name another, or none."""
    theirs = reference_model("llama", head="ForCausalLM")
    write_checkpoint(theirs, tmp_path / "model")
    edit_json(tmp_path / "model/config.json", {"eos_token_id": stored})
    (tmp_path / "model/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in SAMPLES))
    changes = {"model": str(tmp_path / "model"), "input": (str(path),), "save_steps": 1}
    assert finetune(options(tmp_path, tmp_path / "run", max_length=60, **changes)) == 0
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert trained.generation_config.eos_token_id == saved


@pytest.mark.slow
def test_it_learns_and_metrics_and_card_say_so(home, tmp_path, capsys):
    run = tmp_path / "run"
    assert finetune(options(home, run, epochs=8, learning_rate=3e-3, log_steps=10)) == 0
    out = capsys.readouterr().out
    assert "36 responses to 36 prompts" in out and "perplexity" in out
    checkpoint = Checkpoint(str(run))
    items = read_responses(str(home / "data/ana.train.jsonl"), checkpoint, 512).items
    before, after = (
        sum(float(loss.sum()) for loss in response_losses(model, items))
        for model in (
            open_policy(Checkpoint(str(where)), ModelOptions(model=str(where)))
            for where in (home / "model", run)
        )
    )
    assert after < 0.75 * before
    card = (run / "README.md").read_text()
    assert "ana.train.jsonl: 36 responses" in card and "| `--epochs` | `8` |" in card
    with pytest.raises(SystemExit):
        main(["align", "finetune"])


def test_a_model_without_an_end_says_so(home, tmp_path, capsys):
    assert finetune(options(home, tmp_path / "with", max_length=8)) == 0
    assert "names no EOS" not in capsys.readouterr().out
    shutil.copytree(home / "model", tmp_path / "model")
    edit_json(tmp_path / "model/config.json", {"eos_token_id": 9999})
    (tmp_path / "model/tokenizer_config.json").unlink(missing_ok=True)
    changes = {"model": str(tmp_path / "model"), "max_length": 8}
    assert finetune(options(home, tmp_path / "run", **changes)) == 0
    assert "names no EOS, so the policy does not learn where" in capsys.readouterr().out


def test_the_work_of_many_epochs_is_that_of_some(home):
    """As for a reward model, so that a memory is planned before the last day."""
    origin = Checkpoint(str(home / "model"))
    files = [read_responses(str(home / "data/ana.train.jsonl"), origin, 512)]
    tokens = sum(item.tokens for item in files[0].items)
    for epochs in (1, 3, 10**9):
        schedule = training.Schedule(options(home, ""), epochs, (len(files[0].items),), 5)
        work = workload_of(schedule, files, origin)
        assert work.steps == 8 * epochs and work.tokens == tokens * epochs
        assert len(work.largest) == 5


# ---- what survives a kill ------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(["plain"], ["plain", "offloaded", "lossy"]))
def test_a_crashed_run_resumes_bitwise(home, tmp_path, name, monkeypatch):
    changes = RECIPES.get(name, {}) | {"save_steps": 3}
    assert finetune(options(home, tmp_path / "whole", **changes)) == 0
    real, calls = AdamW.update, []

    def crash(optimizer, name, *arguments):
        if name == "trunk.blocks.0.mlp.up.weight":
            calls.append(1)
            if len(calls) in (2, 9):  # before any checkpoint, and between two
                raise RuntimeError("crash")
        return real(optimizer, name, *arguments)

    monkeypatch.setattr(AdamW, "update", crash)
    for attempt in range(2):
        with pytest.raises(RuntimeError):
            finetune(options(home, tmp_path / "cut", resume=attempt > 0, **changes))
    monkeypatch.setattr(AdamW, "update", real)
    assert [p.name for p in training.checkpoints(tmp_path / "cut")] == ["checkpoint-6"]
    assert finetune(options(home, tmp_path / "cut", resume=True, **changes)) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    assert finetune(options(home, tmp_path / "cut", resume=True, **changes)) == 0  # finished


@pytest.mark.slow
def test_a_power_cut_loses_nothing(home, tmp_path, monkeypatch):
    """As tests/test_power_cut.py does it for the training of a reward model."""
    root = tmp_path / "disk"
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert finetune(options(home, root / "run", save_steps=4)) == 0
    expected = content(root / "run")
    for number, state in enumerate(disk.states[:: -(-len(disk.states) // 4)]):
        after = restore(state, tmp_path / f"after-{number}")
        assert finetune(options(home, after / "run", save_steps=4, resume=True)) == 0
        assert content(after / "run") == expected
        assert not list((after / "run").rglob("*.partial"))


# ---- bad input -----------------------------------------------------------------------------------


def test_what_is_refused(home, tmp_path, capsys, monkeypatch):
    def refused(said, **changes):
        values = vars(options(home, tmp_path / "run")) | changes
        words = ["align", "finetune"]
        for key, value in values.items():
            for single in value if isinstance(value, tuple) else [value]:
                if single is True:
                    words.append("--" + key.replace("_", "-"))
                elif single is not None and single is not False:
                    words += ["--" + key.replace("_", "-"), str(single)]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused("no usable response", input=(str(empty),))
    refused("is given twice", input=(str(empty), str(empty)))
    refused("no such file", input=(str(tmp_path / "missing"),))
    refused("needs --engine streamed", parameters="split")
    refused("--batch-size 0", batch_size=0)
    refused("--max-length 1: expected at least 2", max_length=1)
    again = home / "data" / ".." / "data/ana.train.jsonl"
    refused("is given twice", input=(str(home / "data/ana.train.jsonl"), str(again)))
    reward = tmp_path / "reward"
    shutil.copytree(home / "model", reward)
    tensors = load_file(reward / "model.safetensors")
    tensors.pop("embed_out.weight")
    save_file(tensors, reward / "model.safetensors")
    refused("has no language-model head, so it cannot write", model=str(reward))


def test_a_resume_with_other_texts_or_options_is_refused(home, tmp_path, monkeypatch, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text((home / "data/ana.train.jsonl").read_text())
    changes = {"input": (str(path),), "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr("minimore.alignment.finetune.finish", lambda *a: None)
        assert finetune(options(home, tmp_path / "run", **changes)) == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(InputError, match="has other texts"):
        finetune(options(home, tmp_path / "run", resume=True, **changes))
    path.write_text("".join(lines))
    with pytest.raises(InputError, match="--seed is 2 but the run"):
        finetune(options(home, tmp_path / "run", resume=True, seed=2, **changes))
    assert finetune(options(home, tmp_path / "run", resume=True, **changes)) == 0
