"""Writes the stored references beside this file.

They are, per family, a tiny Hugging Face directory, and rewards by transformers.

    PYTHONPATH=.:tests python tests/goldens/make_goldens.py

Run with torch 2.13.0 (CPU), transformers 5.23.0, tokenizers 0.23.3, safetensors 0.8.0.
expected.json holds {"texts": token ids, "rewards": those of transformers' classes for sequence
classification in fp32}. The eps is large so that a wrong one shows. 290 of the 300 rows of the
embedding have a token.
"""

import json
from pathlib import Path

from reference import reference_model, reference_rewards, reference_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
CHANGES = {
    "gpt_neox": dict(
        layer_norm_eps=1e-2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
    ),
    "llama": dict(
        rms_norm_eps=1e-2,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=100.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
}
SPECIAL = {"gpt_neox": ["<|endoftext|>", "<|padding|>"], "llama": ["<unk>", "<s>", "</s>"]}
PROSE = [
    "\n\nHuman: How do I plant a garden?\n\nAssistant: "
    "Start with good soil, then the seeds, and give them water and light.",
    "\n\nHuman: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
]


def write_tokenizer(family: str, path: Path):
    """A byte-level BPE.

    Pythia's adds no token around a text; this Llama's adds BOS and EOS, as some in the wild do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        PROSE,
        trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=SPECIAL[family],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if family == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save(str(path))


if __name__ == "__main__":
    for family, changes in CHANGES.items():
        model, texts = reference_model(family, **changes), reference_texts()
        model.save_pretrained(HERE / family)
        write_tokenizer(family, HERE / family / "tokenizer.json")
        expected = {"texts": texts, "rewards": reference_rewards(model, texts).tolist()}
        (HERE / family / "expected.json").write_text(json.dumps(expected) + "\n", "utf-8")
