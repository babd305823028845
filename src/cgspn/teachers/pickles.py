"""Files that `torch.save` wrote, read as tables of tensors; no code in them is ever run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import CheckpointError


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .pt, .pth or .bin file; names of dictionaries within dictionaries are joined by dots.

    Raises CheckpointError for a damaged file, and for one that holds more than tensors and plain values: the message
    names what it holds and how to convert it.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped and _is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript program, which would be run to be read; where you trust it, write its tensors "
            f"alone: torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pt')"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors alone: {_reason(error, path, zipped)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict")
    return dict(_flat(content, ""))


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(key, str) and isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


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
