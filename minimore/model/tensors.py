"""Named tensors on disk: safetensors, shards with an index, .bin. Read one at a time, written one at a time, whole or not at all.

Nothing is unpickled but tensors.
"""

import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from ..files import beside, one_line, read_json, write_json
from ..options import InputError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD_BYTES = 5_000_000_000
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
READABLE = {*STORAGE.values(), torch.float64}


# ---- reading ---------------------------------------------------------------------------------------------------------


class Tensors:
    """Named tensors in the first of WEIGHT_FILES that is there: one file, or the shards that an index lists. `files`: key -> path."""

    def __init__(self, directory: Path):
        self._opened = {}  # .bin files: path -> {key: tensor}, mapped into memory, not read
        there = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
        if not there:
            raise InputError(
                f"{directory}: no model.safetensors and no {', '.join(WEIGHT_FILES[1:])}; expected weights in safetensors format, or .bin"
            )
        self.files = (
            self._indexed(directory, there[0])
            if there[0].suffix == ".json"
            else dict.fromkeys(self._keys(there[0]), there[0])
        )
        if not self.files:
            raise InputError(f"{there[0]}: holds no tensor")

    def _indexed(self, directory, index):
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(
                f'{index}: "weight_map" is missing or empty; expected an object of tensor name to file name'
            )
        held = {}
        for name in sorted(set(map(str, listed.values()))):
            if Path(name).name != name or name in ("", ".", ".."):
                raise InputError(
                    f"{index}: names the file {name!r}, which is outside {directory}; expected a plain file name"
                )
            if not is_path(directory / name, Path.is_file):
                raise InputError(
                    f"{index}: names the file {name!r}, which is missing from {directory}"
                )
            held.update({(key, name): directory / name for key in self._keys(directory / name)})
        for key, name in listed.items():
            if (key, str(name)) not in held:
                raise InputError(f"{index}: says that {key!r} is in {name}, which does not hold it")
        return {key: path for (key, _), path in held.items()} | {
            key: directory / str(name) for key, name in listed.items()
        }

    def _keys(self, path: Path) -> list[str]:
        if path.suffix != ".safetensors":
            self._opened[path] = self._bin(path)
            return list(self._opened[path])
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a whole safetensors file ({one_line(error)}); fetch it again"
            ) from None

    def kinds(self) -> list[str]:
        """The types in which tensors are stored, by torch's names."""
        found = set()
        for path in set(self.files.values()):
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, framework="pt") as file:
                    found |= {file.get_slice(key).get_dtype() for key in file.keys()}
            else:
                found |= {
                    str(t.dtype).removeprefix("torch.")
                    for t in (self._opened.get(path) or self._bin(path)).values()
                }
        return sorted(
            str(SAFETENSORS_TYPES.get(kind, kind)).removeprefix("torch.") for kind in found
        )

    def _bin(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a .bin file: unpickled with weights_only, so that nothing in it runs, and mapped where the format allows."""
        try:
            zipped = zipfile.is_zipfile(
                path
            )  # before torch 1.6 the format was another, which cannot be mapped
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about old formats
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # whatever a broken or hostile pickle raises; its end says what
            raise InputError(
                f"{path}: not a file of tensors ({one_line(str(error).split('WeightsUnpickler error:')[-1].split(' Please use')[0])}); nothing in it was run"
            ) from None
        if not isinstance(found, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
        ):
            raise InputError(f"{path}: holds something else than named tensors")
        return found

    def read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor as dtype, checked (shape, type, finite values), in memory that torch allocated.

        A matrix product's last bits depend on the alignment of its operands, so nothing computes on the file's own pages.
        """
        path = self.files[key]
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, framework="pt") as file:
                    found = tuple(file.get_slice(key).get_shape())
                    tensor = file.get_tensor(key) if found == shape else None
            else:
                held = self._opened.get(
                    path, {}
                )  # each leaves memory as it is read, should the file not be mapped
                tensor = (held.pop(key) if key in held else self._bin(path)[key]).detach()
                found = tuple(tensor.shape)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: {key!r} cannot be read ({one_line(error)}); fetch the file again"
            ) from None
        if found != shape:
            raise InputError(f"{path}: {key!r} has shape {found}, but config.json asks for {shape}")
        plain = (
            tensor.dtype in READABLE
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
        )
        read = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True) if plain else None
        if read is None or not all(map(math.isfinite, read.aminmax())):
            raise InputError(
                f"{path}: {key!r} ({tensor.dtype}) is not a tensor of finite floating-point numbers; expected float16, bfloat16 or float32"
            )
        return read


def is_path(path: Path, question: Callable[[Path], bool]) -> bool:
    """question(path), and no where the system refuses the name itself (too long, a zero byte)."""
    try:
        return question(path)
    except (OSError, ValueError):
        return False


# ---- writing ---------------------------------------------------------------------------------------------------------


class Lazy(NamedTuple):
    """A tensor that is made when it is written, so that no second model is ever in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_sharded(directory: Path, tensors: dict[str, Lazy | Tensor]):
    """model.safetensors, or shards of at most 5 GB with an index; each written beside and renamed."""
    shards, filled = [{}], 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards):
        write_tensors(directory / name, shard)
    if len(shards) > 1:
        write_json(
            directory / "model.safetensors.index.json",
            {
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
            },
        )


def write_tensors(
    path: Path, tensors: dict[str, Lazy | Tensor], notes: dict[str, str] | None = None
):
    """One safetensors file, whole or not at all, tensor by tensor; notes: what its header says besides its format.

    The format: eight bytes with the header's length, a JSON header of types, shapes and places, and the bytes of all tensors, wide types first.
    """
    kinds = {dtype: kind for kind, dtype in SAFETENSORS_TYPES.items()}
    header, at = {"__metadata__": notes or {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for key, tensor in ordered:
        header[key] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = beside(path)
    try:
        with open(unfinished, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                made = (
                    (tensor.make() if isinstance(tensor, Lazy) else tensor)
                    .detach()
                    .cpu()
                    .contiguous()
                )
                file.write(made.reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
