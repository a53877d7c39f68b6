"""The device, the shapes and the pairs of the GPU benchmark. Without CUDA everything is tiny."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from models import NEOX

from minimore.data.pairs import TokenPair
from minimore.engine.flops import GPUS
from minimore.engine.host import pinned
from minimore.engine.objective import RewardObjective
from minimore.engine.optim import where_it_is
from minimore.engine.recipe import Recipe
from minimore.more import more_weights

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
NAME = torch.cuda.get_device_name() if CUDA else "CPU, tiny shapes"
# The peak of a GPU that flops.py does not know is taken to be an H200's.
PEAK = next((gpu.flops for name, gpu in GPUS.items() if name in NAME), GPUS["H200"].flops)
SOURCES = 5

LLAMA = replace(
    NEOX,
    vocabulary=32000,
    width=4096,
    blocks=32,
    heads=32,
    kv_heads=32,
    mlp_width=11008,
    activation="silu",
    gated=True,
    norm="rms",
    parallel_residual=False,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    rotary_width=128,
)
SHAPES = {
    "Pythia-1.4B": NEOX,
    "Pythia-2.8B": replace(
        NEOX,
        width=2560,
        blocks=32,
        heads=32,
        kv_heads=32,
        head_width=80,
        mlp_width=10240,
        rotary_width=20,
    ),
    "Pythia-6.9B": replace(
        NEOX, vocabulary=50432, width=4096, blocks=32, heads=32, kv_heads=32, mlp_width=16384
    ),
    "LLaMA2-7B": LLAMA,
}
TINY = dict(vocabulary=300, width=64, blocks=2, heads=4, kv_heads=4, head_width=16, rotary_width=4)
TINY_NEOX = replace(NEOX, **TINY, mlp_width=256)
TINY_LLAMA = replace(LLAMA, **TINY, mlp_width=172)
# Norms on both sides, a window and a base of rotation of its own in one block of two.
TINY_GEMMA3 = replace(
    TINY_LLAMA,
    norm_after=True,
    norm_offset=1.0,
    embedding_scale=8.0,
    qk_norm="each head",
    query_scale=0.5,
    windows=(24, None),
    window_rope_base=100.0,
)

EXACT = Recipe("streamed", "split", "float32", "full")
LEAN = Recipe("streamed", "bfloat16", "int8", "full")


def config_of(shape):
    """The config of one of SHAPES; without CUDA a tiny one of the same family."""
    if CUDA:
        return SHAPES[shape]
    return TINY_LLAMA if shape.startswith("LLaMA") else TINY_NEOX


def random_pairs(count, vocabulary, unique=342):
    """Pairs of `unique` tokens on the mean, 41% of them shared, with log-normal lengths.

    They are spread as those of preference data are.
    """
    random, pairs = np.random.default_rng(0), []
    lengths = np.exp(random.normal(0, 0.5, (count, 3))) * np.array([0.41, 0.295, 0.295])
    lengths = np.maximum(1, lengths * unique * count / lengths.sum()).astype(int)
    for row in lengths:
        prompt, c, r = (random.integers(2, vocabulary, n).astype(np.int32) for n in row)
        sides = np.concatenate([prompt, c]), np.concatenate([prompt, r])
        pairs.append(TokenPair(*sides, len(prompt), 0))
    return pairs


def step_pairs(vocabulary):
    """The pairs of one step that is measured: 80, of the mean length of five public sets."""
    return random_pairs(80, vocabulary) if CUDA else random_pairs(5, vocabulary, 30)


def objective():
    return RewardObjective(SOURCES, partial(more_weights, state={}))


def sources_of(pairs):
    return [i % SOURCES for i in range(len(pairs))]


def home_of(recipe):
    """Where a recipe keeps the optimizer's states."""
    return pinned if "states" in recipe.offload else where_it_is


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
