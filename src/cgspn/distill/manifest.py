"""Folders with checksums of their files, so that damage is found before anything in them is used."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..models.checkpoint import write_atomically
from ..models.reading import CheckpointError, read_json, read_json_value
from ..terminal import warn

NAME = "manifest.json"
MOST_RECORD = 1 << 30  # bytes

Entries = dict[str, dict[str, Any]]
"""Size and SHA-256 of files, by name."""


def entries_of(folder: Path, pattern: str = "*") -> Entries:
    """Sizes and checksums of the files in a folder, without its manifest. Raises OSError if a file cannot be read."""
    found: Entries = {}
    for path in sorted(folder.glob(pattern)):
        if path.name != NAME and path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def write_manifest(folder: Path, entries: Entries, steps: int) -> None:
    """Write the manifest of a folder that holds the result of so many steps. Raises OSError."""
    write_atomically(folder / NAME, json.dumps({"counts": {"steps": steps}, "files": entries}, indent=1) + "\n")


def check_manifest(folder: Path, record: str, steps: int | None = None) -> list[dict[str, float]]:
    """Check a folder against its manifest. Returns the losses of each step, from its file `record`.

    Raises CheckpointError for the first file that is missing, changed, a link or not in the manifest, and for another
    number of steps. Raises OSError if a file cannot be read.
    """
    if folder.is_symlink() or not (folder / NAME).is_file():
        raise CheckpointError(f"it has no {NAME}")
    manifest = read_json(folder / NAME)
    files, counts = manifest.get("files"), manifest.get("counts")
    if not isinstance(files, dict) or not files or not isinstance(counts, dict):
        raise CheckpointError(f"its {NAME} names no files")
    if steps is not None and counts.get("steps") != steps:
        raise CheckpointError(f"its {NAME} is of steps {counts.get('steps')!r}, not {steps}")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{name} is missing, or a link")
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, which differs from what was written")
    if unknown := {path.name for path in folder.iterdir()} - files.keys() - {NAME}:
        raise CheckpointError(f"it holds {min(unknown)}, which is not in its {NAME}")
    for name, entry in entries_of(folder).items():
        if entry["sha256"] != files[name].get("sha256"):
            raise CheckpointError(f"{name} was changed: its checksum differs")
    return read_steps(folder / record, counts.get("steps"))


def read_steps(path: Path, steps: Any) -> list[dict[str, float]]:
    """The recorded losses of all steps so far. Raises CheckpointError if the file holds anything else."""
    found = read_json_value(path, MOST_RECORD)
    records = found if isinstance(found, list) and len(found) == steps else [None]
    if not all(isinstance(each, dict) and all(isinstance(v, (int, float)) for v in each.values()) for each in records):
        raise CheckpointError(f"{path.name} does not hold the losses of {steps} steps")
    return found


def set_aside(folder: Path, message: str) -> None:
    """Report damage in a folder and rename it, so that it is not used again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    with suppress(OSError):  # otherwise it is checked and reported again
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    warn(f"{message} ({folder})")
