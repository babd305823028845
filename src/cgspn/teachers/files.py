"""Weight files as tables of tensors that are read one at a time: a conversion never holds a checkpoint twice."""

from __future__ import annotations

import struct
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..models.reading import CheckpointError, read_json, shown
from ..models.weights import Stored, Weights, finite, listed, open_safetensors

__all__ = ["Stored", "Weights", "open_weights"]

_WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher")
_PREFIXES = ("module.", "_orig_mod.")


def open_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, or of a sharded one's index, and its metadata.

    Raises CheckpointError for another kind of file, a truncated one, or one that holds more than tensors.
    """
    indexed = path.name.endswith(".index.json")
    weights, metadata = (_open_shards(path), {}) if indexed else _open_file(path)
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights, metadata


def _open_file(path: Path) -> tuple[Weights, dict[str, str]]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _open_pickle(path), {}
    raise CheckpointError(f"{path} is no weight file; expected .safetensors, .pt, .pth or .bin")


def _open_shards(index: Path) -> Weights:
    """The tensors of the files beside an index, each from the file that it is said to be in."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{index} has no weight_map from names of tensors to names of files")
    beside = {index.parent.resolve(), index.resolve().parent}  # the latter: the hub's cache links to a folder of files
    weights: Weights = {}
    for name in sorted(set(named.values())):
        shard = index.parent / name
        if Path(name).name != name or name.endswith(".json"):
            raise CheckpointError(f"{index} names {shown(name)}; accepted: weight files of its own folder")
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is not beside it")
        if shard.resolve().parent not in beside:
            raise CheckpointError(f"{index} names {shown(name)}, a link to another folder; accepted: files of its own")
        held = _open_file(shard)[0]
        told = {key for key, file in named.items() if file == name}
        if told != held.keys():
            raise CheckpointError(f"{shard} and {index} do not agree on {listed(told ^ held.keys())}")
        weights |= held
    return weights


def _open_pickle(path: Path) -> Weights:
    """Tensors by name. Nothing of a pickle is run, and nothing expands: not compressed parts, not strides of zero."""
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a damaged or hostile file: nearly any kind
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a file of tensors alone: {reason}") from error
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, value in tensors.items():
        if not _is_plain(value):
            raise CheckpointError(f"{path}: {key[:100]} has {value.numel()} elements that the file does not hold")
    storages = [value.untyped_storage() for value in tensors.values()]
    if sum({each.data_ptr(): each.nbytes() for each in storages}.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} asks for more memory than the file holds")
    return {key: Stored(tuple(value.shape), partial(_copied, value, path, key)) for key, value in tensors.items()}


def _check_zip(path: Path) -> None:
    """Raise CheckpointError unless a file is a zip as torch.save writes it: nothing in it compressed."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors alone: it is no zip file as torch.save writes it; the file is "
            "damaged, older than torch 1.6 or no checkpoint"
        ) from error
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
        raise CheckpointError(f"{path} holds compressed parts, which torch.save does not write")


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor's elements are in memory, each once."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _copied(value: Tensor, path: Path, key: str) -> Tensor:
    return finite(value.clone(), path, key)
