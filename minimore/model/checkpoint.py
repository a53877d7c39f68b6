"""A Hugging Face checkpoint directory, in and out: weights, with config.json and the tokenizer beside them.

The model is built on the meta device and filled tensor by tensor. Every key of the file is consumed, or known to be ignorable, or
an error; every parameter is filled. Nothing is executed and nothing is unpickled but tensors.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..files import one_line, read_json, write_json
from ..options import InputError
from .families import (
    FAMILIES,
    IGNORED,
    LANGUAGE_HEADS,
    Family,
    Json,
    fuse_heads,
    name_table,
    split_heads,
)
from .tensors import STORAGE, Lazy, Tensors, is_path, write_sharded
from .tokenizer import Tokenizer
from .trunk import ModelConfig, Trunk

# ---- opening ---------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened directory: `config`, `tokenizer`, and weights that are read when asked for. Nothing is executed."""

    def __init__(self, model: str):
        self.directory = find(model)
        self.json, self.family, self.config = read_config(self.directory)
        self.tokenizer = Tokenizer(self.directory)
        if self.tokenizer.size > self.config.vocabulary:
            raise InputError(
                f"{self.directory}: the tokenizer has ids up to {self.tokenizer.size - 1} and the embedding "
                f"{self.config.vocabulary} rows; this tokenizer belongs to another model"
            )
        self.tensors = Tensors(self.directory)
        parts = self.family.prefix.split(
            "."
        )  # "model.decoder." in a whole model, "decoder." or "" in a bare trunk
        prefixes = [".".join(parts[i:]) for i in range(len(parts))]
        self.prefix = next(
            p for p in prefixes if any(k.startswith(p) for k in self.tensors.files) or not p
        )

    @property
    def has_head(self) -> bool:
        """Whether this is a saved reward model, not only a language model."""
        return "score.weight" in self.tensors.files

    def identity(self) -> str:
        """Tells whether a directory still holds the same checkpoint: config.json, and size and date of every file of weights."""
        files = [
            (path.name, (s := path.stat()).st_size, s.st_mtime_ns)
            for path in sorted(set(self.tensors.files.values()))
        ]
        return hashlib.sha256(
            repr((sorted(self.json.items(), key=str), files)).encode("utf-8", "replace")
        ).hexdigest()[:16]

    def load(
        self,
        dtype=torch.float32,
        device="cpu",
        hold: Callable[[str, Tensor], Tensor] = lambda name, value: value,
    ) -> tuple[Trunk, Tensor | None]:
        """The filled trunk, and the reward head (D,) fp32 or None if the checkpoint has none.

        hold: name and value of a parameter, on the device -> what the trunk is to hold of it, one after the other as they are read.
        """
        with torch.device("meta"):
            trunk = Trunk(self.config)
        table = {
            self.prefix + theirs: ours for theirs, ours in name_table(self.family, trunk).items()
        }
        self._audit(table)
        for theirs, ours in table.items():
            empty = [trunk.get_parameter(name) for name in ours]
            shape = (sum(p.shape[0] for p in empty), *empty[0].shape[1:])
            tensor = self.tensors.read(theirs, shape, dtype)
            parts = [tensor] if len(ours) == 1 else split_heads(tensor, self.config.heads)
            del tensor  # so that only one tensor at a time is held twice
            for name, part in zip(ours, parts):
                owner, _, leaf = name.rpartition(".")
                setattr(trunk.get_submodule(owner), leaf, nn.Parameter(hold(name, part.to(device))))
        head = (
            self.tensors.read("score.weight", (1, self.config.width), torch.float32)[0]
            if self.has_head
            else None
        )
        return trunk, None if head is None else head.to(device)

    def unembedding(self, trunk: Trunk) -> Tensor | None:
        """The language-model head (V, D) in the type of the trunk's embedding: that very matrix if the two are tied; None if there is none."""
        embedding = trunk.embedding.weight
        tied = Json(self.json, str(self.directory / "config.json")).get(
            "tie_word_embeddings", bool, self.family.tied
        )
        key = next((key for key in LANGUAGE_HEADS if key in self.tensors.files), None)
        if key is None:
            return embedding if tied else None
        stored = self.tensors.read(key, tuple(embedding.shape), embedding.dtype).to(
            embedding.device
        )
        return (
            embedding if tied and torch.equal(stored, embedding) else stored
        )  # as transformers 5: what is stored wins

    def _audit(self, table):
        keys = set(self.tensors.files)
        missing = sorted(set(table) - keys)
        extra = sorted(
            k
            for k in keys - set(table) - {"score.weight", *LANGUAGE_HEADS}
            if not IGNORED.fullmatch(k)
        )
        for what, names in (("missing", missing), ("not part of this model", extra)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise InputError(
                    f"{self.directory}: {', '.join(n[:100] for n in names[:3])}{more} {what}; config.json says "
                    f"{self.json['model_type']} with {self.config.blocks} blocks"
                )


def read_config(directory: Path) -> tuple[dict, Family, ModelConfig]:
    """config.json as it is, the family that it names, and what it says of the model."""
    if (directory / "options.json").is_file() and not (directory / "config.json").is_file():
        raise InputError(
            f"{directory}: this run is not finished; continue it with --resume, or name its checkpoint-STEP"
        )
    values, where = read_json(directory / "config.json"), str(directory / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f'{where}: "model_type" is {str(kind)[:80]!r}; known: {", ".join(FAMILIES)}'
        )
    return values, FAMILIES[kind], FAMILIES[kind].config(Json(values, where))


def find(model: str, config_only: bool = False) -> Path:
    """A directory as it is, or a hub name downloaded into the hub's cache (weights, config and tokenizer only, or without weights)."""
    if model and is_path(Path(model), Path.is_dir):
        return Path(model)
    if (
        is_path(Path(model), Path.exists)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        or model.startswith(".")
    ):
        raise InputError(
            f"--model {model}: no such directory; expected a checkpoint directory or a hub name such as EleutherAI/pythia-1.4b"
        )
    try:
        directory = Path(
            snapshot_download(
                model,
                allow_patterns=[
                    "*.json",
                    *(["model*.safetensors"] * (not config_only)),
                    "*.jinja",
                    "merges.txt",
                    "tokenizer.model",
                ],
            )
        )
        if not config_only and not any(directory.glob("model*.safetensors")):
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
        return directory
    except (
        Exception
    ) as error:  # its own errors, those of HTTP, of the cache's disk: all are 'not delivered'
        raise InputError(
            f"--model {model}: no such directory, and the hub did not deliver it ({one_line(error)})"
        ) from None


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: Path, origin: Checkpoint, trunk: Trunk, head: Tensor, dtype: str = "float32"
):
    """Write a reward model that transformers' AutoModelForSequenceClassification opens; config.json comes last.

    directory must exist. Weights are stored as `dtype`, a key of STORAGE. Raises FloatingPointError, and writes nothing, if
    a number is not finite.
    """
    write_model(directory, origin, model_tensors(origin, trunk, head, dtype), dtype)


def model_tensors(
    origin: Checkpoint,
    trunk: Trunk,
    head: Tensor,
    dtype: str = "float32",
    value: Callable[[str, Tensor], Tensor] = lambda name, p: p.detach(),
) -> dict[str, Lazy]:
    """What `save_checkpoint` writes, by the family's names. value: name of a trunk's parameter and what the trunk holds -> the number it stands for."""

    def make(names):
        parts = [value(name, trunk.get_parameter(name)) for name in names]
        return parts[0] if len(parts) == 1 else fuse_heads(parts, origin.config.heads)

    tensors = {"score.weight": Lazy((1, len(head)), STORAGE[dtype], lambda: head.detach()[None])}
    for theirs, ours in name_table(origin.family, trunk).items():
        shapes = [trunk.get_parameter(name).shape for name in ours]
        tensors[origin.family.prefix + theirs] = Lazy(
            (sum(s[0] for s in shapes), *shapes[0][1:]), STORAGE[dtype], partial(make, ours)
        )
    return {key: lazy._replace(make=partial(_checked, key, lazy)) for key, lazy in tensors.items()}


def _checked(key, lazy):
    tensor = lazy.make().to(device="cpu", dtype=lazy.dtype)
    if not all(map(math.isfinite, tensor.aminmax())):
        raise FloatingPointError(
            f"{key} is not finite in {str(lazy.dtype).removeprefix('torch.')}: the model was not written"
        )
    return tensor


def write_model(directory: Path, origin: Checkpoint, tensors: dict[str, Lazy | Tensor], dtype: str):
    """Weights, then what makes a model of them."""
    write_sharded(directory, tensors)
    write_config(directory, origin, dtype)


def write_config(directory: Path, origin: Checkpoint, dtype: str):
    """Tokenizer files and config.json, which comes last."""
    for name, content in origin.tokenizer.files_to_save(pad_id(origin)).items():
        (directory / name).write_bytes(content)
    write_json(directory / "config.json", saved_config(origin, dtype))


def saved_config(origin: Checkpoint, dtype: str = "float32") -> dict:
    """config.json of a reward model made from this checkpoint; raises InputError if none can be written, so ask before training."""
    config = {
        k: v
        for k, v in origin.json.items()
        if k not in ("auto_map", "num_labels", "label2id", "quantization_config")
    }
    config |= {
        "architectures": [origin.family.reward_class],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id(origin),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    try:
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{origin.directory / 'config.json'}: cannot be written again as JSON ({one_line(error)}); mend or remove that key"
        ) from None
    return config


def pad_id(origin: Checkpoint) -> int:
    """An id that no text ends in: the tokenizer's own pad if it is not EOS, else the first unused embedding row, else unk.

    transformers pools at the last token that is not this id, so a pad that is also EOS, or an ordinary token, would move the reward.
    """
    tokenizer = origin.tokenizer
    special = {
        i
        for i, t in tokenizer.file.get_added_tokens_decoder().items()
        if t.special and i not in tokenizer.encode([t.content])[0][len(tokenizer.bos) :]
    } | {tokenizer.size}
    token_id = lambda key: (
        tokenizer.file.token_to_id(tokenizer.special[key]) if key in tokenizer.special else None
    )
    eos = [token_id("eos_token"), *_list(origin.json.get("eos_token_id"))]
    padding = [
        t
        for t in tokenizer.file.get_added_tokens_decoder().values()
        if t.special and "pad" in t.content.lower()
    ]
    candidates = [
        origin.json.get("pad_token_id"),
        token_id("pad_token"),
        *(tokenizer.file.token_to_id(t.content) for t in padding),
    ]
    candidates += [tokenizer.size, token_id("unk_token"), tokenizer.file.token_to_id("<unk>")]
    for candidate in candidates:
        if (
            type(candidate) is int
            and candidate in special - {e for e in eos if type(e) is int}
            and candidate < origin.config.vocabulary
        ):
            return candidate
    raise InputError(
        f"{origin.directory}: no id is left for padding: the tokenizer names no pad or unk token apart from "
        "EOS and every embedding row is used; add a pad token to tokenizer_config.json"
    )


def _list(value):
    return value if isinstance(value, list) else [value]


def random_checkpoint(directory: Path, config: dict, tokenizer: Path, seed: int, std: float = 0.02):
    """Write a causal-LM-shaped checkpoint with random weights: matrices normal(0, std), biases 0, norms 1.

    config: the content of config.json, of a known model_type; tokenizer: a tokenizer.json to copy.
    """
    family = FAMILIES[config["model_type"]]
    generator = torch.Generator().manual_seed(seed)
    trunk = Trunk(family.config(Json(config, "config")))
    directory.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if p.ndim == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    tensors = {}
    for theirs, ours in name_table(family, trunk).items():
        parts = [trunk.get_parameter(n).detach() for n in ours]
        tensors[family.prefix + theirs] = (
            parts[0] if len(parts) == 1 else fuse_heads(parts, trunk.c.heads)
        )
    write_sharded(directory, tensors)
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    write_json(directory / "config.json", config)
