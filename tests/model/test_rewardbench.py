"""A saved model gets the rewards of `minimore score` from RewardBench's way of scoring, too.

RewardBench (github.com/allenai/reward-bench, 0.1.4) is not installed; what it does with a model
that it does not know by name is done here in our words, with the same calls of transformers:

    the chat template writes prompt and response as text, which the tokenizer encodes with what it
    puts in front of every text; where that makes two BOS, attention does not see the first; padded
    on the left (its command) or the right (its script), cut at 2048 tokens or not at all; the
    logit of AutoModelForSequenceClassification is the score
"""

import json

import numpy as np
import pytest
import torch
from runs import slow_but
from test_saving import save

from minimore.cli import main

PAIRS = 50  # which are a hundred texts
TEMPLATES = {
    "none": None,
    "with BOS": "{{ '<s>' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
    "without BOS": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}",
}


def pairs():
    chance = np.random.default_rng(0)
    words = ["good", "bad ", "Grüße", "\nHuman:", "2+2", "answer", "<x>", "汉字", "é"]
    texts = [
        [" ".join(chance.choice(words, chance.integers(1, 9))) for _ in range(3)]
        for _ in range(PAIRS)
    ]
    return [dict(zip(("prompt", "chosen", "rejected"), three)) for three in texts]


def rendered(tokenizer, pair):
    """The two conversations as text."""
    asked = {"role": "user", "content": pair["prompt"]}
    for side in ("chosen", "rejected"):
        messages = [asked, {"role": "assistant", "content": pair[side]}]
        yield tokenizer.apply_chat_template(messages, tokenize=False)


@torch.no_grad()
def scores(model, tokenizer, texts, truncate):
    """The logits of a batch."""
    batch = tokenizer(
        texts, padding=True, truncation=truncate, max_length=2048, return_tensors="pt"
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if tokenizer.bos_token:
        for row in range(len(texts)):
            first = int(mask[row].argmax())
            if ids[row, first : first + 2].tolist() == [tokenizer.bos_token_id] * 2:
                mask[row, first] = 0
    return model(**batch).logits[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("name", slow_but(["none"], TEMPLATES))
def test_rewardbench_scores_a_hundred_texts_as_we_do(transformers, golden, damaged, tmp_path, name):
    source = damaged(golden.name)
    if TEMPLATES[name]:
        (source / "chat_template.jinja").write_text(TEMPLATES[name])
    saved = save(source, tmp_path / "saved")
    (tmp_path / "in").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
    command = ["score", "--model", saved, "--chat", "--max-length", 2048, "--beyond-positions"]
    command += ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert main([str(word) for word in command]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    ours = [line[key] for line in lines for key in ("chosen_reward", "rejected_reward")]
    assert len(ours) == 2 * PAIRS and np.std(ours) > 0.01

    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert model.dtype == torch.float32
    for side, truncate, size in (("left", False, 1), ("left", False, 8), ("right", True, 8)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        tokenizer.padding_side = side
        tokenizer.truncation_side = "left"
        texts = [text for pair in pairs() for text in rendered(tokenizer, pair)]
        theirs = []
        for start in range(0, len(texts), size):
            theirs += scores(model, tokenizer, texts[start : start + size], truncate)
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
