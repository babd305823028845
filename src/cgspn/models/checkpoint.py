"""Checkpoint folders: config.json + model.safetensors, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .reading import CheckpointError

__all__ = ["CheckpointError", "save_model", "write_atomically"]

LITTLE = 1 << 16  # bytes: a disk with no more is full
CONFIG, WEIGHTS, PREPROCESSING = "config.json", "model.safetensors", "preprocessor_config.json"


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data`; an interrupted call leaves what was there. Raises OSError if it cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            # names of files may hold bytes that are not UTF-8, which Python keeps as lone surrogates
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        _publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _publish(temporary: str, path: Path) -> None:
    """Give a finished file its name, and the rights of any new file: mkstemp's are for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)


def line_of(error: BaseException) -> str:
    """An error in one line: the first, without the advice that PyTorch gives before, to read files without limits."""
    lines = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")
    said = (line for line in lines if line.strip() and not line.startswith("Weights only load failed"))
    return re.sub(r"\x1b\[[0-9;]*m", "", next(said, type(error).__name__)).strip()


def reason_of(error: BaseException, folder: Path) -> str:
    """An error in writing to a folder in one line, which says so if the disk is full."""
    text = line_of(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    with suppress(OSError):  # PyTorch and safetensors do not always say why
        full = full or shutil.disk_usage(folder).free < LITTLE
    return f"disk full: {text}" if full else text


def save_model(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the weights, then the config that makes the folder a checkpoint. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{WEIGHTS}.")
    os.close(handle)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, metadata={"format": "pt"})
        _publish(temporary, folder / WEIGHTS)
    except SafetensorError as error:
        reason = reason_of(error, folder)
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{folder / WEIGHTS} could not be written: {reason}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
