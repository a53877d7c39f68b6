"""A Hugging Face checkpoint directory, in and out: config.json, weights, tokenizer.

A family is an entry of FAMILIES: how its config.json maps to ModelConfig, and a table of names. The model is built on
the meta device and filled tensor by tensor. Every key of the file is consumed, or known to be ignorable, or an error; every
parameter is filled.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import safetensors
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from tokenizers import Tokenizer as TokenizerFile
from torch import Tensor, nn

from .model import ModelConfig, Trunk
from .options import InputError, write_json

SHARD_BYTES = 5_000_000_000
LARGEST = 2 ** 31                        # of any number in a config.json
MOST_BLOCKS, MOST_PARAMETERS = 1000, 10 ** 12        # what no checkpoint has; more is a damaged config.json
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READABLE = {*STORAGE.values(), torch.float64}


# ---- config.json -> ModelConfig --------------------------------------------------------------------------------------

ACTIVATION_NAMES = {"gelu": "gelu", "silu": "silu", "swish": "silu", "relu": "relu", "gelu_new": "gelu_tanh",
                    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


class Json:
    """config.json with typed access: a wrong or missing value is one clear line."""

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def get(self, key, kind, default=None):
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int and abs(value) < 2 ** 53:
            value = float(value)
        if type(value) is not kind or (kind in (int, float) and not 0 < value < LARGEST):
            what = "is missing" if key not in self.values else f"is {json.dumps(value)[:80]}"
            kinds = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a string"}
            raise InputError(f'{self.where}: "{key}" {what}; expected {kinds[kind]}')
        return value

    def activation(self, default, key="hidden_act"):
        name = self.get(key, str, default)
        if name not in ACTIVATION_NAMES:
            raise InputError(f'{self.where}: "{key}" is {name!r}; known: {", ".join(ACTIVATION_NAMES)}')
        return ACTIVATION_NAMES[name]

    def rope(self, head_width, base_key, share_key, share):
        """Rotary fields; old spelling (top level, rope_scaling) and new (rope_parameters). share_key: None rotates whole heads."""
        key = "rope_scaling" if self.values.get("rope_scaling") is not None else "rope_parameters"
        given = {} if self.values.get(key) is None else self.values[key]
        if not isinstance(given, dict):
            raise InputError(f'{self.where}: "{key}" is not an object')
        rope = Json(given, f"{self.where}: rope")
        base = rope.get("rope_theta", float, self.get(base_key, float, self.get("rope_theta", float, 10000.0)))
        if share_key is not None:
            share = rope.get("partial_rotary_factor", float, self.get(share_key, float, share))
        kind = given.get("rope_type") or given.get("type") or "default"
        fields = {"rotary_width": int(head_width * share), "rope_base": base}
        if kind == "linear":
            fields["rope_factor"] = rope.get("factor", float)
        elif kind == "llama3":
            fields["rope_llama3"] = (*(rope.get(k, float) for k in ("factor", "low_freq_factor", "high_freq_factor")),
                                     rope.get("original_max_position_embeddings", int, self.get("max_position_embeddings", int, 2048)))
            if fields["rope_llama3"][1] >= fields["rope_llama3"][2]:
                raise InputError(f'{self.where}: "low_freq_factor" must be smaller than "high_freq_factor"')
        elif kind != "default":
            raise InputError(f"{self.where}: rope scaling {kind!r} is not supported; known: default, linear, llama3 "
                             "(scalings that depend on the text's length cannot share a prompt)")
        rotary = fields["rotary_width"]          # an odd one rotates one dimension more, as transformers does
        if not 0 < rotary + rotary % 2 <= head_width:
            raise InputError(f"{self.where}: {rotary} rotary dimensions do not fit in heads of width {head_width}")
        return fields

    def windows(self, blocks, window, first=0):
        """Per block: the sliding window, in the blocks that `layer_types` names or from block number `first` on."""
        types = self.values.get("layer_types")
        if types is None:
            types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(blocks)]
        if not isinstance(types, list) or len(types) != blocks or not all(t in ("sliding_attention", "full_attention") for t in types):
            raise InputError(f'{self.where}: "layer_types" is {json.dumps(types)[:80]}; expected {blocks} of full_attention or sliding_attention')
        return tuple(window if t == "sliding_attention" else None for t in types) if window else ()

    def sizes(self, mlp_key="intermediate_size", kv_heads=None, head_width=None):
        """What the families spell alike; kv_heads and head_width: a family's own defaults."""
        width, heads = self.get("hidden_size", int), self.get("num_attention_heads", int)
        kv_heads = self.get("num_key_value_heads", int, kv_heads or heads)
        if (width % heads and self.values.get("head_dim") is None and not head_width) or heads % kv_heads:
            raise InputError(f"{self.where}: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not divide")
        found = dict(vocabulary=self.get("vocab_size", int), width=width, blocks=self.get("num_hidden_layers", int),
                     heads=heads, kv_heads=kv_heads, head_width=self.get("head_dim", int, head_width or max(1, width // heads)),
                     mlp_width=self.get(mlp_key, int))
        attention = (heads + kv_heads) * found["head_width"]
        parameters = width * (found["vocabulary"] + 2 * found["blocks"] * (attention + found["mlp_width"]))
        if found["blocks"] > MOST_BLOCKS or parameters > MOST_PARAMETERS:
            raise InputError(f"{self.where}: describes {found['blocks']} blocks and about {parameters:.0e} parameters; expected a model that exists")
        return found


def gpt_neox_config(j: Json) -> ModelConfig:
    sizes, bias = j.sizes(), j.get("attention_bias", bool, True)
    return ModelConfig(**sizes, activation=j.activation("gelu"), gated=False, norm="layer",
                       norm_eps=j.get("layer_norm_eps", float, 1e-5), qkv_bias=bias, attention_output_bias=bias,
                       mlp_bias=True, parallel_residual=j.get("use_parallel_residual", bool, True),
                       **j.rope(sizes["head_width"], "rotary_emb_base", "rotary_pct", 0.25))


def llama_config(j: Json, **changes) -> ModelConfig:
    """LLaMA, and what Mistral and Qwen say otherwise."""
    sizes = changes.pop("sizes", None) or j.sizes()
    bias = j.get("attention_bias", bool, False) if "qkv_bias" not in changes else False
    return ModelConfig(**sizes, **dict(
        activation=j.activation("silu"), gated=True, norm="rms", norm_eps=j.get("rms_norm_eps", float, 1e-6), qkv_bias=bias,
        attention_output_bias=bias, mlp_bias=j.get("mlp_bias", bool, False), parallel_residual=False) | changes,
        **j.rope(sizes["head_width"], "rope_theta", None, 1.0))


def mistral_config(j: Json) -> ModelConfig:
    sizes = j.sizes(kv_heads=8)
    window = j.get("sliding_window", int, 4096) if j.values.get("sliding_window", 4096) is not None else None
    return llama_config(j, sizes=sizes, qkv_bias=False, mlp_bias=False, windows=j.windows(sizes["blocks"], window))


def qwen2_config(j: Json, **changes) -> ModelConfig:
    sizes = changes.pop("sizes", None) or j.sizes(kv_heads=32)
    given = j.values.get("sliding_window", 4096) is not None and j.get("use_sliding_window", bool, False)
    window = j.get("sliding_window", int, 4096) if given else None
    first = j.values.get("max_window_layers", 28)
    first = 0 if first == 0 else j.get("max_window_layers", int, 28)
    return llama_config(j, **dict(sizes=sizes, qkv_bias=True, mlp_bias=False, windows=j.windows(sizes["blocks"], window, first)) | changes)


def qwen3_config(j: Json) -> ModelConfig:
    bias = j.get("attention_bias", bool, False)
    return qwen2_config(j, sizes=j.sizes(kv_heads=32, head_width=128), qk_norm=True, qkv_bias=bias, attention_output_bias=bias)


def opt_config(j: Json) -> ModelConfig:
    sizes, bias = j.sizes(mlp_key="ffn_dim"), j.get("enable_bias", bool, True)
    for key, default, only in (("do_layer_norm_before", True, True), ("_remove_final_layer_norm", False, False),
                               ("layer_norm_elementwise_affine", True, True)):
        if j.get(key, bool, default) is not only:
            raise InputError(f'{j.where}: "{key}" is {json.dumps(not only)}; only the pre-norm OPT models are supported (not opt-350m)')
    if j.get("word_embed_proj_dim", int, sizes["width"]) != sizes["width"]:
        raise InputError(f'{j.where}: "word_embed_proj_dim" differs from "hidden_size"; such an OPT (opt-350m) is not supported')
    return ModelConfig(**sizes, activation=j.activation("relu", "activation_function"), gated=False, norm="layer", norm_eps=1e-5,
                       qkv_bias=bias, attention_output_bias=bias, mlp_bias=bias, parallel_residual=False, rotary_width=0, rope_base=1.0,
                       learned_positions=j.get("max_position_embeddings", int, 2048) + 2, position_offset=2)


# ---- families: their names -> ours. {} is the block number, * stands for weight and bias -------------------------------

@dataclass(frozen=True)
class Family:
    """One model_type. A tuple on the right is one fused tensor, its parts interleaved head by head."""
    config: Callable[[Json], ModelConfig]
    prefix: str                          # in front of every key of the trunk
    reward_class: str                    # transformers' class for a trunk with a scalar head
    names: dict[str, str | tuple[str, ...]]


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
    "gpt_neox": Family(gpt_neox_config, "gpt_neox.", "GPTNeoXForSequenceClassification", {
        "embed_in.weight": "embedding.weight",
        "layers.{}.input_layernorm.*": "blocks.{}.attention_norm.*",
        "layers.{}.attention.query_key_value.*": tuple(f"blocks.{{}}.attention.{part}.*" for part in ("query", "key", "value")),
        "layers.{}.attention.dense.*": "blocks.{}.attention.output.*",
        "layers.{}.post_attention_layernorm.*": "blocks.{}.mlp_norm.*",
        "layers.{}.mlp.dense_h_to_4h.*": "blocks.{}.mlp.up.*",
        "layers.{}.mlp.dense_4h_to_h.*": "blocks.{}.mlp.down.*",
        "final_layer_norm.*": "final_norm.*",
    }),
    "llama": Family(llama_config, "model.", "LlamaForSequenceClassification", LLAMA_NAMES),
    "mistral": Family(mistral_config, "model.", "MistralForSequenceClassification", LLAMA_NAMES),
    "qwen2": Family(qwen2_config, "model.", "Qwen2ForSequenceClassification", LLAMA_NAMES),
    "qwen3": Family(qwen3_config, "model.", "Qwen3ForSequenceClassification", LLAMA_NAMES | {
        "layers.{}.self_attn.q_norm.weight": "blocks.{}.attention.query_norm.weight",
        "layers.{}.self_attn.k_norm.weight": "blocks.{}.attention.key_norm.weight",
    }),
    "opt": Family(opt_config, "model.decoder.", "OPTForSequenceClassification", {
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
    }),
}

# Keys that a checkpoint may hold and a reward model does not need: language-model heads and stored constants.
IGNORED = re.compile(r"(lm_head|embed_out)\.weight|(.*\.)?(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)")


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


# ---- opening ---------------------------------------------------------------------------------------------------------

class Checkpoint:
    """An opened directory: `config`, `tokenizer`, and weights that are read when asked for. Nothing is executed."""

    def __init__(self, model: str):
        self.directory = _find(model)
        self.json = read_json(self.directory / "config.json")
        where = str(self.directory / "config.json")
        kind = self.json.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputError(f'{where}: "model_type" is {json.dumps(kind)[:80]}; known: {", ".join(FAMILIES)}')
        self.family = FAMILIES[kind]
        self.config = self.family.config(Json(self.json, where))
        self.tokenizer = Tokenizer(self.directory / "tokenizer.json")
        if self.tokenizer.size > self.config.vocabulary:
            raise InputError(f"{self.directory}: the tokenizer has ids up to {self.tokenizer.size - 1} and the embedding "
                             f"{self.config.vocabulary} rows; this tokenizer belongs to another model")
        self.tokenizer_files = {name: (self.directory / name).read_bytes() for name in TOKENIZER_FILES
                                if (self.directory / name).is_file()}
        self.tokenizer_config = read_json(self.directory / "tokenizer_config.json") if "tokenizer_config.json" in self.tokenizer_files else {}
        self.weights = Weights(self.directory)
        parts = self.family.prefix.split(".")    # "model.decoder." in a whole model, "decoder." or "" in a bare trunk
        prefixes = [".".join(parts[i:]) for i in range(len(parts))]
        self.prefix = next(p for p in prefixes if any(k.startswith(p) for k in self.weights.files) or not p)

    @property
    def has_head(self) -> bool:
        return "score.weight" in self.weights.files

    def load(self, dtype=torch.float32, device="cpu") -> tuple[Trunk, Tensor | None]:
        """The filled trunk, and the reward head (D,) fp32 or None if the checkpoint has none."""
        with torch.device("meta"):
            trunk = Trunk(self.config)
        table = {self.prefix + theirs: ours for theirs, ours in name_table(self.family, trunk).items()}
        self._audit(table)
        for theirs, ours in table.items():
            empty = [trunk.get_parameter(name) for name in ours]
            shape = (sum(p.shape[0] for p in empty), *empty[0].shape[1:])
            tensor = self.weights.read(theirs, shape, dtype)
            parts = [tensor] if len(ours) == 1 else split_heads(tensor, self.config.heads)
            for name, part in zip(ours, parts):
                owner, _, leaf = name.rpartition(".")
                setattr(trunk.get_submodule(owner), leaf, nn.Parameter(_own(part.to(device))))
        head = self.weights.read("score.weight", (1, self.config.width), torch.float32)[0] if self.has_head else None
        return trunk, None if head is None else _own(head.to(device))

    def _audit(self, table):
        keys = set(self.weights.files)
        missing = sorted(set(table) - keys)
        extra = sorted(k for k in keys - set(table) - {"score.weight"} if not IGNORED.fullmatch(k))
        for what, names in (("missing", missing), ("not part of this model", extra)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise InputError(f"{self.directory}: {', '.join(n[:100] for n in names[:3])}{more} {what}; config.json says "
                                 f"{self.json['model_type']} with {self.config.blocks} blocks")


class Weights:
    """Named tensors in model.safetensors, or in the shards that model.safetensors.index.json lists. `files`: key -> path."""

    def __init__(self, directory: Path):
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if single.is_file():
            self.files = {key: single for key in _keys(single)}
        elif index.is_file():
            self.files = self._indexed(directory, index)
        else:
            raise InputError(f"{directory}: no model.safetensors and no model.safetensors.index.json; expected weights in safetensors format")

    def _indexed(self, directory, index):
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f'{index}: "weight_map" is missing or empty; expected an object of tensor name to file name')
        held = {}
        for name in sorted(set(map(str, listed.values()))):
            if Path(name).name != name or name in ("", ".", ".."):
                raise InputError(f"{index}: names the file {name!r}, which is outside {directory}; expected a plain file name")
            if not _is(directory / name, Path.is_file):
                raise InputError(f"{index}: names the file {name!r}, which is missing from {directory}")
            held.update({(key, name): directory / name for key in _keys(directory / name)})
        for key, name in listed.items():
            if (key, str(name)) not in held:
                raise InputError(f"{index}: says that {key!r} is in {name}, which does not hold it")
        return {key: path for (key, _), path in held.items()} | {key: directory / str(name) for key, name in listed.items()}

    def read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor as dtype, checked: shape, type, finite values."""
        path = self.files[key]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                found = tuple(file.get_slice(key).get_shape())
                if found != shape:
                    raise InputError(f"{path}: {key!r} has shape {found}, but config.json asks for {shape}")
                tensor = file.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: {key!r} cannot be read ({_line(error)}); fetch the file again") from None
        read = tensor.to(dtype) if tensor.dtype in READABLE else None
        if read is None or not read.isfinite().all():
            raise InputError(f"{path}: {key!r} ({tensor.dtype}) is not a tensor of finite floating-point numbers; expected float16, bfloat16 or float32")
        return read


class Tokenizer:
    """tokenizer.json: text -> ids, with the leading special tokens (BOS) that the file itself adds, and nothing after."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the checkpoint's tokenizer.json")
        try:
            self.file = TokenizerFile.from_str(path.read_text("utf-8"))
            self.file.no_truncation()            # a file may carry both, left by whoever saved it
            self.file.no_padding()
            ids = self.file.encode("a", add_special_tokens=True)
            self.size = 1 + max(self.file.get_vocab(with_added_tokens=True).values(), default=-1)
        except BaseException as error:           # the library raises plain Exception, and its Rust panics not even that
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError(f"{path}: not a usable tokenizer ({_line(error)})") from None
        special = ids.special_tokens_mask
        self.bos = ids.ids[:special.index(0) if 0 in special else 0]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, BOS in front if the tokenizer adds one, no EOS."""
        return [self.bos + e.ids for e in self.file.encode_batch(texts, add_special_tokens=False)]


def _own(tensor: Tensor) -> Tensor:
    """A copy in memory that torch allocated: a matrix product's last bits depend on the alignment of its operands."""
    return tensor.clone(memory_format=torch.contiguous_format)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a Hugging Face checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({_line(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}; expected a JSON object")
    return value


def _find(model: str) -> Path:
    """A directory as it is, or a hub name downloaded into the hub's cache (weights, config and tokenizer only)."""
    if _is(Path(model), Path.is_dir):
        return Path(model)
    if _is(Path(model), Path.exists) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise InputError(f"--model {model}: no such directory; expected a checkpoint directory or a hub name such as EleutherAI/pythia-1.4b")
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:                   # its own errors, those of HTTP, of the cache's disk: all are 'not delivered'
        raise InputError(f"--model {model}: no such directory, and the hub did not deliver it ({_line(error)})") from None


def _is(path: Path, question: Callable[[Path], bool]) -> bool:
    """question(path), and no where the system refuses the name itself (too long, a zero byte)."""
    try:
        return question(path)
    except (OSError, ValueError):
        return False


def _keys(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({_line(error)}); fetch it again") from None


def _line(error) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# ---- saving ----------------------------------------------------------------------------------------------------------

def save_checkpoint(directory: Path, source: Checkpoint, trunk: Trunk, head: Tensor, dtype: str = "float32"):
    """Write a reward model that transformers' AutoModelForSequenceClassification opens; config.json comes last.

    directory must exist. Weights are stored as `dtype`, a key of STORAGE. Raises FloatingPointError, and writes nothing, if
    a number is not finite.
    """
    tensors = {"score.weight": head.detach()[None]}
    for theirs, ours in name_table(source.family, trunk).items():
        parts = [trunk.get_parameter(name).detach() for name in ours]
        tensors[source.family.prefix + theirs] = parts[0] if len(parts) == 1 else fuse_heads(parts, source.config.heads)
    tensors = {k: t.to(device="cpu", dtype=STORAGE[dtype]).contiguous() for k, t in tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{key} is not finite in {dtype}: the model was not written to {directory}")
    write_weights(directory, tensors)
    for name, content in source.tokenizer_files.items():
        (directory / name).write_bytes(content)
    config = {k: v for k, v in source.json.items() if k not in ("auto_map", "num_labels", "label2id")}
    config |= {"architectures": [source.family.reward_class], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
               "pad_token_id": pad_id(source), "dtype": dtype, "torch_dtype": dtype}
    write_json(directory / "config.json", config)


def write_weights(directory: Path, tensors: dict[str, Tensor]):
    """model.safetensors, or shards of at most 5 GB with an index; each written beside and renamed."""
    shards, filled = [{}], 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        write_tensors(directory / name, shard)
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}})


def write_tensors(path: Path, tensors: dict[str, Tensor]):
    """One safetensors file, whole or not at all."""
    beside = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, beside, metadata={"format": "pt"})
        os.replace(beside, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {_line(error)}") from None
    finally:
        beside.unlink(missing_ok=True)


def pad_id(source: Checkpoint) -> int:
    """An id that no text ends in: the tokenizer's own pad if it is not EOS, else the first unused embedding row, else unk.

    transformers pools at the last token that is not this id, so a pad that is also EOS would move the reward.
    """
    named = source.tokenizer_config

    def token_id(token):
        """The id of a token given as a string or as {"content": string}; None for anything else."""
        text = token.get("content") if isinstance(token, dict) else token
        return source.tokenizer.file.token_to_id(text) if isinstance(text, str) else None

    eos = [token_id(named.get("eos_token")), *_list(source.json.get("eos_token_id"))]
    padding = [t for t in source.tokenizer.file.get_added_tokens_decoder().values() if t.special and "pad" in t.content.lower()]
    candidates = [source.json.get("pad_token_id"), token_id(named.get("pad_token")), *(token_id(t.content) for t in padding)]
    candidates += [source.tokenizer.size, token_id(named.get("unk_token")), token_id("<unk>")]
    for candidate in candidates:
        if type(candidate) is int and candidate not in eos and 0 <= candidate < source.config.vocabulary:
            return candidate
    raise InputError(f"{source.directory}: no id is left for padding: the tokenizer names no pad or unk token apart from "
                     "EOS and every embedding row is used; add a pad token to tokenizer_config.json")


def _list(value):
    return value if isinstance(value, list) else [value]


def random_checkpoint(directory: Path, config: dict, tokenizer: Path, seed: int, std: float = 0.02):
    """Write a causal-LM-shaped checkpoint with random weights: matrices normal(0, std), biases 0, norms 1.

    config: the content of config.json, of a known model_type; tokenizer: a tokenizer.json to copy.
    """
    family = FAMILIES[config["model_type"]]
    generator = torch.Generator().manual_seed(seed)
    trunk = Trunk(family.config(Json(config, "config")))
    directory.mkdir(parents=True)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if p.ndim == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    tensors = {}
    for theirs, ours in name_table(family, trunk).items():
        parts = [trunk.get_parameter(n).detach() for n in ours]
        tensors[family.prefix + theirs] = parts[0] if len(parts) == 1 else fuse_heads(parts, trunk.c.heads)
    write_weights(directory, tensors)
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    write_json(directory / "config.json", config)
