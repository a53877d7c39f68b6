"""The loss of responses is that of transformers, whatever they are packed with."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import write_checkpoint
from reference import SIZES, reference_model

from minimore.alignment.language import Responses
from minimore.alignment.perplexity import response_losses
from minimore.alignment.policy import LanguageModel
from minimore.cli import main

ITEMS = [
    Responses([5, 6, 7], [[8, 9, 10, 2], [3]]),
    Responses([11], [[12], [13, 14, 2]]),
    Responses(list(range(20, 45)), [[3, 4, 2], list(range(50, 90))]),
]


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_losses_are_those_of_transformers(transformers, tmp_path, family):
    theirs = reference_model(family, head="ForCausalLM")
    checkpoint = write_checkpoint(theirs, tmp_path)
    trunk, _ = checkpoint.load()
    ours = LanguageModel(trunk, checkpoint.unembedding(trunk))
    together = response_losses(ours, ITEMS)
    apart = [response_losses(ours, [item], 1)[0] for item in ITEMS]
    for item, found, alone in zip(ITEMS, together, apart):
        for response, loss, other in zip(item.responses, found, alone):
            logits = theirs(torch.tensor([item.prompt + response])).logits[0]
            expected = F.cross_entropy(
                logits[len(item.prompt) - 1 : -1], torch.tensor(response), reduction="sum"
            )
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            assert other.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_command(transformers, tmp_path, capsys):
    checkpoint = write_checkpoint(reference_model("llama", head="ForCausalLM"), tmp_path / "model")
    pairs = [
        {"prompt": "Hello ", "chosen": "world", "rejected": "there you"},
        {"prompt": "1 2 ", "chosen": "3 4 5", "rejected": "x"},
    ]
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["align", "perplexity", "--model", str(tmp_path / "model"), "--input", str(path)]
    assert main([*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    trunk, _ = checkpoint.load()
    model = LanguageModel(trunk, checkpoint.unembedding(trunk))
    for side in ("chosen", "rejected"):
        total, count = 0.0, 0
        for pair in pairs:
            encode = checkpoint.tokenizer.encode
            (prompt,), (whole,) = encode([pair["prompt"]]), encode([pair["prompt"] + pair[side]])
            shared = next(
                (i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b),
                min(len(prompt), len(whole)),
            )
            other = encode([pair["prompt"] + pair["rejected" if side == "chosen" else "chosen"]])[0]
            shared = min(
                shared,
                next((i for i, (a, b) in enumerate(zip(prompt, other)) if a != b), len(prompt)),
            )
            (loss,) = response_losses(model, [Responses(whole[:shared], [whole[shared:]])])
            total, count = total + loss.item(), count + len(whole) - shared
        assert found[side]["tokens"] == count
        assert found[side]["loss"] == pytest.approx(total, rel=1e-5)
        assert found[side]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert "perplexity" in capsys.readouterr().out
    assert main([*command, "--max-length", "4"]) == 0
    assert "2 pairs truncated to 4 tokens" in capsys.readouterr().out
    assert main([*command, "--max-length", "2"]) == 2
    assert "--max-length 2: expected at least 3" in capsys.readouterr().err
    path.write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": ""}))
    assert main(command) == 2
    assert "no usable pair" in capsys.readouterr().err
