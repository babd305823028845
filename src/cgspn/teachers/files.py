"""Weight files as tables of tensors that are read one at a time: a conversion never holds a checkpoint twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import CheckpointError
from .pickles import read_pickle

_DTYPES = {
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


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Weights = dict[str, Stored]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file holds none."""
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def open_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, or of a sharded one's index, and its metadata.

    Raises CheckpointError for another kind of file, a truncated one, or one that holds more than tensors.
    """
    if path.name.endswith(".index.json"):
        weights: Weights = {}
        shards = sorted(set(read_json(path).get("weight_map", {}).values()))
        for shard in shards:
            if not (path.parent / shard).is_file():
                raise CheckpointError(f"{path} names the shard {shard}, which is not beside it")
            weights |= open_weights(path.parent / shard)[0]
        return weights, {}
    if path.suffix == ".safetensors":
        weights, metadata = _open_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        tensors, metadata = read_pickle(path), {}
        weights = {key: Stored(tuple(value.shape), partial(Tensor.clone, value)) for key, value in tensors.items()}
    else:
        raise CheckpointError(f"{path} is no weight file; expected .safetensors, .pt, .pth or .bin")
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    return weights, metadata


def _open_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """Read straight into memory that PyTorch owns: a map of the file would count a second time until it is closed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} has {size} bytes; it is truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    metadata = header.pop("__metadata__", None) or {}
    try:
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        weights = {
            key: Stored(tuple(entry["shape"]), partial(_read, path, 8 + length + entry["data_offsets"][0], entry))
            for key, entry in header.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged") from error
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes; its header describes {expected}: it is truncated or damaged")
    return weights, metadata


def _read(path: Path, start: int, entry: dict[str, Any]) -> Tensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path} holds tensors of type {entry['dtype']}; accepted: {', '.join(_DTYPES)}")
    tensor = torch.empty(entry["shape"], dtype=dtype)
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    room = memoryview(values)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(room) != len(room):
            raise CheckpointError(f"{path} ended while it was read")
    return tensor
