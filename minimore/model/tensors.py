"""Named tensors on disk: safetensors, shards with an index, .bin.

They are read one at a time, and written one at a time, whole or not at all. Nothing is unpickled
but tensors.
"""

import json
import math
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from ..checksums import CHECKSUM, checksum
from ..files import blame, one_line, read_json, refuse_pointer, write_json, written_whole
from ..options import InputError, require

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
NO_CHECKSUM = "--------"  # in the place of a checksum that is not known yet


# ---- reading -------------------------------------------------------------------------------------


class Tensors:
    """Named tensors in the first of WEIGHT_FILES that is there.

    That is one file, or the shards that an index lists. files: the path of every key.
    """

    def __init__(self, directory: Path):
        # Tensors of .bin files, mapped into memory where the format allows, not read.
        self._opened: dict[Path, dict[str, Tensor]] = {}
        present = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
        require(
            present,
            f"{directory}: no model.safetensors and no {', '.join(WEIGHT_FILES[1:])};"
            " expected weights in safetensors format, or .bin",
        )
        first = present[0]
        self.files: dict[str, Path] = (
            self._indexed(directory, first)
            if first.suffix == ".json"
            else dict.fromkeys(self._keys(first), first)
        )
        require(self.files, f"{first}: holds no tensor")

    def _indexed(self, directory: Path, index: Path) -> dict[str, Path]:
        """The path of every key of the shards that an index lists."""
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(
                f'{index}: "weight_map" is missing or empty;'
                " expected an object of tensor name to file name"
            )
        files: dict[str, Path] = {}
        held: set[tuple[str, str]] = set()  # key, name of a file that holds it
        for name in sorted(set(map(str, listed.values()))):
            self._check_shard(directory, index, name)
            for key in self._keys(directory / name):
                files[key] = directory / name
                held.add((key, name))
        for key, name in listed.items():
            require(
                (key, str(name)) in held,
                f"{index}: says that {key!r} is in {name}, which does not hold it",
            )
            files[key] = directory / str(name)
        return files

    @staticmethod
    def _check_shard(directory: Path, index: Path, name: str) -> None:
        require(
            Path(name).name == name and name not in ("", ".", ".."),
            f"{index}: names the file {name!r}, which is outside {directory};"
            " expected a plain file name",
        )
        require(
            is_path(directory / name, Path.is_file),
            f"{index}: names the file {name!r}, which is missing from {directory}",
        )

    def _keys(self, path: Path) -> list[str]:
        if path.suffix != ".safetensors":
            self._opened[path] = open_bin(path)
            return list(self._opened[path])
        refuse_pointer(path)
        try:
            refuse_repeated_names(path)
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys())
        except PermissionError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except (safetensors.SafetensorError, OSError) as error:
            blame(error)
            raise InputError(
                f"{path}: not a whole safetensors file ({one_line(error)}); fetch it again"
            ) from None

    def kinds(self) -> list[str]:
        """The types in which tensors are stored, by torch's names."""
        types: set[str] = set()
        for path in set(self.files.values()):
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, framework="pt") as file:
                    keys = file.keys()
                    stored = {file.get_slice(key).get_dtype() for key in keys}
                types |= {str(SAFETENSORS_TYPES.get(name, name)) for name in stored}
            else:
                tensors = self._opened.get(path) or open_bin(path)
                types |= {str(tensor.dtype) for tensor in tensors.values()}
        return sorted(name.removeprefix("torch.") for name in types)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        path = self.files[key]
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return tuple(file.get_slice(key).get_shape())
        tensors = self._opened.get(path) or open_bin(path)
        return tuple(tensors[key].shape)

    def read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor as dtype, checked for its shape, its type and finite values.

        It lies in memory that torch allocated: the last bits of a matrix product depend on the
        alignment of its operands, so nothing computes on the file's own pages.
        """
        path = self.files[key]
        try:
            stored_shape, tensor = self._stored(path, key, shape)
        except (safetensors.SafetensorError, OSError) as error:
            blame(error)
            raise InputError(
                f"{path}: {key!r} cannot be read ({one_line(error)}); fetch the file again"
            ) from None
        if tensor is None or stored_shape != shape:  # None: not read, since its shape is wrong
            raise InputError(
                f"{path}: {key!r} has shape {stored_shape}, but config.json asks for {shape}"
            )
        # A .bin file may hold sparse tensors, and tensors without numbers (meta).
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if is_dense and tensor.dtype in READABLE:
            value = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
            is_finite = all(map(math.isfinite, value.aminmax()))
            if is_finite:
                return value
        raise InputError(
            f"{path}: {key!r} ({tensor.dtype}) is not a tensor of finite floating-point numbers;"
            " expected float16, bfloat16 or float32"
        )

    def _stored(
        self, path: Path, key: str, shape: tuple[int, ...]
    ) -> tuple[tuple[int, ...], Tensor | None]:
        """The shape of a stored tensor, and the tensor itself if its shape is the expected one."""
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                stored_shape = tuple(file.get_slice(key).get_shape())
                return stored_shape, file.get_tensor(key) if stored_shape == shape else None
        # Every tensor leaves memory as it is read, in case the file could not be mapped.
        tensors = self._opened.get(path, {})
        tensor = tensors.pop(key) if key in tensors else open_bin(path)[key]
        return tuple(tensor.shape), tensor.detach()


def require_as_written(path: Path, is_ours: bool = False) -> bool:
    """Refuse a safetensors file whose bytes no longer have the checksum in its header.

    Returns whether it has one: other programs write none. is_ours: such a file is refused, too.
    """
    with open(path, "rb") as file:
        header_length = file.read(8)
        most = path.stat().st_size  # a damaged length may be anything
        beginning = header_length + file.read(min(int.from_bytes(header_length, "little"), most))
        entry = re.search(rb'"%b": "([0-9a-f]{8})"' % CHECKSUM.encode(), beginning)
        if entry is None:
            require(not is_ours, f"{path}: holds no checksum; it was damaged, or written elsewhere")
            return False
        # It was computed with NO_CHECKSUM in its place (see write_tensors).
        start, end = entry.span(1)
        computed = checksum(beginning[:start] + NO_CHECKSUM.encode() + beginning[end:])
        while part := file.read(1 << 24):
            computed = checksum(part, computed)
    require(
        computed == entry[1].decode(),
        f"{path}: is not as it was written: its checksum is another; fetch it again",
    )
    return True


def open_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file.

    It is unpickled with weights_only, so that nothing in it runs. It is mapped into memory where
    the format allows; the format before torch 1.6 does not.
    """
    refuse_pointer(path)
    refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about old formats
            is_mappable = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except Exception as error:  # whatever a broken or hostile pickle raises
        blame(error)
        reason = str(error).split("WeightsUnpickler error:")[-1].split(" Please use")[0]
        raise InputError(
            f"{path}: not a file of tensors ({one_line(ValueError(reason))}); nothing in it was run"
        ) from None
    are_named = isinstance(tensors, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    )
    require(are_named, f"{path}: holds something else than named tensors")
    return tensors


def refuse_compressed(path: Path) -> None:
    """Refuse a .bin whose parts are compressed: mapped into memory, they would be read as they are.

    torch writes no such files.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            are_stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # not such a file; whoever opens it says what it is
    require(
        are_stored,
        f"{path}: holds compressed parts; save it again with torch.save, or as safetensors",
    )


def refuse_repeated_names(path: Path) -> None:
    """Refuse a safetensors file that names a tensor twice, which the format forbids."""

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) < len(items):
            repeated = Counter(name for name, _ in items).most_common(1)[0][0]
            raise InputError(f"{path}: names {repeated!r} twice; fetch it again")
        return values

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return  # safetensors says what is wrong
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError):
        return


def is_path(path: Path, question: Callable[[Path], bool]) -> bool:
    """question(path); False where the system refuses the name itself (too long, a zero byte)."""
    try:
        return question(path)
    except (OSError, ValueError):
        return False


# ---- writing -------------------------------------------------------------------------------------


class Lazy(NamedTuple):
    """A tensor that is made when it is written, so that no second model is ever in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Named = Mapping[str, Lazy | Tensor] | Mapping[str, Lazy] | Mapping[str, Tensor]


def write_sharded(directory: Path, tensors: Named) -> None:
    """Write model.safetensors, or shards of at most 5 GB with an index."""
    shards = shards_of(tensors)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards):
        write_tensors(directory / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
        }
        write_json(directory / "model.safetensors.index.json", index)


def shards_of(tensors: Named) -> list[dict[str, Lazy | Tensor]]:
    """The tensors in order, cut into parts of at most SHARD_BYTES, at least one tensor each."""
    shards: list[dict[str, Lazy | Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards


def write_tensors(path: Path, tensors: Named, notes: dict[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all, tensor by tensor.

    notes: what its header says besides the format and a checksum. The file is eight bytes with the
    header's length, a JSON header of types, shapes and places, and the bytes of all tensors, wide
    types first. The checksum is that of the whole file with NO_CHECKSUM in its place.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    notes = (notes or {"format": "pt"}) | {CHECKSUM: NO_CHECKSUM}
    header = json.dumps(header_of(ordered, notes)).encode()
    header += b" " * (-len(header) % 8)
    beginning = len(header).to_bytes(8, "little") + header
    total = checksum(beginning)
    with written_whole(path) as unfinished, open(unfinished, "wb") as file:
        file.write(beginning)
        for _, tensor in ordered:
            value = tensor.make() if isinstance(tensor, Lazy) else tensor
            flat = value.detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data
            file.write(data)
            total = checksum(data, total)
        file.seek(beginning.index(NO_CHECKSUM.encode()))
        file.write(total.encode())


def header_of(ordered: list[tuple[str, Lazy | Tensor]], notes: dict[str, str]) -> dict[str, Any]:
    """The header of a safetensors file: type, shape and place of every tensor, in this order."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": notes}
    start = 0
    for key, tensor in ordered:
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    return header
