"""Models and pairs of known shapes, for tests of what they cost."""

from dataclasses import replace

import numpy as np
import torch

from minimore.data.pairs import TokenPair
from minimore.engine.workload import PairShape, Workload
from minimore.model.model_config import ModelConfig
from minimore.model.trunk import Trunk
from minimore.reward import RewardModel, fresh_head

GPT_NEOX = ModelConfig(
    vocabulary=300,
    width=256,
    blocks=3,
    heads=4,
    kv_heads=4,
    head_width=64,
    mlp_width=1024,
    activation="gelu",
    gated=False,
    norm="layer",
    norm_eps=1e-5,
    parallel_residual=True,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    rotary_width=16,
    rope_base=1e4,
)
LLAMA = replace(
    GPT_NEOX,
    mlp_width=688,
    activation="silu",
    gated=True,
    norm="rms",
    parallel_residual=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    rotary_width=64,
)
OPT = replace(
    GPT_NEOX,
    activation="relu",
    parallel_residual=False,
    rotary_width=0,
    learned_positions=100,
)
GEMMA = replace(
    LLAMA,
    kv_heads=1,
    head_width=128,
    rotary_width=128,
    activation="gelu_tanh",
    norm_offset=1.0,
    embedding_scale=16.0,
)
GEMMA3 = replace(
    GEMMA, qk_norm="each head", query_scale=0.5, norm_after=True, window_rope_base=100.0
)  # windows would be tiles of their own
FAMILIES = {
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "qwen3": replace(LLAMA, kv_heads=2, qk_norm="each head"),
    "qwen2": replace(LLAMA, kv_heads=2, qkv_bias=True),
    "opt": OPT,
    "olmo2": replace(LLAMA, qk_norm="all heads", norm_before=False, norm_after=True),
    "gemma": GEMMA,
    "gemma3": GEMMA3,
}
# No matrix is whole blocks of 256 numbers.
ODD = replace(
    GPT_NEOX,
    vocabulary=301,
    width=24,
    heads=3,
    kv_heads=3,
    head_width=8,
    mlp_width=50,
    rotary_width=2,
)
# Pythia-6.9B
PYTHIA = replace(
    GPT_NEOX,
    vocabulary=50432,
    width=4096,
    blocks=32,
    heads=32,
    kv_heads=32,
    head_width=128,
    mlp_width=16384,
    rotary_width=32,
)
# 200,000 pairs of 342 unique tokens, 80 a step
PAPER = Workload((PairShape(140, 101, 101),) * 80, 2500, 200_000 * 342)


def small_model(config):
    """A reward model with random weights."""
    trunk = Trunk(config)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return RewardModel(trunk, fresh_head(config.width, 0))


def random_shapes(count, seed=0):
    """Pairs of 6 to 87 tokens."""
    rows = np.random.default_rng(seed).integers(2, 30, (count, 3)).tolist()
    return tuple(PairShape(*row) for row in rows)


def pairs_of(shapes):
    """Token pairs of these shapes; the ids are those of a vocabulary of at least 60."""
    pairs = []
    for shared, chosen, rejected in shapes:
        prompt, c, r = (np.arange(2, n + 2, dtype=np.int32) for n in (shared, chosen, rejected))
        pairs.append(TokenPair(np.concatenate([prompt, c]), np.concatenate([prompt, r]), shared, 0))
    return pairs
