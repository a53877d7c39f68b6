"""A Hugging Face checkpoint directory, in and out.

It holds weights, and config.json and the tokenizer beside them. The model is built on the meta
device and filled tensor by tensor. Every key of the file is consumed, or known to be ignorable, or
an error; every parameter is filled. Nothing is executed, and nothing is unpickled but tensors.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from ..checksums import checksum, file_checksum, require_directory_as_written, write_checksums
from ..files import as_text, make_directory, one_line, read_json, write_bytes, write_json
from ..options import InputError, require
from .config_json import Json
from .families import (
    FAMILIES,
    IGNORED,
    LANGUAGE_HEADS,
    REFUSED,
    Family,
    fuse_rows,
    name_table,
    split_rows,
)
from .model_config import ModelConfig
from .tensors import STORAGE, Lazy, Named, Tensors, is_path, require_as_written, write_sharded
from .tokenizer import Tokenizer
from .trunk import Trunk, replace_parameter

HEAD = "score.weight"
HUB_FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")  # besides the weights
NOT_SAVED = ("auto_map", "num_labels")  # keys of config.json

Hold = Callable[[str, Tensor], Tensor]  # name and value of a parameter -> what is held of it
Top = dict[str, tuple[str, Tensor]]  # key in the file -> a parameter's name, and its tensor


# ---- opening -------------------------------------------------------------------------------------


class Checkpoint:
    """An opened directory: `config`, `tokenizer`, and weights that are read when asked for."""

    def __init__(self, model: str):
        self.directory = find(model)
        self.json, self.family, self.config = read_config(self.directory)
        self.tokenizer = Tokenizer(self.directory)
        require(
            self.tokenizer.size <= self.config.vocabulary,
            f"{self.directory}: the tokenizer has ids up to {self.tokenizer.size - 1} and the"
            f" embedding {self.config.vocabulary} rows; this tokenizer belongs to another model",
        )
        self.tensors = Tensors(self.directory)
        self.prefix = self._prefix()

    def _prefix(self) -> str:
        """What stands in front of the trunk's keys.

        The family says "model.decoder.", say. A bare trunk may have "decoder.", or nothing.
        """
        parts = self.family.prefix.split(".")
        prefixes = [".".join(parts[i:]) for i in range(len(parts))]  # the last one is ""
        for prefix in prefixes:
            if any(key.startswith(prefix) for key in self.tensors.files):
                return prefix
        return ""

    @property
    def has_head(self) -> bool:
        """Whether this is a saved reward model, not only a language model."""
        return HEAD in self.tensors.files

    def identity(self) -> str:
        """Tells whether a directory still holds the same checkpoint.

        It is made of config.json, and of the size and date of every file of weights.
        """
        files = []
        for path in sorted(set(self.tensors.files.values())):
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        described = repr((sorted(self.json.items(), key=str), files))
        return hashlib.sha256(described.encode("utf-8", "replace")).hexdigest()[:16]

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        hold: Hold | None = None,
    ) -> tuple[Trunk, Tensor | None]:
        """The filled trunk, and the reward head (D,) fp32, or None if the checkpoint has none.

        hold: name and value of a parameter, on the device -> what the trunk is to hold of it. The
        parameters come one after the other, as they are read.
        """
        self.require_weights_as_written()
        with torch.device("meta"):
            trunk = Trunk(self.config)
        names = name_table(self.family, trunk)
        table = {self.prefix + theirs: ours for theirs, ours in names.items()}
        self._require_these_keys(table)
        for theirs, ours in table.items():
            for name, part in zip(ours, self._read(theirs, ours, trunk, dtype)):
                value = part.to(device)
                replace_parameter(trunk, name, hold(name, value) if hold else value)
        head = None
        if self.has_head:
            self._require_one_label()
            head = self.tensors.read(HEAD, (1, self.config.width), torch.float32)[0].to(device)
        return trunk, head

    def require_weights_as_written(self) -> bool:
        """Refuse weights that carry a checksum, as ours do, and are not as they were written.

        Returns whether all of them carry one.
        """
        paths = sorted(set(self.tensors.files.values()))
        return all([p.suffix == ".safetensors" and require_as_written(p) for p in paths])

    def _require_one_label(self) -> None:
        """Refuse a classifier of several classes."""
        labels, *_ = self.tensors.shape(HEAD)
        require(
            labels == 1,
            f"{self.tensors.files[HEAD]}: {HEAD!r} has {labels} labels; a reward model has one",
        )

    def _read(
        self, theirs: str, ours: Sequence[str], trunk: Trunk, dtype: torch.dtype
    ) -> list[Tensor]:
        """The parameters that one stored tensor holds: one, or the parts of a fused one."""
        shape = fused_shape(trunk, ours)
        if self.family.is_transposed(theirs):
            tensor = self.tensors.read(theirs, shape[::-1], dtype).T.contiguous()
        else:
            tensor = self.tensors.read(theirs, shape, dtype)
        rows = [len(trunk.get_parameter(name)) for name in ours]
        groups = self.family.groups_of(self.config)
        return [tensor] if len(ours) == 1 else split_rows(tensor, rows, groups)

    def _require_these_keys(self, table: Mapping[str, Sequence[str]]) -> None:
        """Refuse keys that are missing, and keys that are not part of this model."""
        keys = set(self.tensors.files)
        others = keys - set(table) - {HEAD, *LANGUAGE_HEADS}
        surplus = sorted(key for key in others if not IGNORED.fullmatch(key))
        missing = sorted(set(table) - keys)
        for what, names in (("missing", missing), ("not part of this model", surplus)):
            if names:
                shown = ", ".join(name[:100] for name in names[:3])
                rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise InputError(
                    f"{self.directory}: {shown}{rest} {what}; config.json says"
                    f" {self.json['model_type']} with {self.config.blocks} blocks"
                )

    @cached_property
    def is_tied(self) -> bool:
        """Whether the language-model head is the embedding itself.

        config.json says so, and a head that is stored all the same must be equal. What is stored
        wins, as in transformers 5.
        """
        config = Json(self.json, str(self.directory / "config.json"))
        if not config.get("tie_word_embeddings", bool, self.family.tied):
            return False
        if self.language_head is None:
            return True
        embedding = next(k for k, v in self.family.names.items() if v == "embedding.weight")
        shape = (self.config.vocabulary, self.config.width)
        stored, embedding_stored = (
            self.tensors.read(key, shape, torch.float32)
            for key in (self.language_head, self.prefix + embedding)
        )
        return torch.equal(stored, embedding_stored)

    @property
    def language_head(self) -> str | None:
        """The key of the language-model head that is stored; None if there is none."""
        return next((key for key in LANGUAGE_HEADS if key in self.tensors.files), None)

    def unembedding(self, trunk: Trunk, hold: Hold | None = None) -> Tensor | None:
        """The language-model head (V, D); None if there is none.

        It is the trunk's embedding itself if the two are tied. Any other one is read in the type of
        the embedding; with `hold` in fp32, and what is held of it is returned.
        """
        embedding = trunk.embedding.weight
        if self.is_tied:
            return embedding
        if self.language_head is None:
            return None
        dtype = torch.float32 if hold else embedding.dtype
        stored = self.tensors.read(self.language_head, tuple(embedding.shape), dtype)
        stored = stored.to(embedding.device)
        return hold("output", stored) if hold else stored


def read_config(directory: Path) -> tuple[dict[str, Any], Family, ModelConfig]:
    """config.json as it is, the family that it names, and what it says of the model."""
    path = directory / "config.json"
    require(
        path.is_file() or not (directory / "options.json").is_file(),
        f"{directory}: this run is not finished;"
        " continue it with --resume, or name its checkpoint-STEP",
    )
    require_directory_as_written(directory)
    values = read_json(path)
    model_type = values.get("model_type")
    require(
        not values.get("quantization_config"),
        f'{path}: "quantization_config" says that the weights are quantised, which are not read;'
        " use the checkpoint in float32, float16 or bfloat16; if these weights are, remove the key",
    )
    require(
        "model_type" in values,
        f'{path}: has no "model_type"; expected one of {", ".join(FAMILIES)}',
    )
    if isinstance(model_type, str) and model_type in REFUSED:
        raise InputError(f'{path}: "model_type" is {model_type!r}: it {REFUSED[model_type]}')
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f'{path}: "model_type" is {str(model_type)[:80]!r}; known: {", ".join(FAMILIES)}'
        )
    family = FAMILIES[model_type]
    return values, family, family.config(Json(values, str(path)))


def find(model: str, config_only: bool = False) -> Path:
    """A directory as it is, or a hub name downloaded into the hub's cache.

    Weights, config and tokenizer are downloaded, and no code; with config_only, no weights either.
    Raises InputError for anything else, and where the hub does not deliver.
    """
    if model and is_path(Path(model), Path.is_dir):
        return Path(model)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".")
    require(
        is_hub_name and not is_path(Path(model), Path.exists),
        f"--model {model}: no such directory; expected a checkpoint directory or a hub name such"
        " as EleutherAI/pythia-1.4b",
    )
    patterns = [*HUB_FILES] if config_only else [*HUB_FILES, "model*.safetensors"]
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns))
        if not config_only and not any(directory.glob("model*.safetensors")):
            snapshot_download(model, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # its own errors, those of HTTP, those of the cache's disk
        raise InputError(
            f"--model {model}: no such directory, and the hub did not deliver it"
            f" ({one_line(error)})"
        ) from None
    return directory


# ---- saving --------------------------------------------------------------------------------------


def save_checkpoint(
    directory: Path, origin: Checkpoint, trunk: Trunk, head: Tensor, dtype: str = "float32"
) -> None:
    """Write a reward model that transformers' AutoModelForSequenceClassification opens.

    directory must exist; config.json comes last. Weights are stored as `dtype`, a key of STORAGE.
    Raises FloatingPointError, and writes nothing, if a number is not finite.
    """
    tensors = model_tensors(origin, trunk, reward_top(head), dtype)
    write_model(directory, origin, tensors, "reward", dtype)


def reward_top(head: Tensor) -> Top:
    """What stands on the trunk of a saved reward model: its head (D,), as a matrix of one row."""
    return {HEAD: ("head", head.detach()[None])}


def model_tensors(
    origin: Checkpoint,
    trunk: Trunk,
    top: Top,
    dtype: str = "float32",
    value: Hold | None = None,
) -> dict[str, Lazy]:
    """The tensors of a saved model, by the family's names; each is made when it is written.

    top: what stands on the trunk, by its key in the file. value: name of a parameter and what the
    model holds of it -> the numbers that this stands for. Making a tensor raises FloatingPointError
    if a number of it is not finite.
    """

    def value_of(name: str, p: Tensor) -> Tensor:
        return value(name, p) if value else p.detach()

    def of_trunk(names: Sequence[str], is_transposed: bool) -> Tensor:
        parts = [value_of(f"trunk.{name}", trunk.get_parameter(name)) for name in names]
        groups = origin.family.groups_of(origin.config)
        tensor = parts[0] if len(parts) == 1 else fuse_rows(parts, groups)
        return tensor.T if is_transposed else tensor

    def lazy(key: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Lazy:
        return Lazy(shape, STORAGE[dtype], partial(_stored, key, make, STORAGE[dtype]))

    tensors = {
        key: lazy(key, tuple(p.shape), partial(value_of, name, p)) for key, (name, p) in top.items()
    }
    for theirs, ours in name_table(origin.family, trunk).items():
        key, shape = origin.family.prefix + theirs, fused_shape(trunk, ours)
        is_transposed = origin.family.is_transposed(theirs)
        shape = shape[::-1] if is_transposed else shape
        tensors[key] = lazy(key, shape, partial(of_trunk, ours, is_transposed))
    return tensors


def stored_tensors(checkpoint: Checkpoint, dtype: str) -> dict[str, Lazy]:
    """The tensors of a saved model, as they are, to be written again in another type.

    Each is read when it is written, and checked as those of `model_tensors` are, in their order.
    """
    with torch.device("meta"):
        trunk = Trunk(checkpoint.config)
    of_trunk = [checkpoint.prefix + name for name in name_table(checkpoint.family, trunk)]
    of_top = [key for key in checkpoint.tensors.files if key not in set(of_trunk)]
    tensors = {}
    for key in (*of_top, *of_trunk):
        shape = checkpoint.tensors.shape(key)
        make = partial(checkpoint.tensors.read, key, shape, torch.float32)
        tensors[key] = Lazy(shape, STORAGE[dtype], partial(_stored, key, make, STORAGE[dtype]))
    return tensors


def fused_shape(trunk: Trunk, names: Sequence[str]) -> tuple[int, ...]:
    """The shape of the stored tensor that holds these parameters: their rows, one after another."""
    shapes = [trunk.get_parameter(name).shape for name in names]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _stored(key: str, make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor in its storage type; FloatingPointError if a number of it is not finite."""
    tensor = make().to(device="cpu", dtype=dtype)
    if not all(map(math.isfinite, tensor.aminmax())):
        name = str(dtype).removeprefix("torch.")
        raise FloatingPointError(f"{key} is not finite in {name}: the model was not written")
    return tensor


def write_model(directory: Path, origin: Checkpoint, tensors: Named, kind: str, dtype: str) -> None:
    """Write weights, then what makes a model of them; kind: one of KINDS."""
    write_sharded(directory, tensors)
    write_config(directory, origin, kind, dtype)


def write_config(directory: Path, origin: Checkpoint, kind: str, dtype: str) -> None:
    """Write the tokenizer files, checksums.json, and config.json, which comes last."""
    files = files_to_save(origin, kind, dtype)
    checksums = {name: checksum(content) for name, content in files.items()}
    for index in directory.glob("*.index.json"):
        checksums[index.name] = file_checksum(index)
    write_checksums(directory, checksums)
    for name, content in files.items():
        write_bytes(directory / name, content)


def files_to_save(
    origin: Checkpoint, kind: str = "reward", dtype: str = "float32"
) -> dict[str, bytes]:
    """The files of a model made from this checkpoint, but its weights; config.json is last.

    Raises InputError if they cannot be written, so ask before training.
    """
    files = origin.tokenizer.files_to_save(pad_id(origin) if kind == "reward" else None)
    return files | {"config.json": as_text(saved_config(origin, kind, dtype)).encode()}


def saved_config(
    origin: Checkpoint, kind: str = "reward", dtype: str = "float32"
) -> dict[str, Any]:
    """config.json of a model made from this checkpoint. Raises InputError if none can be."""
    ours = KINDS[kind](origin) | {"dtype": dtype, "torch_dtype": dtype}
    # Ours come last, so that a config that was saved before is saved with the same bytes again.
    theirs = {
        key: value for key, value in origin.json.items() if key not in ours and key not in NOT_SAVED
    }
    config = theirs | ours
    try:
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{origin.directory / 'config.json'}: cannot be written again as JSON"
            f" ({one_line(error)}); mend or remove that key"
        ) from None
    return config


def keys_of_reward_model(origin: Checkpoint) -> dict[str, Any]:
    """What config.json says of a reward model."""
    return {
        "architectures": [origin.family.reward_class],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",  # so that others apply no sigmoid to the reward
        "pad_token_id": pad_id(origin),
    }


def keys_of_language_model(origin: Checkpoint) -> dict[str, Any]:
    """What config.json says of a language model.

    The tokenizer's EOS is among its ends, so that whoever samples stops where a policy learned to.
    """
    ours = {
        "architectures": [origin.family.language_class],
        "tie_word_embeddings": origin.is_tied,
    }
    stored, named = origin.json.get("eos_token_id"), origin.tokenizer.eos
    if named is None or named == stored or (isinstance(stored, list) and named in stored):
        return ours
    ends = sorted(ids_of_eos(origin))
    return ours | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


KINDS = {"reward": keys_of_reward_model, "language": keys_of_language_model}


# ---- the pad token of a saved model --------------------------------------------------------------


def pad_id(origin: Checkpoint) -> int:
    """An id that no text ends in.

    transformers pools at the last token that is not this id. A pad that is also EOS, or an ordinary
    token, would move the reward. In this order: the pad that config.json or the tokenizer names, a
    special token called pad, the first unused row of the embedding, unk. Raises InputError if none
    of them is left that is outside every text and not EOS.
    """
    usable = ids_outside_texts(origin.tokenizer) - ids_of_eos(origin)
    for candidate in pad_candidates(origin):
        if candidate in usable and candidate < origin.config.vocabulary:
            return candidate
    raise InputError(
        f"{origin.directory}: no id is left for padding: the tokenizer names no pad or unk token"
        " apart from EOS and every embedding row is used;"
        " add a pad token to tokenizer_config.json"
    )


def ids_outside_texts(tokenizer: Tokenizer) -> set[int]:
    """Ids that no text of a user becomes: special tokens, and the first row without a token."""
    ids = {tokenizer.size}
    for id, token in tokenizer.file.get_added_tokens_decoder().items():
        if not token.special:
            continue
        text_ids = tokenizer.encode([token.content])[0][len(tokenizer.bos) :]
        if id not in text_ids:
            ids.add(id)
    return ids


def ids_of_eos(origin: Checkpoint) -> set[int]:
    """The ids of EOS, by the tokenizer and by config.json."""
    stored = origin.json.get("eos_token_id")
    ids = [origin.tokenizer.eos]
    ids += stored if isinstance(stored, list) else [stored]
    return {id for id in ids if type(id) is int}


def pad_candidates(origin: Checkpoint) -> list[int]:
    """Ids that may serve as padding, the best first."""
    tokenizer = origin.tokenizer
    candidates = [origin.json.get("pad_token_id"), named_id(tokenizer, "pad_token")]
    for token in tokenizer.file.get_added_tokens_decoder().values():
        if token.special and "pad" in token.content.lower():
            candidates.append(tokenizer.file.token_to_id(token.content))
    candidates.append(tokenizer.size)
    candidates += [named_id(tokenizer, "unk_token"), tokenizer.file.token_to_id("<unk>")]
    return [candidate for candidate in candidates if type(candidate) is int]


def named_id(tokenizer: Tokenizer, key: str) -> int | None:
    """The id of a named special token, such as "eos_token"."""
    name = tokenizer.special.get(key)
    return None if name is None else tokenizer.file.token_to_id(name)


# ---- a checkpoint to begin with ------------------------------------------------------------------


def random_checkpoint(
    directory: Path, config: dict[str, Any], tokenizer: Path, seed: int, std: float = 0.02
) -> None:
    """Write a checkpoint of a language model with random weights.

    Matrices are normal(0, std), biases 0, and norms multiply by 1. config: the content of
    config.json, of a known model_type; unless it says that embeddings are tied, there is a
    language-model head, too. tokenizer: a tokenizer.json to copy.
    """
    family = FAMILIES[config["model_type"]]
    generator = torch.Generator().manual_seed(seed)
    trunk = Trunk(family.config(Json(config, "config")))
    make_directory(directory)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if p.ndim == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(1.0 - trunk.c.norm_offset if name.endswith("norm.weight") else 0.0)
    tensors = {}
    for theirs, ours in name_table(family, trunk).items():
        parts = [trunk.get_parameter(name).detach() for name in ours]
        fused = parts[0] if len(parts) == 1 else fuse_rows(parts, family.groups_of(trunk.c))
        tensors[family.prefix + theirs] = fused
    if not config.get("tie_word_embeddings", family.tied):
        shape = trunk.embedding.weight.shape
        tensors[family.language_head] = torch.randn(shape, generator=generator) * std
    write_sharded(directory, tensors)
    write_bytes(directory / "tokenizer.json", tokenizer.read_bytes())
    write_json(directory / "config.json", config)
