"""Families of transformers: how each one's config.json and tensor names map to ours.

A family is an entry of FAMILIES: a function from config.json to ModelConfig, and a table of names.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..options import InputError, require
from .trunk import ModelConfig, Trunk

LARGEST = 2**31  # of any number in a config.json
MOST_BLOCKS, MOST_PARAMETERS = 1000, 10**12  # what no checkpoint has; more is a damaged config.json


# ---- config.json -> ModelConfig ------------------------------------------------------------------

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


KINDS = {
    int: "a positive whole number",
    float: "a positive number",
    bool: "true or false",
    str: "a string",
}

Fields = dict[str, Any]  # of ModelConfig


class Json:
    """config.json with typed access: a wrong or missing value is one clear line."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """values[key] as int, float, bool or str; the default where it is missing or null.

        Raises InputError for anything else.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        is_in_range = kind not in (int, float) or type(value) is not kind or 0 < value < LARGEST
        if type(value) is not kind or not is_in_range:
            what = f"is {json.dumps(value)[:80]}" if key in self.values else "is missing"
            raise InputError(f'{self.where}: "{key}" {what}; expected {KINDS[kind]}')
        return value

    def is_null(self, key: str) -> bool:
        """Whether a key is missing or null."""
        return self.values.get(key) is None

    def activation(self, default: str, key: str = "hidden_act") -> str:
        """The name of an activation, a key of trunk.ACTIVATIONS."""
        name = self.get(key, str, default)
        require(
            name in ACTIVATION_NAMES,
            f'{self.where}: "{key}" is {name!r}; known: {", ".join(ACTIVATION_NAMES)}',
        )
        return ACTIVATION_NAMES[name]

    # ---- rotation ----

    def rope(
        self, head_width: int, base_key: str, share_key: str | None, share: float, longest: int
    ) -> Fields:
        """Rotary fields, in the old spelling (rope_scaling) and in the new (rope_parameters).

        share_key: the key of the share of a head that rotates, with its default; None rotates whole
        heads. longest: the family's own max_position_embeddings.
        """
        scaling = self._rope_object()
        base = scaling.get("rope_theta", float, self.get(base_key, float, 10000.0))
        if share_key is not None:
            default = self.get(share_key, float, share)
            share = scaling.get("partial_rotary_factor", float, default)
        rotary_width = int(head_width * share)
        # An odd width rotates one dimension more, as in transformers.
        require(
            0 < rotary_width + rotary_width % 2 <= head_width,
            f"{self.where}: {rotary_width} rotary dimensions do not fit in heads of width"
            f" {head_width}",
        )
        fields = {"rotary_width": rotary_width, "rope_base": base}
        return fields | self._rope_scaling(scaling, longest)

    def _rope_object(self) -> "Json":
        """The object that describes rotation; empty if there is none."""
        is_old = self.values.get("rope_scaling") not in (None, {})
        key = "rope_scaling" if is_old else "rope_parameters"
        values = {} if self.is_null(key) else self.values[key]
        require(isinstance(values, dict), f'{self.where}: "{key}" is not an object')
        return Json(values, f"{self.where}: rope")

    def _rope_scaling(self, scaling: "Json", longest: int) -> Fields:
        """How frequencies are changed for longer texts."""
        kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
        if kind == "default":
            return {}
        if kind == "linear":
            return {"rope_factor": scaling.get("factor", float)}
        require(
            kind == "llama3",
            f"{self.where}: rope scaling {kind!r} is not supported; known: default, linear, llama3",
        )
        key = "original_max_position_embeddings"
        if self.is_null(key):
            default = self.get("max_position_embeddings", int, longest)
            original = scaling.get(key, int, default)
        else:
            original = self.get(key, int)
        factor = scaling.get("factor", float)
        low, high = scaling.get("low_freq_factor", float), scaling.get("high_freq_factor", float)
        require(
            low < high, f'{self.where}: "low_freq_factor" must be smaller than "high_freq_factor"'
        )
        return {"rope_llama3": (factor, low, high, original)}

    # ---- windows ----

    def windows(self, blocks: int, window: int | None, first: int = 0) -> tuple[int | None, ...]:
        """The sliding window of every block; () if there is none.

        It slides in the blocks that `layer_types` names, or from block number `first` on.
        """
        types = self.values.get("layer_types")
        if types is None:
            types = [
                "sliding_attention" if window and block >= first else "full_attention"
                for block in range(blocks)
            ]
        known = ("sliding_attention", "full_attention")
        is_whole = (
            isinstance(types, list) and len(types) == blocks and all(t in known for t in types)
        )
        require(
            is_whole,
            f'{self.where}: "layer_types" is {json.dumps(types)[:80]};'
            f" expected {blocks} of full_attention or sliding_attention",
        )
        if not window:
            return ()
        return tuple(window if t == "sliding_attention" else None for t in types)

    # ---- sizes ----

    def sizes(
        self,
        mlp_key: str = "intermediate_size",
        kv_heads: int | None = None,
        head_width: int | None = None,
        plain: bool = False,
    ) -> Fields:
        """The sizes that all families spell alike.

        kv_heads, head_width: a family's own defaults. plain: the family knows no other number of
        either, so these keys are not read.
        """
        if plain:
            own_keys = ("num_key_value_heads", "head_dim")
            values = {key: value for key, value in self.values.items() if key not in own_keys}
            return Json(values, self.where).sizes(mlp_key, kv_heads, head_width)
        width, heads = self.get("hidden_size", int), self.get("num_attention_heads", int)
        if "num_key_value_heads" in self.values or kv_heads is None:
            kv_heads = heads
        kv_heads = self.get("num_key_value_heads", int, kv_heads)
        has_head_width = head_width is not None or not self.is_null("head_dim")
        require(
            (has_head_width or width % heads == 0) and heads % kv_heads == 0,
            f"{self.where}: hidden_size {width}, num_attention_heads {heads} and"
            f" num_key_value_heads {kv_heads} do not divide",
        )
        fields = {
            "vocabulary": self.get("vocab_size", int),
            "width": width,
            "blocks": self.get("num_hidden_layers", int),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": self.get("head_dim", int, head_width or max(1, width // heads)),
            "mlp_width": self.get(mlp_key, int),
        }
        self._require_a_model_that_exists(fields)
        return fields

    def _require_a_model_that_exists(self, fields: Fields) -> None:
        attention = (fields["heads"] + fields["kv_heads"]) * fields["head_width"]
        of_blocks = 2 * fields["blocks"] * (attention + fields["mlp_width"])
        parameters = fields["width"] * (fields["vocabulary"] + of_blocks)
        require(
            fields["blocks"] <= MOST_BLOCKS and parameters <= MOST_PARAMETERS,
            f"{self.where}: describes {fields['blocks']} blocks and about {parameters:.0e}"
            " parameters; expected a model that exists",
        )


# ---- one function a family -----------------------------------------------------------------------


def gpt_neox_config(j: Json) -> ModelConfig:
    """Pythia and GPT-NeoX-20B."""
    sizes = j.sizes(plain=True)  # as many key/value heads as heads, of width / heads each
    attention_bias = j.get("attention_bias", bool, True)
    rope = j.rope(
        sizes["head_width"],
        base_key="rotary_emb_base",
        share_key="rotary_pct",
        share=0.25,
        longest=2048,
    )
    return ModelConfig(
        **sizes,
        activation=j.activation("gelu"),
        gated=False,
        norm="layer",
        norm_eps=j.get("layer_norm_eps", float, 1e-5),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=True,
        parallel_residual=j.get("use_parallel_residual", bool, True),
        **rope,
    )


def llama_config(
    j: Json, longest: int = 2048, sizes: Fields | None = None, **changes: Any
) -> ModelConfig:
    """LLaMA, and what Mistral and Qwen say otherwise (sizes, changes)."""
    sizes = sizes or j.sizes()
    bias = j.get("attention_bias", bool, False) if "qkv_bias" not in changes else False
    fields = {
        "activation": j.activation("silu"),
        "gated": True,
        "norm": "rms",
        "norm_eps": j.get("rms_norm_eps", float, 1e-6),
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": j.get("mlp_bias", bool, False),
        "parallel_residual": False,
    }
    rope = j.rope(sizes["head_width"], "rope_theta", None, 1.0, longest)
    return ModelConfig(**sizes, **(fields | changes), **rope)


def mistral_config(j: Json) -> ModelConfig:
    """LLaMA without biases, with a sliding window in every block."""
    sizes = j.sizes(kv_heads=8)
    is_off = j.values.get("sliding_window", 4096) is None  # null means none; missing means 4096
    window = None if is_off else j.get("sliding_window", int, 4096)
    windows = j.windows(sizes["blocks"], window)
    return llama_config(j, 131072, sizes=sizes, qkv_bias=False, mlp_bias=False, windows=windows)


def qwen2_config(j: Json, sizes: Fields | None = None, **changes: Any) -> ModelConfig:
    """LLaMA with biases on query, key and value; Qwen2 and Qwen2.5."""
    sizes = sizes or j.sizes(kv_heads=32)
    is_off = j.values.get("sliding_window", 4096) is None
    slides = not is_off and j.get("use_sliding_window", bool, False)
    window = j.get("sliding_window", int, 4096) if slides else None
    is_zero = j.values.get("max_window_layers", 28) == 0  # `get` takes positive numbers only
    first = 0 if is_zero else j.get("max_window_layers", int, 28)
    fields = {
        "qkv_bias": True,
        "mlp_bias": False,
        "windows": j.windows(sizes["blocks"], window, first),
    }
    return llama_config(j, 32768, sizes=sizes, **(fields | changes))


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
    """Pre-norm OPT: learned positions, two rows of which come before position 0.

    Its dropout is not applied.
    """
    sizes, bias = j.sizes(mlp_key="ffn_dim", plain=True), j.get("enable_bias", bool, True)
    supported = {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    }
    for key, value in supported.items():
        require(
            j.get(key, bool, value) is value,
            f'{j.where}: "{key}" is {json.dumps(not value)};'
            " only the pre-norm OPT models are supported (not opt-350m)",
        )
    require(
        j.get("word_embed_proj_dim", int, sizes["width"]) == sizes["width"],
        f'{j.where}: "word_embed_proj_dim" differs from "hidden_size";'
        " such an OPT (opt-350m) is not supported",
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


# ---- families: their names -> ours ---------------------------------------------------------------
# {} is the block number, and * stands for weight and bias.


@dataclass(frozen=True)
class Family:
    """One model_type.

    prefix: in front of every key of the trunk. reward_class: transformers' class for a trunk with a
    scalar head. names: a tuple on the right is one fused tensor, its parts interleaved head by
    head. tied: the embedding is the language-model head, too, unless config.json says otherwise.
    language_head: the key of a language-model head of its own.
    """

    config: Callable[[Json], ModelConfig]
    prefix: str
    reward_class: str
    names: Mapping[str, str | tuple[str, ...]]
    tied: bool = False
    language_head: str = "lm_head.weight"

    @property
    def language_class(self) -> str:
        """transformers' class for a language model on the same trunk."""
        return self.reward_class.replace("ForSequenceClassification", "ForCausalLM")


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
        language_head="embed_out.weight",
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

LANGUAGE_HEADS = tuple({family.language_head for family in FAMILIES.values()})

# Constants that a checkpoint may hold and that follow from config.json.
IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|decoder\.version)"
)


def name_table(family: Family, trunk: Trunk) -> dict[str, tuple[str, ...]]:
    """{their key without prefix: our parameter names}, for the parameters that this trunk has."""
    ours = {name for name, _ in trunk.named_parameters()}
    table = {}
    for theirs, our in family.names.items():
        parts = our if isinstance(our, tuple) else (our,)
        blocks = range(trunk.c.blocks) if "{}" in theirs else range(1)
        kinds = ("weight", "bias") if "*" in theirs else ("",)
        for block, kind in product(blocks, kinds):
            names = tuple(filled(part, block, kind) for part in parts)
            if ours.issuperset(names):
                table[filled(theirs, block, kind)] = names
    return table


def filled(name: str, block: int, kind: str) -> str:
    """A name of the tables for one block, and for weight or bias."""
    return name.replace("{}", str(block)).replace("*", kind)


def split_heads(fused: Tensor, heads: int) -> list[Tensor]:
    """(H x 3 x C, ...) -> three (H x C, ...).

    GPT-NeoX stores query, key and value of one head side by side.
    """
    parts = fused.view(heads, 3, -1, *fused.shape[1:])
    return [parts[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


def fuse_heads(parts: list[Tensor], heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    stacked = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1)
    return stacked.reshape(-1, *parts[0].shape[1:])
