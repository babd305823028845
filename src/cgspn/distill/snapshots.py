"""Snapshots of a training stage on disk. They are written atomically and can be read by any number of processes."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..models.checkpoint import line_of, reason_of
from ..terminal import warn
from .dcp_reader import SafeReader, read_index
from .manifest import DamageError, Entries, check_manifest, entries_of, read_steps, write_manifest
from .parallel import Item, barrier, gather_objects, rank

RECORD = "record.json"
KEPT = 2  # the last one, and the previous one in case the machine dies during a removal


class SnapshotError(RuntimeError):
    """Raised if a snapshot could not be written; the message names the last complete one."""


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one stage, in folders named by finished steps; one every `every` steps (0: none)."""

    folder: Path
    every: int

    def due(self, done: int) -> bool:
        """Whether a snapshot is due after `done` steps."""
        return bool(self.every) and done % self.every == 0

    def newest(self) -> int:
        """The step of the newest snapshot, damaged or not; 0 if there is none."""
        return max(self._steps(), default=0)

    def newest_whole(self) -> int:
        """The step of the newest undamaged snapshot; 0 if there is none. All processes must call this.

        Damaged snapshots are reported on standard error and renamed.
        """
        return gather_objects(next(self._whole(), 0) if rank() == 0 else 0)[0]

    def _whole(self) -> Iterator[int]:
        for steps in sorted(self._steps(), reverse=True):
            folder = self._folder(steps)
            try:
                check_snapshot(folder, steps)
            except (DamageError, OSError) as error:
                set_aside(folder, f"the snapshot after step {steps} is damaged and not used: {error}")
            else:
                yield steps

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.glob("[0-9]*") if path.is_dir()]
        return [int(name) for name in names if re.fullmatch(r"[0-9]{8}", name)]

    def _folder(self, steps: int, ending: str = "") -> Path:
        return self.folder / f"{steps:08d}{ending}"

    def save(self, done: int, tensors: dict[str, Tensor], record: list[dict[str, float]]) -> None:
        """Write a snapshot, then remove old ones. All processes must call this.

        done: number of finished steps. tensors: by name; they may be sharded (DTensor) or exist on only some processes.
        record: of each step; that of the first process is written as JSON.

        Raises SnapshotError on every process if the disk is full or the folder is not writable.
        """
        whole, partial, first = self._folder(done), self._folder(done, ".partial"), rank() == 0

        def begin() -> None:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / RECORD).write_text(json.dumps(record))

        def write() -> Entries:
            with _alone_unwarned():
                save(dict(tensors), checkpoint_id=partial, no_dist=not dist.is_initialized())
            # each process checks its own files, which takes as long as reading them
            return entries_of(partial, f"__{rank()}_*")

        def finish() -> None:
            if first:
                entries = entries_of(partial, ".*") | entries_of(partial, RECORD)
                for each in written:
                    entries |= each
                count = len(read_index(partial).state_dict_metadata)
                write_manifest(partial, entries, {"steps": done, "tensors": count})

        self._together(done, begin)
        written = self._together(done, write)
        self._together(done, finish)
        if first:
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(partial, whole)
            for old in sorted(self._steps())[:-KEPT]:
                shutil.rmtree(self._folder(old), ignore_errors=True)
        barrier()

    def _together(self, done: int, work: Callable[[], Item]) -> list[Item]:
        """Gather the results of `work` from all processes. Raises SnapshotError on every process if it fails on any."""
        results, failure = list[Item](), ""
        try:
            results.append(work())
        except (OSError, RuntimeError, DamageError, CheckpointException) as error:
            failure = reason_of(_cause(error), self.folder)
        gathered = gather_objects((results, failure))
        if failures := [failure for _, failure in gathered if failure]:
            if rank() == 0:
                shutil.rmtree(self._folder(done, ".partial"), ignore_errors=True)
            last = self.newest()
            raise SnapshotError(
                f"the snapshot after step {done} could not be written to {self.folder} ({failure or failures[0]}); "
                + (f"the run can resume from the one after step {last}" if last else "there is none before it")
            )
        return [result for each, _ in gathered for result in each]

    def load(self, done: int, tensors: dict[str, Tensor]) -> list[dict[str, float]]:
        """Fill `tensors` from the snapshot after `done` steps and return its record. Runs no code from it.

        Raises SnapshotError if a tensor is missing or has another shape.
        """
        folder = self._folder(done)
        try:
            with _alone_unwarned():
                load(tensors, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
            return read_steps(folder / RECORD, done)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, CheckpointException) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {line_of(_cause(error))}") from error

    def clear(self) -> None:
        """Remove all snapshots of a finished stage."""
        barrier()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other stages may still need it
                self.folder.parent.rmdir()


def check_snapshot(folder: Path, steps: int) -> None:
    """Raise DamageError if the snapshot after `done` steps is damaged."""
    counts = check_manifest(folder, {"steps": steps})
    if counts.get("tensors") != len(read_index(folder).state_dict_metadata):
        raise DamageError("it has fewer or more tensors than were written")
    read_steps(folder / RECORD, steps)


def set_aside(folder: Path, message: str) -> None:
    """Report damage in a folder and rename it, so that it is not used again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    with suppress(OSError):  # otherwise it is checked and reported again
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    warn(f"{message} ({folder})")


@contextmanager
def _alone_unwarned() -> Iterator[None]:
    """Suppress PyTorch's warning about checkpoints without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: BaseException) -> BaseException:
    """The first underlying error in PyTorch's combined error."""
    if isinstance(error, CheckpointException) and error.failures:
        cause: Any = next(iter(error.failures.values()))
        return cause[0] if isinstance(cause, tuple) else cause
    return error
