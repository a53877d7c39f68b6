"""What each family's config.json says of its model: one function a family, to ModelConfig."""

import json
import math
from typing import Any

from ..options import require
from .config_json import Fields, Json
from .model_config import ModelConfig


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
    j: Json,
    longest: int = 2048,
    sizes: Fields | None = None,
    norm_eps: float = 1e-6,
    rope: Fields | None = None,
    **changes: Any,
) -> ModelConfig:
    """LLaMA, and what other families say otherwise.

    longest, sizes, norm_eps, rope: of such a family. changes: other fields of ModelConfig.
    """
    sizes = sizes or j.sizes()
    bias = j.get("attention_bias", bool, False) if "qkv_bias" not in changes else False
    fields = {
        "activation": changes.get("activation") or j.activation("silu"),
        "gated": True,
        "norm": "rms",
        "norm_eps": j.get("rms_norm_eps", float, norm_eps),
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": j.get("mlp_bias", bool, False),
        "parallel_residual": False,
    }
    rope = rope or j.rope(sizes["head_width"], "rope_theta", None, 1.0, longest)
    return ModelConfig(**sizes, **(fields | changes), **rope)


def mistral_config(j: Json) -> ModelConfig:
    """LLaMA without biases, with a sliding window in every block."""
    sizes = j.sizes(kv_heads=8)
    is_off = j.values.get("sliding_window", 4096) is None  # null means none; missing means 4096
    window = None if is_off else j.get("sliding_window", int, 4096)
    windows = j.windows(window, [True] * sizes["blocks"])
    return llama_config(j, 131072, sizes=sizes, qkv_bias=False, mlp_bias=False, windows=windows)


def qwen2_config(j: Json, sizes: Fields | None = None, **changes: Any) -> ModelConfig:
    """LLaMA with biases on query, key and value; Qwen2 and Qwen2.5."""
    sizes = sizes or j.sizes(kv_heads=32)
    is_off = j.values.get("sliding_window", 4096) is None
    slides = not is_off and j.get("use_sliding_window", bool, False)
    window = j.get("sliding_window", int, 4096) if slides else None
    is_zero = j.values.get("max_window_layers", 28) == 0  # `get` takes positive numbers only
    first = 0 if is_zero else j.get("max_window_layers", int, 28)
    fields: Fields = {
        "qkv_bias": True,
        "mlp_bias": False,
        "windows": j.windows(window, [block >= first for block in range(sizes["blocks"])]),
    }
    return llama_config(j, 32768, sizes=sizes, **(fields | changes))


def qwen3_config(j: Json) -> ModelConfig:
    """Qwen2 with normed query and key heads of their own width, and no biases."""
    bias = j.get("attention_bias", bool, False)
    return qwen2_config(
        j,
        sizes=j.sizes(kv_heads=32, head_width=128),
        qk_norm="each head",
        qkv_bias=bias,
        attention_output_bias=bias,
    )


def gpt2_config(j: Json) -> ModelConfig:
    """GPT-2: norms before attention and MLP, learned positions, biases everywhere.

    Its config.json has words of its own: n_embd, n_head, n_layer; n_inner, which is 4 n_embd where
    it is null; n_positions (1024); layer_norm_epsilon (1e-5); activation_function (gelu_new). Its
    dropout is not applied. Raises InputError for attention that no published GPT-2 has.
    """
    for key, value in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        require(
            j.get(key, bool, value) is value,
            f'{j.where}: "{key}" is {json.dumps(not value)}, which no published GPT-2 has;'
            f" expected {json.dumps(value)}",
        )
    sizes = j.sizes(
        mlp_key="n_inner",
        plain=True,
        keys=("n_embd", "n_head", "n_layer"),
        mlp_width=4 * j.get("n_embd", int),
    )
    return ModelConfig(
        **sizes,
        activation=j.activation("gelu_new", "activation_function"),
        gated=False,
        norm="layer",
        norm_eps=j.get("layer_norm_epsilon", float, 1e-5),
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        parallel_residual=False,
        rotary_width=0,
        rope_base=1.0,
        learned_positions=j.get("n_positions", int, 1024),
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


def gemma_config(
    j: Json, sizes: Fields | None = None, activation: str | None = None, **changes: Any
) -> ModelConfig:
    """Gemma 1: LLaMA with scaled embeddings, and norms whose weight is stored less 1."""
    j.refuse("use_bidirectional_attention", "models that see what comes after a token")
    sizes = sizes or j.sizes(kv_heads=16, head_width=256)
    if activation is None:
        # The first config.json of Gemma says "gelu" and means the approximation with tanh.
        named = j.activation("gelu_pytorch_tanh")
        activation = "gelu_tanh" if named == "gelu" else named
    return llama_config(
        j,
        8192,
        sizes=sizes,
        activation=activation,
        norm_offset=1.0,
        embedding_scale=math.sqrt(sizes["width"]),
        mlp_bias=False,
        **changes,
    )


def gemma3_config(j: Json) -> ModelConfig:
    """Gemma 3's text model: norms on both sides, and windows in five blocks of six."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        j.refuse(key, "models that cap their scores or logits softly")
    sizes = j.sizes(kv_heads=4, head_width=256)
    pattern = j.get("sliding_window_pattern", int, 6)
    slides = [(block + 1) % pattern != 0 for block in range(sizes["blocks"])]
    window = j.get("sliding_window", int) if "sliding_window" in j.values else 4096  # never null
    query_divisor = math.sqrt(j.get("query_pre_attn_scalar", float, 256.0))
    return gemma_config(
        j,
        sizes=sizes,
        activation=j.activation("gelu_pytorch_tanh", "hidden_activation"),
        rope=gemma3_rope(j, sizes["head_width"]),
        windows=j.windows(window, slides),
        qk_norm="each head",
        # Attention divides by the root of the head width, and this model by another number.
        query_scale=math.sqrt(sizes["head_width"]) / query_divisor,
        norm_after=True,
    )


def gemma3_rope(j: Json, head_width: int) -> Fields:
    """Rotation in blocks that see everything, and the base in blocks with a window."""
    by_type = j.part("rope_parameters")
    of_all, of_window = by_type.part("full_attention"), by_type.part("sliding_attention")
    of_all = Json(of_all.values | j.part("rope_scaling").values, of_all.where)
    kind = of_window.values.get("rope_type") or "default"
    require(
        kind == "default",
        f"{of_window.where}: rope scaling {kind!r} is not supported where there is a window",
    )
    fields = j.rope(head_width, "rope_theta", None, 1.0, 131072, 1e6, of_all)
    local_base = j.get("rope_local_base_freq", float, 10000.0)
    return fields | {"window_rope_base": of_window.get("rope_theta", float, local_base)}


def olmo2_config(j: Json) -> ModelConfig:
    """OLMo-2: norms behind attention and MLP, and queries and keys normed, all heads together."""
    return llama_config(
        j, norm_eps=1e-5, mlp_bias=False, qk_norm="all heads", norm_before=False, norm_after=True
    )


def phi3_config(j: Json) -> ModelConfig:
    """Phi-3: LLaMA without biases, a window in every block, and a share of a head that rotates.

    Its dropout is not applied.
    """
    sizes = j.sizes()
    window = None if j.is_null("sliding_window") else j.get("sliding_window", int)
    return llama_config(
        j,
        sizes=sizes,
        norm_eps=1e-5,
        rope=j.rope(sizes["head_width"], "rope_theta", "partial_rotary_factor", 1.0, 4096),
        qkv_bias=False,
        mlp_bias=False,
        windows=j.windows(window, [True] * sizes["blocks"]),
    )


def internlm2_config(j: Json) -> ModelConfig:
    """InternLM2: LLaMA with one switch for the biases of attention."""
    bias = j.get("bias", bool, True)
    return llama_config(j, qkv_bias=bias, attention_output_bias=bias, mlp_bias=False)
