"""Families of transformers: how each one's config.json and tensor names map to ours. Data, not code.

A family is an entry of FAMILIES: a function from config.json to ModelConfig, and a table of names.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..options import InputError
from .trunk import ModelConfig

LARGEST = 2**31  # of any number in a config.json
MOST_BLOCKS, MOST_PARAMETERS = 1000, 10**12  # what no checkpoint has; more is a damaged config.json


# ---- config.json -> ModelConfig --------------------------------------------------------------------------------------

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class Json:
    """config.json with typed access: a wrong or missing value is one clear line."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def get(self, key, kind, default=None):
        """values[key] as int, float, bool or str; the default where it is missing or null; InputError for anything else."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind or (kind in (int, float) and not 0 < value < LARGEST):
            what = "is missing" if key not in self.values else f"is {json.dumps(value)[:80]}"
            kinds = {
                int: "a positive whole number",
                float: "a positive number",
                bool: "true or false",
                str: "a string",
            }
            raise InputError(f'{self.where}: "{key}" {what}; expected {kinds[kind]}')
        return value

    def activation(self, default, key="hidden_act"):
        """The name of an activation, a key of model.ACTIVATIONS."""
        name = self.get(key, str, default)
        if name not in ACTIVATION_NAMES:
            raise InputError(
                f'{self.where}: "{key}" is {name!r}; known: {", ".join(ACTIVATION_NAMES)}'
            )
        return ACTIVATION_NAMES[name]

    def rope(self, head_width, base_key, share_key, share, longest):
        """Rotary fields; old spelling (top level, rope_scaling) and new (rope_parameters). share_key: None rotates whole heads.

        longest: the family's own max_position_embeddings.
        """
        key = (
            "rope_scaling"
            if self.values.get("rope_scaling") not in (None, {})
            else "rope_parameters"
        )
        given = {} if self.values.get(key) is None else self.values[key]
        if not isinstance(given, dict):
            raise InputError(f'{self.where}: "{key}" is not an object')
        rope = Json(given, f"{self.where}: rope")
        base = rope.get("rope_theta", float, self.get(base_key, float, 10000.0))
        if share_key is not None:
            share = rope.get("partial_rotary_factor", float, self.get(share_key, float, share))
        kind = given.get("rope_type") or given.get("type") or "default"
        fields = {"rotary_width": int(head_width * share), "rope_base": base}
        if kind == "linear":
            fields["rope_factor"] = rope.get("factor", float)
        elif kind == "llama3":
            original = "original_max_position_embeddings"
            positions = (
                self.get(original, int)
                if self.values.get(original) is not None
                else rope.get(original, int, self.get("max_position_embeddings", int, longest))
            )
            fields["rope_llama3"] = (
                *(rope.get(k, float) for k in ("factor", "low_freq_factor", "high_freq_factor")),
                positions,
            )
            if fields["rope_llama3"][1] >= fields["rope_llama3"][2]:
                raise InputError(
                    f'{self.where}: "low_freq_factor" must be smaller than "high_freq_factor"'
                )
        elif kind != "default":
            raise InputError(
                f"{self.where}: rope scaling {kind!r} is not supported; known: default, linear, llama3"
            )
        rotary = fields[
            "rotary_width"
        ]  # an odd one rotates one dimension more, as transformers does
        if not 0 < rotary + rotary % 2 <= head_width:
            raise InputError(
                f"{self.where}: {rotary} rotary dimensions do not fit in heads of width {head_width}"
            )
        return fields

    def windows(self, blocks, window, first=0):
        """Per block: the sliding window, in the blocks that `layer_types` names or from block number `first` on."""
        types = self.values.get("layer_types")
        if types is None:
            types = [
                "sliding_attention" if window and i >= first else "full_attention"
                for i in range(blocks)
            ]
        if (
            not isinstance(types, list)
            or len(types) != blocks
            or not all(t in ("sliding_attention", "full_attention") for t in types)
        ):
            raise InputError(
                f'{self.where}: "layer_types" is {json.dumps(types)[:80]}; expected {blocks} of full_attention or sliding_attention'
            )
        return tuple(window if t == "sliding_attention" else None for t in types) if window else ()

    def sizes(self, mlp_key="intermediate_size", kv_heads=None, head_width=None, plain=False):
        """What the families spell alike; kv_heads and head_width: a family's own defaults; plain: it knows no other number of either."""
        j = (
            Json(
                {
                    k: v
                    for k, v in self.values.items()
                    if k not in ("num_key_value_heads", "head_dim")
                },
                self.where,
            )
            if plain
            else self
        )
        return j._sizes(
            mlp_key, None if "num_key_value_heads" in j.values else kv_heads, head_width
        )

    def _sizes(self, mlp_key, kv_heads, head_width):
        width, heads = self.get("hidden_size", int), self.get("num_attention_heads", int)
        kv_heads = self.get("num_key_value_heads", int, kv_heads or heads)
        if (
            width % heads and self.values.get("head_dim") is None and not head_width
        ) or heads % kv_heads:
            raise InputError(
                f"{self.where}: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not divide"
            )
        found = dict(
            vocabulary=self.get("vocab_size", int),
            width=width,
            blocks=self.get("num_hidden_layers", int),
            heads=heads,
            kv_heads=kv_heads,
            head_width=self.get("head_dim", int, head_width or max(1, width // heads)),
            mlp_width=self.get(mlp_key, int),
        )
        attention = (heads + kv_heads) * found["head_width"]
        parameters = width * (
            found["vocabulary"] + 2 * found["blocks"] * (attention + found["mlp_width"])
        )
        if found["blocks"] > MOST_BLOCKS or parameters > MOST_PARAMETERS:
            raise InputError(
                f"{self.where}: describes {found['blocks']} blocks and about {parameters:.0e} parameters; expected a model that exists"
            )
        return found


def gpt_neox_config(j: Json) -> ModelConfig:
    """Pythia and GPT-NeoX-20B."""
    sizes, bias = j.sizes(plain=True), j.get("attention_bias", bool, True)
    return ModelConfig(
        **sizes,
        activation=j.activation("gelu"),
        gated=False,
        norm="layer",
        norm_eps=j.get("layer_norm_eps", float, 1e-5),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        parallel_residual=j.get("use_parallel_residual", bool, True),
        **j.rope(sizes["head_width"], "rotary_emb_base", "rotary_pct", 0.25, 2048),
    )


def llama_config(j: Json, longest=2048, **changes) -> ModelConfig:
    """LLaMA, and what Mistral and Qwen say otherwise."""
    sizes = changes.pop("sizes", None) or j.sizes()
    bias = j.get("attention_bias", bool, False) if "qkv_bias" not in changes else False
    return ModelConfig(
        **sizes,
        **dict(
            activation=j.activation("silu"),
            gated=True,
            norm="rms",
            norm_eps=j.get("rms_norm_eps", float, 1e-6),
            qkv_bias=bias,
            attention_output_bias=bias,
            mlp_bias=j.get("mlp_bias", bool, False),
            parallel_residual=False,
        )
        | changes,
        **j.rope(sizes["head_width"], "rope_theta", None, 1.0, longest),
    )


def mistral_config(j: Json) -> ModelConfig:
    """LLaMA without biases, with a sliding window in every block."""
    sizes = j.sizes(kv_heads=8)
    window = (
        j.get("sliding_window", int, 4096)
        if j.values.get("sliding_window", 4096) is not None
        else None
    )
    return llama_config(
        j,
        131072,
        sizes=sizes,
        qkv_bias=False,
        mlp_bias=False,
        windows=j.windows(sizes["blocks"], window),
    )


def qwen2_config(j: Json, **changes) -> ModelConfig:
    """LLaMA with biases on query, key and value; Qwen2 and Qwen2.5."""
    sizes = changes.pop("sizes", None) or j.sizes(kv_heads=32)
    given = j.values.get("sliding_window", 4096) is not None and j.get(
        "use_sliding_window", bool, False
    )
    window = j.get("sliding_window", int, 4096) if given else None
    first = j.values.get("max_window_layers", 28)
    first = 0 if first == 0 else j.get("max_window_layers", int, 28)
    return llama_config(
        j,
        32768,
        **dict(
            sizes=sizes,
            qkv_bias=True,
            mlp_bias=False,
            windows=j.windows(sizes["blocks"], window, first),
        )
        | changes,
    )


def qwen3_config(j: Json) -> ModelConfig:
    """Qwen2 with normed query and key heads of their own width, and no biases."""
    bias = j.get("attention_bias", bool, False)
    return qwen2_config(
        j,
        sizes=j.sizes(kv_heads=32, head_width=128),
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
    )


def opt_config(j: Json) -> ModelConfig:
    """Pre-norm OPT: learned positions, two rows of which come before position 0; its dropout is not applied."""
    sizes, bias = j.sizes(mlp_key="ffn_dim", plain=True), j.get("enable_bias", bool, True)
    for key, default, only in (
        ("do_layer_norm_before", True, True),
        ("_remove_final_layer_norm", False, False),
        ("layer_norm_elementwise_affine", True, True),
    ):
        if j.get(key, bool, default) is not only:
            raise InputError(
                f'{j.where}: "{key}" is {json.dumps(not only)}; only the pre-norm OPT models are supported (not opt-350m)'
            )
    if j.get("word_embed_proj_dim", int, sizes["width"]) != sizes["width"]:
        raise InputError(
            f'{j.where}: "word_embed_proj_dim" differs from "hidden_size"; such an OPT (opt-350m) is not supported'
        )
    return ModelConfig(
        **sizes,
        activation=j.activation("relu", "activation_function"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        parallel_residual=False,
        rotary_width=0,
        rope_base=1.0,
        learned_positions=j.get("max_position_embeddings", int, 2048) + 2,
        position_offset=2,
    )


# ---- families: their names -> ours. {} is the block number, * stands for weight and bias -------------------------------


@dataclass(frozen=True)
class Family:
    """One model_type. A tuple on the right is one fused tensor, its parts interleaved head by head."""

    config: Callable[[Json], ModelConfig]
    prefix: str  # in front of every key of the trunk
    reward_class: str  # transformers' class for a trunk with a scalar head
    names: dict[str, str | tuple[str, ...]]
    tied: bool = (
        False  # whether the embedding is also the language-model head, unless config.json says
    )


LLAMA_NAMES = {
    "embed_tokens.weight": "embedding.weight",
    "layers.{}.input_layernorm.*": "blocks.{}.attention_norm.*",
    "layers.{}.self_attn.q_proj.*": "blocks.{}.attention.query.*",
    "layers.{}.self_attn.k_proj.*": "blocks.{}.attention.key.*",
    "layers.{}.self_attn.v_proj.*": "blocks.{}.attention.value.*",
    "layers.{}.self_attn.o_proj.*": "blocks.{}.attention.output.*",
    "layers.{}.post_attention_layernorm.*": "blocks.{}.mlp_norm.*",
    "layers.{}.mlp.gate_proj.*": "blocks.{}.mlp.gate.*",
    "layers.{}.mlp.up_proj.*": "blocks.{}.mlp.up.*",
    "layers.{}.mlp.down_proj.*": "blocks.{}.mlp.down.*",
    "norm.*": "final_norm.*",
}

FAMILIES = {
    "gpt_neox": Family(
        gpt_neox_config,
        "gpt_neox.",
        "GPTNeoXForSequenceClassification",
        {
            "embed_in.weight": "embedding.weight",
            "layers.{}.input_layernorm.*": "blocks.{}.attention_norm.*",
            "layers.{}.attention.query_key_value.*": tuple(
                f"blocks.{{}}.attention.{part}.*" for part in ("query", "key", "value")
            ),
            "layers.{}.attention.dense.*": "blocks.{}.attention.output.*",
            "layers.{}.post_attention_layernorm.*": "blocks.{}.mlp_norm.*",
            "layers.{}.mlp.dense_h_to_4h.*": "blocks.{}.mlp.up.*",
            "layers.{}.mlp.dense_4h_to_h.*": "blocks.{}.mlp.down.*",
            "final_layer_norm.*": "final_norm.*",
        },
    ),
    "llama": Family(llama_config, "model.", "LlamaForSequenceClassification", LLAMA_NAMES),
    "mistral": Family(mistral_config, "model.", "MistralForSequenceClassification", LLAMA_NAMES),
    "qwen2": Family(qwen2_config, "model.", "Qwen2ForSequenceClassification", LLAMA_NAMES),
    "qwen3": Family(
        qwen3_config,
        "model.",
        "Qwen3ForSequenceClassification",
        LLAMA_NAMES
        | {
            "layers.{}.self_attn.q_norm.weight": "blocks.{}.attention.query_norm.weight",
            "layers.{}.self_attn.k_norm.weight": "blocks.{}.attention.key_norm.weight",
        },
    ),
    "opt": Family(
        opt_config,
        "model.decoder.",
        "OPTForSequenceClassification",
        {
            "embed_tokens.weight": "embedding.weight",
            "embed_positions.weight": "position_embedding.weight",
            "layers.{}.self_attn_layer_norm.*": "blocks.{}.attention_norm.*",
            "layers.{}.self_attn.q_proj.*": "blocks.{}.attention.query.*",
            "layers.{}.self_attn.k_proj.*": "blocks.{}.attention.key.*",
            "layers.{}.self_attn.v_proj.*": "blocks.{}.attention.value.*",
            "layers.{}.self_attn.out_proj.*": "blocks.{}.attention.output.*",
            "layers.{}.final_layer_norm.*": "blocks.{}.mlp_norm.*",
            "layers.{}.fc1.*": "blocks.{}.mlp.up.*",
            "layers.{}.fc2.*": "blocks.{}.mlp.down.*",
            "final_layer_norm.*": "final_norm.*",
        },
        tied=True,
    ),
}

LANGUAGE_HEADS = ("lm_head.weight", "embed_out.weight")

# Constants that a checkpoint may hold and that follow from config.json.
IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|decoder\.version)"
)


def name_table(family: Family, trunk: nn.Module) -> dict[str, tuple[str, ...]]:
    """{their key without prefix: our parameter names} for exactly the parameters that this trunk has."""
    ours, table = set(dict(trunk.named_parameters())), {}
    for theirs, our in family.names.items():
        parts = our if isinstance(our, tuple) else (our,)
        for block in range(trunk.c.blocks) if "{}" in theirs else [0]:
            for kind in ("weight", "bias") if "*" in theirs else [""]:
                fill = lambda name: name.replace("{}", str(block)).replace("*", kind)
                if ours.issuperset(map(fill, parts)):
                    table[fill(theirs)] = tuple(map(fill, parts))
    return table


def split_heads(fused: Tensor, heads: int) -> list[Tensor]:
    """(H x 3 x C, ...) -> three (H x C, ...): GPT-NeoX stores query, key and value of one head side by side."""
    parts = fused.view(heads, 3, -1, *fused.shape[1:])
    return [parts[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


def fuse_heads(parts: list[Tensor], heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    stacked = torch.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], 1)
    return stacked.reshape(-1, *parts[0].shape[1:])
