"""Checkpoint folders with config.json and model.safetensors, written atomically."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .reading import CheckpointError

__all__ = ["CheckpointError", "save_model", "write_atomically"]

LITTLE = 1 << 16  # bytes; a disk with less free space counts as full
CONFIG, WEIGHTS, PREPROCESSING = "config.json", "model.safetensors", "preprocessor_config.json"


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` atomically. Raises OSError if it cannot be written."""
    # file names may hold bytes that are not UTF-8, which Python keeps as lone surrogates
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that is renamed to it when complete, with the permissions of a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def line_of(error: BaseException) -> str:
    """The first line of an error, without PyTorch's advice to load with weights_only=False."""
    lines = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")
    said = (line for line in lines if line.strip() and not line.startswith("Weights only load failed"))
    return re.sub(r"\x1b\[[0-9;]*m", "", next(said, type(error).__name__)).strip()


def reason_of(error: BaseException, folder: Path) -> str:
    """One-line description of an error while writing to a folder, which mentions a full disk."""
    text = line_of(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    with suppress(OSError):  # PyTorch and safetensors do not always give the reason
        full = full or shutil.disk_usage(folder).free < LITTLE
    return f"disk full: {text}" if full else text


def save_model(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the weights (`saved_state`), then the config, which marks the folder as a checkpoint. Raises OSError."""
    folder = Path(folder)
    with _replacing(folder / WEIGHTS) as temporary:
        try:
            save_file(dict(state), temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS} could not be written: {reason_of(error, folder)}") from error
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
