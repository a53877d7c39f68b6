"""Random models made by transformers, the oracle, and the texts they are compared on.

Tests and make_goldens.py use them. Weights are O(1): with the usual initialisation (std .02) a
wrong activation or a missing bias would pass any tolerance.
"""

import random

import torch

SIZES = {
    "gpt_neox": dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": dict(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
SIZES |= {
    family: SIZES["llama"] | dict(num_key_value_heads=2) for family in ("mistral", "qwen2", "qwen3")
}
SIZES["qwen3"] |= dict(head_dim=8)
SIZES["olmo2"] = SIZES["phi3"] = SIZES["llama"] | dict(num_key_value_heads=2, pad_token_id=None)
SIZES["gemma"] = SIZES["phi3"] | dict(head_dim=8)
# One block in two has a window, which is shorter than the texts.
SIZES["gemma3_text"] = SIZES["gemma"] | dict(
    sliding_window=16, layer_types=["sliding_attention", "full_attention"]
)
SIZES["opt"] = dict(
    vocab_size=300,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=40,
    word_embed_proj_dim=24,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=2,
    eos_token_id=2,
)
SIZES["gpt2"] = dict(
    vocab_size=300,
    n_embd=24,
    n_layer=2,
    n_head=4,
    n_inner=40,
    n_positions=512,
    pad_token_id=None,
    bos_token_id=2,
    eos_token_id=2,
)


def quiet_transformers():
    """transformers without its progress bars and notices."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def reference_model(family: str, seed: int = 0, head: str = "ForSequenceClassification", **changes):
    """transformers' model of a family with one label, SIZES unless changed, O(1) weights."""
    transformers = quiet_transformers()
    config = transformers.AutoConfig.for_model(
        family, **(SIZES[family] | dict(num_labels=1) | changes)
    )
    model = getattr(transformers, "AutoModel" + head).from_config(config).eval()
    # Gemma scales what leaves its embedding, and adds 1 to the weight of a norm.
    is_gemma = family.startswith("gemma")
    embedding_std = config.hidden_size**-0.5 if is_gemma else 1
    norm_mean = 0 if is_gemma else 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                std = embedding_std if "embed_" in name else p.shape[1] ** -0.5
                p.normal_(0, std, generator=generator)
            else:
                mean_and_std = (0, 0.3) if name.endswith("bias") else (norm_mean, 0.2)
                p.normal_(*mean_and_std, generator=generator)
    return model


def reference_texts(vocabulary: int = 300, seed: int = 0) -> list[list[int]]:
    """Token ids: lengths 1 to 200, repetitions, the first and the last id, and every id once."""
    chance = random.Random(seed)
    texts = [
        [chance.randrange(vocabulary - 15) for _ in range(length)]
        for length in (1, 2, 3, 17, 64, 200)
    ]
    every = list(range(vocabulary))
    chance.shuffle(every)
    return texts + [
        [7] * 40,
        [5, 6] * 20,
        [0],
        [vocabulary - 1],
        [0, vocabulary - 1],
        [vocabulary - 1, 0],
        every,
    ]


@torch.no_grad()
def reference_rewards(model, texts: list[list[int]]) -> torch.Tensor:
    """transformers' reward of each text, one at a time, so without padding: (S,)."""
    return torch.cat([model(torch.tensor([text])).logits[0] for text in texts])
