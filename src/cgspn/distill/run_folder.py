"""The folder of a run: one run at a time, and stages that are whole or not there."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..models.checkpoint import write_atomically
from ..models.reading import CheckpointError, read_json, read_json_value
from .manifest import DamageError, check_manifest, entries_of, write_manifest
from .parallel import World, gather_objects
from .snapshots import MOST_RECORD, set_aside

LOCK, HOLDER = ".lock", ".holder.json"
LOSSES, THROUGHPUT = "losses.json", "throughput.json"


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Hold a folder for the time of the context; the first process does, and all learn whether it could.

    Raises ValueError, on every process, naming the run that holds it; OSError where nothing can be written.
    """
    lock, refusal = FileLock(folder / LOCK), ""
    if world.rank == 0:
        try:
            lock.acquire(timeout=0)
            write_atomically(folder / HOLDER, json.dumps(_this_run()) + "\n")
        except Timeout:
            refusal = f"out is {folder}, where another run is going on: {holder_of(folder)}"
    try:
        if refusal := gather_objects(refusal)[0]:
            raise ValueError(refusal)
        yield
    finally:
        if lock.is_locked:
            (folder / HOLDER).unlink(missing_ok=True)
            with suppress(OSError):  # while it is held: whoever waits for it finds that it is gone, and makes another
                (folder / LOCK).unlink()
            lock.release()


def _this_run() -> dict[str, Any]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"process": os.getpid(), "machine": platform.node(), "since": now, "command": shlex.join(sys.argv)}


def holder_of(folder: Path) -> str:
    """Who holds a folder, in words."""
    try:
        found = read_json(folder / HOLDER)
    except (CheckpointError, OSError):
        return "a process that has just begun"
    process, machine, since, command = (
        str(found.get(key, "?"))[:200] for key in ("process", "machine", "since", "command")
    )
    return f"process {process} on {machine} since {since} ({command})"


def finish_stage(folder: Path, losses: list[dict[str, float]], throughput: dict[str, Any]) -> None:
    """Note that a stage whose student is in `folder` is done. Raises OSError."""
    write_atomically(folder / THROUGHPUT, json.dumps(throughput))
    write_atomically(folder / LOSSES, json.dumps(losses))
    write_manifest(folder, entries_of(folder), {"steps": len(losses)})


def finished_stage(folder: Path, world: World) -> tuple[list[dict[str, float]], dict[str, Any]] | None:
    """Losses and throughput of a stage that is done and whole; None for others. All processes call this.

    One that is damaged is named on standard error and moved aside: the stage is run again.
    """
    found: Any = None
    if world.rank == 0 and (folder / LOSSES).exists():
        try:
            steps = check_manifest(folder).get("steps")
            losses = read_json_value(folder / LOSSES, MOST_RECORD)
            if not isinstance(losses, list) or len(losses) != steps:
                raise DamageError(f"{LOSSES} is not of {steps} steps")
            found = losses, read_json(folder / THROUGHPUT)
        except (DamageError, CheckpointError, OSError) as error:
            set_aside(folder, f"stage {folder.name} is damaged and run again: {error}")
    return gather_objects(found)[0]
