"""The run folder: a lock for one run at a time, and removal of the folder of a run that failed at its start."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..models.checkpoint import write_atomically
from ..models.reading import CheckpointError, read_json
from .parallel import World, gather_objects
from .resume import RUN

LOCK, HOLDER = ".lock", ".holder.json"


@contextmanager
def left_clean(out: Path) -> Iterator[list[bool]]:
    """Remove a folder that was created for a run, if the run fails before it has written any result.

    Enter it before the processes of a run join, so that each of them sees the state before the folder was created. Each
    process removes the folder, since torchrun ends the others when one fails. Yields a list to which the run appends an
    item once it owns the folder; the folder of another run is not touched.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    own: list[bool] = []
    try:
        yield own
    except BaseException:  # such as invalid settings, a damaged teacher, an interrupt
        ours = {RUN, LOCK, HOLDER} if own else set()
        with suppress(OSError):  # another process was first
            if missing and {path.name for path in out.iterdir()} <= ours:
                for name in ours:
                    (out / name).unlink(missing_ok=True)
                for folder in missing:
                    folder.rmdir()
        raise


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Lock a folder within the context. The first process takes the lock, and all processes get the result.

    Raises ValueError on every process, naming the run that holds it, and OSError if the folder is not writable.
    """
    lock, refusal = FileLock(folder / LOCK), ""
    if world.rank == 0:
        try:
            if (folder / LOCK).is_symlink():  # some versions of filelock would truncate its target
                (folder / LOCK).unlink()
            lock.acquire(timeout=0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            run = {"process": os.getpid(), "machine": platform.node(), "since": now, "command": shlex.join(sys.argv)}
            write_atomically(folder / HOLDER, json.dumps(run) + "\n")
        except Timeout:
            refusal = f"out is {folder}, which another run is using: {holder_of(folder)}"
    try:
        if refusal := gather_objects(refusal)[0]:
            raise ValueError(refusal)
        yield
    finally:
        if lock.is_locked:
            (folder / HOLDER).unlink(missing_ok=True)
            with suppress(OSError):  # removed while held: a waiting process then creates a new one
                (folder / LOCK).unlink()
            lock.release()


def holder_of(folder: Path) -> str:
    """A description of the process that holds a folder."""
    try:
        found = read_json(folder / HOLDER)
    except (CheckpointError, OSError):
        return "a process that has just started"
    named = {key: str(found.get(key, "?"))[:200] for key in ("process", "machine", "since", "command")}
    return "process {process} on {machine} since {since} ({command})".format(**named)
