"""Files that `torch.save` wrote, read as tables of tensors; no code in them is ever run."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import CheckpointError


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .pt, .pth or .bin file; names of dictionaries within dictionaries are joined by dots.

    Raises CheckpointError for a damaged file, for one that holds more than tensors and plain values, where the message
    names what it holds and how to convert it, and for one that would take more memory than it has bytes.
    """
    parts = _parts(path)
    zipped, size = parts is not None, path.stat().st_size
    if any(part.filename.endswith("/constants.pkl") for part in parts or ()):
        raise CheckpointError(
            f"{path} is a TorchScript program, which would be run to be read; where you trust it, write its tensors "
            f"alone: torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pt')"
        )
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in parts or ()):
        raise CheckpointError(f"{path} has compressed parts, which torch.save does not write and which may expand")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of a damaged or hostile file, of nearly any kind
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors alone: {_reason(error, path, zipped)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    try:
        tensors = dict(_flat(content, ""))
    except RecursionError as error:
        raise CheckpointError(f"{path} holds dictionaries that are nested too deeply") from error
    for key, value in tensors.items():
        if not _is_whole(value):
            raise CheckpointError(f"{path}: {key[:100]} has {value.numel()} elements, which the file does not hold")
    storages = [value.untyped_storage() for value in tensors.values()]
    if sum({each.data_ptr(): each.nbytes() for each in storages}.values()) > size:
        raise CheckpointError(f"{path} asks for more memory than it has bytes, {size}")
    return tensors


def _is_whole(value: Tensor) -> bool:
    """Whether each element of a tensor is in memory of its own: not so with strides of zero, or in a sparse one."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(key, str) and isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _parts(path: Path) -> list[zipfile.ZipInfo] | None:
    """The parts of a zip file; None for another kind of file, as torch 1.5 and before wrote them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error):
        return None


def _reason(error: Exception, path: Path, zipped: bool) -> str:
    """One plain line of an unpickler's message of many."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return (
            f"it also holds {found[1]}, and unpickling such objects can run code; where you trust the file, save its "
            f"state dict alone: torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt')"
        )
    if not zipped:
        return "the file is damaged, or no checkpoint"
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"\x1b\[[0-9;]*m", "", line)
