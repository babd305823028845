"""Checkpoint folders: config.json + model.safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS, PREPROCESSING = "config.json", "model.safetensors", "preprocessor_config.json"
INDEX = f"{WEIGHTS}.index.json"  # beside weights in several files, as transformers writes them
HF_PREFIX = "encoder."  # of an encoder's weights in the models of transformers


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message says what was expected and what was found."""


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data`; an interrupted call leaves what was there. Raises OSError if it cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
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


def save_model(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the weights, then the config that makes the folder a checkpoint. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{WEIGHTS}.")
    os.close(handle)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, metadata={"format": "pt"})
        _publish(temporary, folder / WEIGHTS)
    except SafetensorError as error:  # a full disk, most likely
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and float32 weights of a checkpoint folder, as this library or transformers wrote it.

    Raises CheckpointError if it is none, or if a file in it is missing or truncated.
    """
    folder = Path(folder)
    index = folder / INDEX
    files = {CONFIG} if index.is_file() and not (folder / WEIGHTS).is_file() else {CONFIG, WEIGHTS}
    try:
        if WEIGHTS not in files:
            files |= set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise CheckpointError(f"{folder} has no {' and no '.join(missing)}; expected a checkpoint folder with both")
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        state: dict[str, Tensor] = {}
        for name in sorted(files - {CONFIG}):
            state |= load_file(folder / name)
    except (json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a readable checkpoint: {error}") from error
    if all(key.startswith(HF_PREFIX) for key in state):
        state = {key.removeprefix(HF_PREFIX): value for key, value in state.items()}
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
