"""Safetensors files, read and written one tensor at a time.

The `safetensors` library maps whole files into memory or holds them; checkpoints larger than half
of the memory need neither. The format is a length (8 bytes, little endian), that many bytes of
JSON, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ais_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LARGEST_HEADER = 100_000_000
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: pathlib.Path
    offset: int  # bytes from the beginning of the file
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own."""
        count = math.prod(self.shape)
        data = np.fromfile(self.file, self.dtype, count, offset=self.offset)
        if data.size != count:
            raise _broken(self.file, "it became shorter while it was read")
        return data.reshape(self.shape)


def scan_folder(folder: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name; only headers are read.

    Raises:
      UserError: no safetensors are there, a shard is missing, truncated or broken.
    """
    entries: dict[str, Entry] = {}
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder}: {_no_weights(folder)}")
        return scan_file(folder / SINGLE)
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
        raise UserError(f"{folder / INDEX}: has no weight_map of tensor names to files")
    for name in sorted(set(listed.values())):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX}: {name!r} is not the name of a safetensors file in this folder"
            )
        if not os.path.isfile(folder / name):
            tensor = next(t for t, file in listed.items() if file == name)
            raise UserError(
                f"{folder / name} is missing; {INDEX} says that it holds {tensor} and others: "
                "download it again"
            )
        found = scan_file(folder / name)
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise UserError(f"{folder / name}: tensor {twice[0]} is in another file too")
        entries |= found
    for tensor, name in listed.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise UserError(f"{folder / name}: tensor {tensor} is not in it, but {INDEX} says so")
    return entries


def _no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(x.name for x in folder.glob("*") if x.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code and is never opened; convert the "
            "checkpoint to safetensors first"
        )
    return f"no {SINGLE} and no {INDEX}: not a checkpoint folder"


def scan_file(file: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file by name.

    Raises:
      UserError: it is broken or truncated.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _broken(file, "its header is cut off")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, item) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _broken(file, "its header is not that of a safetensors file") from None
    for name, entry in entries.items():
        end = entry.offset + math.prod(entry.shape) * entry.dtype.itemsize
        if end > size:
            raise _broken(file, f"tensor {name} ends at byte {end}, the file at {size}")
    return entries


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _entry(file: pathlib.Path, base: int, item: dict) -> Entry:
    shape, dtype = tuple(item["shape"]), _DTYPES[item["dtype"]]
    begin, end = item["data_offsets"]
    if any(type(x) is not int or x < 0 for x in (*shape, begin, end)):
        raise ValueError
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError
    return Entry(file, base + begin, dtype, shape)


def _broken(file: pathlib.Path, what: str) -> UserError:
    return UserError(f"{file} is truncated or damaged ({what}): download it again")


class Output(NamedTuple):
    """A tensor to be written; `get` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: pathlib.Path, outputs: Sequence[Output], shard_bytes: int) -> None:
    """Writes tensors as `model.safetensors`, or as shards of up to `shard_bytes` with an index."""
    shards = list(_shards(outputs, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {output.name: name for output in shard}
    index = {
        "metadata": {"total_size": sum(output.size for output in outputs)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX, index)


def _shards(outputs: Sequence[Output], shard_bytes: int) -> Iterator[list[Output]]:
    shard: list[Output] = []
    for output in outputs:
        if shard and sum(x.size for x in shard) + output.size > shard_bytes:
            yield shard
            shard = []
        shard.append(output)
    yield shard


def write_file(file: pathlib.Path, outputs: Sequence[Output]) -> None:
    """Writes one safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    begin = 0
    for output in outputs:
        header[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, begin + output.size],
        }
        begin += output.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            data = np.ascontiguousarray(output.get())
            if data.dtype != output.dtype or data.shape != output.shape:
                raise ValueError(f"{output.name}: {data.dtype}{data.shape} is not {output[1:3]}")
            _append(data, stream)


def _append(data: np.ndarray, stream) -> None:
    data.reshape(-1).view(np.uint8).tofile(stream)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object: download it again")
    return value


def write_json(file: pathlib.Path, value: dict) -> None:
    """Writes a JSON object for people and programs."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
