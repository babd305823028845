"""Checksums of the files in a folder, to detect damage before a file is used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.checkpoint import write_atomically
from ..models.reading import CheckpointError, read_json, read_json_value

NAME = "manifest.json"
MOST_RECORD = 1 << 30  # bytes

Entries = dict[str, dict[str, Any]]
"""Size and SHA-256 of files, by name."""


class DamageError(ValueError):
    """Raised if a folder does not match its manifest. The message names the file and the reason."""


def entries_of(folder: Path, pattern: str = "*") -> Entries:
    """Sizes and checksums of the files in a folder, without its manifest. Raises OSError if a file cannot be read."""
    found: Entries = {}
    for path in sorted(folder.glob(pattern)):
        if path.name != NAME and path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def write_manifest(folder: Path, entries: Entries, counts: Mapping[str, int]) -> None:
    """Write the manifest of a folder, with the given counts of its contents. Raises OSError."""
    write_atomically(folder / NAME, json.dumps({"counts": dict(counts), "files": entries}, indent=1) + "\n")


def check_manifest(folder: Path, counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Check a folder against its manifest, and return the recorded counts.

    Raises DamageError for the first file that is missing, changed, a link or not in the manifest, and if the counts
    differ from `counts`. Raises OSError if a file cannot be read.
    """
    if folder.is_symlink() or not (folder / NAME).is_file():
        raise DamageError(f"it has no {NAME} of its own")
    try:
        manifest = read_json(folder / NAME)
    except CheckpointError as error:
        raise DamageError(str(error)) from error
    files, noted = manifest.get("files"), manifest.get("counts")
    if not isinstance(files, dict) or not files or not isinstance(noted, dict):
        raise DamageError(f"its {NAME} names no files")
    for name, value in (counts or {}).items():
        if noted.get(name) != value:
            raise DamageError(f"its {NAME} is of {name} {noted.get(name)!r}, not {value}")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise DamageError(f"{name} is missing, or a link")
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            raise DamageError(f"{name} has {path.stat().st_size} bytes, which differs from what was written")
    if unknown := {path.name for path in folder.iterdir()} - files.keys() - {NAME}:
        raise DamageError(f"it holds {min(unknown)}, which is not of it")
    for name, entry in entries_of(folder).items():
        if entry["sha256"] != files[name].get("sha256"):
            raise DamageError(f"{name} was changed: its checksum differs")
    return noted


def read_steps(path: Path, steps: Any) -> list[dict[str, float]]:
    """The records of all steps so far. Raises DamageError if the file holds anything else."""
    try:
        found = read_json_value(path, MOST_RECORD)
    except CheckpointError as error:
        raise DamageError(str(error)) from error
    records = found if isinstance(found, list) and len(found) == steps else [None]
    if not all(isinstance(each, dict) and all(isinstance(v, (int, float)) for v in each.values()) for each in records):
        raise DamageError(f"{path.name} is no record of {steps} steps")
    return found
