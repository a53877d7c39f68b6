"""Checks of exercises about families of models: GPT-2 in plain tensors beside our trunk."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import pack
from ..model.config_json import Json
from ..model.model_config import ModelConfig
from ..model.trunk import Attention, Block, Trunk
from .expect import expect, expect_close, expect_refused

SMALL = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 8, "n_head": 2, "n_layer": 2}
XL = SMALL | {"vocab_size": 50257, "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_inner": None}
XL_SIZES = {
    **{"vocabulary": 50257, "width": 1600, "blocks": 48, "heads": 25, "kv_heads": 25},
    **{"head_width": 64, "mlp_width": 6400, "learned_positions": 1024, "norm_eps": 1e-5},
    **{"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
}
TEXT = [3, 1, 4, 1, 5, 9]
ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def check_gpt2_config(gpt2_config: Callable) -> None:
    """The sizes of gpt2-xl; then the hidden states of small models, by GPT-2's own formulas."""
    expect_fields("gpt2-xl", config_of("gpt2-xl", gpt2_config, XL), XL_SIZES)
    for name, activation in ACTIVATIONS.items():
        values = SMALL | {"n_inner": 20, "n_positions": 40, "activation_function": name}
        values["layer_norm_epsilon"] = 0.5
        case = f"2 blocks with {name}, n_inner 20, n_positions 40, layer_norm_epsilon .5"
        config = config_of(case, gpt2_config, values)
        expect_fields(case, config, {"mlp_width": 20, "learned_positions": 40, "norm_eps": 0.5})
        trunk = random_trunk(config)
        expect_close(f"{case}: hidden state", state_of(trunk), state_by_hand(trunk, activation))
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        json = Json(SMALL | {key: True}, "config.json")
        expect_refused(f'config.json with "{key}": true', partial(gpt2_config, json))


def config_of(case: str, gpt2_config: Callable, values: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that an answer makes of config.json."""
    config = gpt2_config(Json(values, "config.json"))
    expect(isinstance(config, ModelConfig), case, "a ModelConfig", type(config).__name__)
    return config


def expect_fields(case: str, config: ModelConfig, right: dict[str, Any]) -> None:
    """Raise WrongAnswer unless these fields have these values."""
    for name, value in right.items():
        answer = getattr(config, name)
        expect(answer == value, f"{case}: {name}", str(value), str(answer))


def random_trunk(config: ModelConfig) -> Trunk:
    """A trunk with random numbers in float64."""
    trunk = Trunk(config).double()
    trunk.compute_dtype = torch.float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trunk.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return trunk


@torch.no_grad()
def state_of(trunk: Trunk) -> Tensor:
    """The final hidden state at the last token of TEXT, (1, D), by our trunk."""
    return trunk(pack([([], [TEXT])]))


@torch.no_grad()
def state_by_hand(trunk: Trunk, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The same with GPT-2's formulas: x + attention(norm x), then x' + mlp(norm' x')."""
    x = trunk.embedding.weight[TEXT] + trunk.position_embedding.weight[: len(TEXT)]
    for block in cast(Sequence[Block], trunk.blocks):
        x = x + attended(block.attention, normed(block.attention_norm, x))
        hidden = activation(block.mlp.up(normed(block.mlp_norm, x)))
        x = x + block.mlp.down(hidden)
    return normed(trunk.final_norm, x)[-1:]


def normed(norm: Any, x: Tensor) -> Tensor:
    """LayerNorm with epsilon .5: (x - mean) / √(variance + ε) · weight + bias."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 0.5).sqrt() * norm.weight + norm.bias


def attended(attention: Attention, x: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √C + mask) V of every head of width C, (N, D)."""
    q, k, v = (
        part(x).view(len(x), SMALL["n_head"], -1).transpose(0, 1)
        for part in (attention.query, attention.key, attention.value)
    )
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    is_later = torch.ones(len(x), len(x)).triu(1).bool()
    mixed = scores.masked_fill(is_later, -math.inf).softmax(-1) @ v
    return attention.output(mixed.transpose(0, 1).flatten(1))
