"""Families of transformers: how each one's config.json and tensor names map to ours.

A family is an entry of FAMILIES: a function from config.json to ModelConfig, and a table of names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .config_json import Json
from .family_configs import (
    gemma3_config,
    gemma_config,
    gpt2_config,
    gpt_neox_config,
    internlm2_config,
    llama_config,
    mistral_config,
    olmo2_config,
    opt_config,
    phi3_config,
    qwen2_config,
    qwen3_config,
)
from .model_config import ModelConfig
from .trunk import Trunk

# ---- families: their names -> ours ---------------------------------------------------------------
# {} is the block number, and * stands for weight and bias.


@dataclass(frozen=True)
class Family:
    """One model_type.

    prefix: in front of every key of the trunk. reward_class: transformers' class for a trunk with a
    scalar head. names: a tuple on the right is one fused tensor, see `split_rows`. groups: the
    field of ModelConfig that counts the groups of a fused tensor; None is one group. tied: the
    embedding is the language-model head, too, unless config.json says otherwise. language_head: the
    key of a language-model head of its own. transposed: endings of keys whose matrices are stored
    as (in, out), where all others are (out, in).
    """

    config: Callable[[Json], ModelConfig]
    prefix: str
    reward_class: str
    names: Mapping[str, str | tuple[str, ...]]
    groups: str | None = None
    tied: bool = False
    language_head: str = "lm_head.weight"
    transposed: tuple[str, ...] = ()

    @property
    def language_class(self) -> str:
        """transformers' class for a language model on the same trunk."""
        # Gemma 3 has a reward class for its text model, and one language class for both.
        name = self.reward_class.replace("TextFor", "For")
        return name.replace("ForSequenceClassification", "ForCausalLM")

    def is_transposed(self, theirs: str) -> bool:
        """Whether the matrix of a key is stored as (in, out)."""
        return theirs.endswith(self.transposed)

    def groups_of(self, config: ModelConfig) -> int:
        """How many groups a fused tensor of such a model has."""
        return 1 if self.groups is None else getattr(config, self.groups)


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

QUERY_KEY_VALUE = tuple(f"blocks.{{}}.attention.{part}.*" for part in ("query", "key", "value"))
QUERY_AND_KEY_NORMS = {
    "layers.{}.self_attn.q_norm.weight": "blocks.{}.attention.query_norm.weight",
    "layers.{}.self_attn.k_norm.weight": "blocks.{}.attention.key_norm.weight",
}
NORMS_BEHIND = {
    "layers.{}.post_attention_layernorm.*": "blocks.{}.attention_output_norm.*",
    "layers.{}.post_feedforward_layernorm.*": "blocks.{}.mlp_output_norm.*",
}

FAMILIES = {
    "gpt_neox": Family(
        gpt_neox_config,
        "gpt_neox.",
        "GPTNeoXForSequenceClassification",
        {
            "embed_in.weight": "embedding.weight",
            "layers.{}.input_layernorm.*": "blocks.{}.attention_norm.*",
            "layers.{}.attention.query_key_value.*": QUERY_KEY_VALUE,
            "layers.{}.attention.dense.*": "blocks.{}.attention.output.*",
            "layers.{}.post_attention_layernorm.*": "blocks.{}.mlp_norm.*",
            "layers.{}.mlp.dense_h_to_4h.*": "blocks.{}.mlp.up.*",
            "layers.{}.mlp.dense_4h_to_h.*": "blocks.{}.mlp.down.*",
            "final_layer_norm.*": "final_norm.*",
        },
        groups="heads",
        language_head="embed_out.weight",
    ),
    "llama": Family(llama_config, "model.", "LlamaForSequenceClassification", LLAMA_NAMES),
    "mistral": Family(mistral_config, "model.", "MistralForSequenceClassification", LLAMA_NAMES),
    "qwen2": Family(qwen2_config, "model.", "Qwen2ForSequenceClassification", LLAMA_NAMES),
    "qwen3": Family(
        qwen3_config,
        "model.",
        "Qwen3ForSequenceClassification",
        LLAMA_NAMES | QUERY_AND_KEY_NORMS,
    ),
    "olmo2": Family(
        olmo2_config,
        "model.",
        "Olmo2ForSequenceClassification",
        LLAMA_NAMES | QUERY_AND_KEY_NORMS | NORMS_BEHIND,
    ),
    "gemma": Family(
        gemma_config, "model.", "GemmaForSequenceClassification", LLAMA_NAMES, tied=True
    ),
    "gemma3_text": Family(
        gemma3_config,
        "model.",
        "Gemma3TextForSequenceClassification",
        LLAMA_NAMES
        | QUERY_AND_KEY_NORMS
        | NORMS_BEHIND
        | {"layers.{}.pre_feedforward_layernorm.*": "blocks.{}.mlp_norm.*"},
        tied=True,
    ),
    "phi3": Family(
        phi3_config,
        "model.",
        "Phi3ForSequenceClassification",
        {
            "embed_tokens.weight": "embedding.weight",
            "layers.{}.input_layernorm.*": "blocks.{}.attention_norm.*",
            "layers.{}.self_attn.qkv_proj.*": QUERY_KEY_VALUE,
            "layers.{}.self_attn.o_proj.*": "blocks.{}.attention.output.*",
            "layers.{}.post_attention_layernorm.*": "blocks.{}.mlp_norm.*",
            "layers.{}.mlp.gate_up_proj.*": ("blocks.{}.mlp.gate.*", "blocks.{}.mlp.up.*"),
            "layers.{}.mlp.down_proj.*": "blocks.{}.mlp.down.*",
            "norm.*": "final_norm.*",
        },
    ),
    "internlm2": Family(
        internlm2_config,
        "model.",
        "InternLM2ForSequenceClassification",
        {
            "tok_embeddings.weight": "embedding.weight",
            "layers.{}.attention_norm.*": "blocks.{}.attention_norm.*",
            "layers.{}.attention.wqkv.*": QUERY_KEY_VALUE,
            "layers.{}.attention.wo.*": "blocks.{}.attention.output.*",
            "layers.{}.ffn_norm.*": "blocks.{}.mlp_norm.*",
            "layers.{}.feed_forward.w1.*": "blocks.{}.mlp.gate.*",
            "layers.{}.feed_forward.w3.*": "blocks.{}.mlp.up.*",
            "layers.{}.feed_forward.w2.*": "blocks.{}.mlp.down.*",
            "norm.*": "final_norm.*",
        },
        groups="kv_heads",
        language_head="output.weight",
    ),
    "gpt2": Family(
        gpt2_config,
        "transformer.",
        "GPT2ForSequenceClassification",
        {
            "wte.weight": "embedding.weight",
            "wpe.weight": "position_embedding.weight",
            "h.{}.ln_1.*": "blocks.{}.attention_norm.*",
            "h.{}.attn.c_attn.*": QUERY_KEY_VALUE,
            "h.{}.attn.c_proj.*": "blocks.{}.attention.output.*",
            "h.{}.ln_2.*": "blocks.{}.mlp_norm.*",
            "h.{}.mlp.c_fc.*": "blocks.{}.mlp.up.*",
            "h.{}.mlp.c_proj.*": "blocks.{}.mlp.down.*",
            "ln_f.*": "final_norm.*",
        },
        tied=True,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
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

# Families that are refused by name, and why.
REFUSED = {
    "gemma2": "caps its attention scores and its logits softly, which is not supported",
    "gemma3": "is a text model inside of one for images, which is not read; expected a text model"
    ' alone ("gemma3_text", as gemma-3-1b-it is); model/README.md says how to take it out',
}

LANGUAGE_HEADS = tuple({family.language_head for family in FAMILIES.values()})

# Constants that a checkpoint may hold and that follow from config.json.
IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attention|attn)\.(masked_)?bias|decoder\.version)"
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


def split_rows(fused: Tensor, rows: Sequence[int], groups: int) -> list[Tensor]:
    """The parts that a fused tensor (sum of rows, ...) holds; rows: those of every part.

    The rows of every part are dealt to groups in equal shares, and a group holds its share of the
    first part, then that of the second, and so on:

        one group for all    Q Q Q Q K K V V        Phi-3: all queries, all keys, all values
        one a head           Q K V  Q K V           GPT-NeoX
        one a key head       Q Q K V  Q Q K V       InternLM2

    >>> [part.tolist() for part in split_rows(torch.arange(8), [4, 2, 2], groups=2)]
    [[0, 1, 4, 5], [2, 6], [3, 7]]
    """
    shares = [n // groups for n in rows]
    parts = fused.view(groups, -1, *fused.shape[1:]).split(shares, dim=1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]


def fuse_rows(parts: Sequence[Tensor], groups: int) -> Tensor:
    """The inverse of `split_rows`."""
    shares = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(shares, dim=1).reshape(-1, *parts[0].shape[1:])
