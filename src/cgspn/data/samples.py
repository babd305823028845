"""Training images on disk: the interface of a source, and folders."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .folder import list_folder
from .opening import MOST_TEXT, read_bytes
from .skipped import Skipped


@dataclass(frozen=True)
class Sample:
    """One stored image: the bytes of its file, with caption, class name and class number if known."""

    encoded: bytes
    caption: str = ""
    class_name: str = ""
    label: int = -1


class SampleSource(Protocol):
    """Protocol for random access to samples in a fixed order. Every worker process gets a copy."""

    @property
    def source(self) -> str:
        """The source as given by the user."""

    @property
    def problems(self) -> Skipped:
        """Missing or damaged shards."""

    def __len__(self) -> int:
        """Number of samples."""

    def name(self, number: int) -> str:
        """Name of a sample, for messages."""

    def read(self, number: int) -> Sample:
        """Read a sample. Raises OSError or ValueError if it cannot be read."""

    def digest(self) -> str:
        """A hash of the names in order. A run resumes only if its source has the same hash."""


@dataclass(frozen=True, eq=False)
class SampleFolder:
    """Images in a folder, either directly or in one sub-folder per class. The caption of `1.jpg` is in `1.txt` or
    `1.json`.

    files: paths, in order. labels: class number of each file, or -1. class_names: names of the sub-folders; empty for a
    flat folder.
    """

    source: str
    files: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    class_names: tuple[str, ...]
    problems: Skipped = field(default_factory=Skipped)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        """See `SampleSource`."""
        return self.files[number]

    def read(self, number: int) -> Sample:
        """See `SampleSource`."""
        path, label = Path(self.files[number]), self.labels[number]
        text, data = (_optional(path.with_suffix(ending)) for ending in (".txt", ".json"))
        class_name = self.class_names[label] if label >= 0 else ""
        return Sample(read_bytes(path), caption_of(text, data), class_name, label)

    def digest(self) -> str:
        """See `SampleSource`. It does not depend on the folder's location."""
        return digest_of(os.fsencode(os.path.relpath(file, self.source)) for file in self.files)


def open_folder(path: Path) -> SampleFolder:
    """Open a folder of images. If there are images outside of its sub-folders, it has no classes.

    Raises FileNotFoundError or NotADirectoryError like `list_folder`.
    """
    names, files = list_folder(path, mixed=True)
    flat = any(file.parent == path for file, _ in files)
    paths, labels = tuple(str(file) for file, _ in files), tuple(-1 if flat else label for _, label in files)
    return SampleFolder(str(path), paths, labels, () if flat else names)


def caption_of(text: bytes | None, data: bytes | None) -> str:
    """The caption in a sample's .txt, or in its .json under "caption" or "text"; "" if missing or damaged."""
    if text is not None and (caption := text.decode(errors="replace").strip()):
        return caption
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return ""
    if isinstance(found, dict):
        for key in ("caption", "text"):
            if isinstance(value := found.get(key), str) and value.strip():
                return value.strip().encode(errors="replace").decode()  # JSON may hold lone surrogates
    return ""


def digest_of(names: Iterable[bytes]) -> str:
    """A short hash of names in order."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in names:
        hashed.update(name + b"\0")
    return hashed.hexdigest()


def _optional(path: Path) -> bytes | None:
    return read_bytes(path, MOST_TEXT) if path.is_file() else None
