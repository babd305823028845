"""The folder of a run: one run at a time, and none that a refused run has made."""

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
    """Take a folder away again that was made for a run which ended before it left anything in it.

    Entered before the processes of a run meet, so that each sees what was there before any of them made the folder; and
    each takes it away, since torchrun ends the others when one is refused. Yields a list to which the run adds an item
    once the folder is its own: that of another run is left alone.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    own: list[bool] = []
    try:
        yield own
    except BaseException:  # a refusal, a teacher that is damaged, an interruption
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
    """Hold a folder for the time of the context; the first process does, and all learn whether it could.

    Raises ValueError, on every process, naming the run that holds it; OSError where nothing can be written.
    """
    lock, refusal = FileLock(folder / LOCK), ""
    if world.rank == 0:
        try:
            if (folder / LOCK).is_symlink():  # to a file that some versions of filelock would empty
                (folder / LOCK).unlink()
            lock.acquire(timeout=0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            run = {"process": os.getpid(), "machine": platform.node(), "since": now, "command": shlex.join(sys.argv)}
            write_atomically(folder / HOLDER, json.dumps(run) + "\n")
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


def holder_of(folder: Path) -> str:
    """Who holds a folder, in words."""
    try:
        found = read_json(folder / HOLDER)
    except (CheckpointError, OSError):
        return "a process that has just begun"
    named = {key: str(found.get(key, "?"))[:200] for key in ("process", "machine", "since", "command")}
    return "process {process} on {machine} since {since} ({command})".format(**named)
