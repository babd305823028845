"""Checks that several commands run before they start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..console import writable_folder
from ..distill import SizeRange
from ..models.reading import CheckpointError

Loaded = TypeVar("Loaded")


def loaded(load: Callable[..., Loaded], name: str, source: str | Path, **options: Any) -> Loaded:
    """The result of `load` for the source in argument `name`. Errors of a wrong source name the argument."""
    try:
        return load(source, **options)
    except (CheckpointError, FileNotFoundError, NotADirectoryError) as error:
        raise type(error)(f"{error} (given as {name})") from error


def check_folder(path: Path, name: str) -> Path:
    """Check that results can be written to a folder, before the long work starts. The folder is created later.

    A folder created by this check is removed again, so that a failed command leaves nothing behind. Raises ValueError
    naming the argument `name`.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        return writable_folder(path, name)
    finally:
        for folder in missing:
            with suppress(OSError):  # not created, or already used by another process
                folder.rmdir()


def check_free(paths: Iterable[Path], name: str, overwrite: bool) -> None:
    """Raise ValueError, naming the argument `name`, if files at these paths would be overwritten."""
    held = [path for path in paths if os.path.lexists(path)]
    if held and not overwrite:
        found, folder = ", ".join(path.name for path in held), held[0].parent
        where = f"{folder}, which holds" if folder != Path() else "this folder, which holds"
        raise ValueError(f"{name} is {where} {found}; give another {name}, or --overwrite")


def check_file(path: Path, name: str, kind: str, overwrite: bool) -> None:
    """Raise ValueError, naming the argument `name`, unless a file with such a suffix can be written at `path`."""
    if path.is_dir():
        raise ValueError(f"{name} is {path}, a folder; expected {kind}")
    check_folder(path.parent, name)
    check_free([path], name, overwrite)


def device_of(device: str) -> str:
    """ "cpu" or "cuda"; for "auto" the GPU if there is one. Raises ValueError if there is no GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA GPU here; accepted: cpu")
    return device


def range_of(start: SizeRange | None, arguments: list[str]) -> SizeRange | None:
    """The range whose fields are options of a command: the default one if there is none and an option sets a field."""
    wanted = any(argument.startswith("--config.sizes.") or argument == "--help-all" for argument in arguments)
    return start or (SizeRange() if wanted else None)


def mixed_sizes(start: SizeRange | None, sizes: tuple[int, int] | None, aspects: tuple[float, ...]) -> SizeRange:
    """The range from `--sizes SMALLEST LARGEST` and `--aspects`, with all other fields as in `start`.

    Raises ValueError for an empty range.
    """
    start = start or SizeRange()
    smallest, largest = sizes or (start.smallest, start.largest)
    return replace(start, smallest=smallest, largest=largest, aspects=aspects or start.aspects)
