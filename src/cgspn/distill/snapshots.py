"""Snapshots of a training stage on disk: whole or not there, and readable by any number of processes."""

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
KEPT = 2  # the last one, and the one before in case the machine dies while an old one is removed


class SnapshotError(RuntimeError):
    """Raised if a snapshot could not be written; the message names the last complete one."""


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one stage, in folders named by the number of steps done; `every` so many, 0 for none."""

    folder: Path
    every: int

    def due(self, done: int) -> bool:
        """Whether one belongs after `done` steps."""
        return bool(self.every) and done % self.every == 0

    def newest(self) -> int:
        """Steps done by the newest snapshot, whether it is whole or not; 0 if there is none."""
        return max(self._steps(), default=0)

    def newest_whole(self) -> int:
        """Steps done by the newest snapshot that is what was written; 0 if there is none. All processes call this.

        Those that are damaged are named on standard error and moved aside.
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
        """Write one, then remove those that are no longer needed. All processes call this.

        done: steps done. tensors: by name; sharded ones (DTensor) and ones that only some processes have are put
        together on loading. record: of each of the steps; the first process's goes into JSON beside them.

        Raises SnapshotError, on every process, if the disk is full or the folder cannot be written.
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
            # each process looks at its own files, which takes as long as reading them
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
        """What `work` returns on each process. Raises SnapshotError, on every process, if it fails on any."""
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
                + (f"the run can go on from the one after step {last}" if last else "there is none before it")
            )
        return [result for each, _ in gathered for result in each]

    def load(self, done: int, tensors: dict[str, Tensor]) -> list[dict[str, float]]:
        """Fill `tensors`, in place, from the snapshot after `done` steps; returns its record. No code of it is run.

        Raises SnapshotError if the snapshot does not hold one of them, or holds it in another shape.
        """
        folder = self._folder(done)
        try:
            with _alone_unwarned():
                load(tensors, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
            return read_steps(folder / RECORD, done)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, CheckpointException) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {line_of(_cause(error))}") from error

    def clear(self) -> None:
        """Remove all of them: the stage is done."""
        barrier()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other stages may still need it
                self.folder.parent.rmdir()


def check_snapshot(folder: Path, steps: int) -> None:
    """Raise DamageError unless a snapshot is what was written after so many steps."""
    counts = check_manifest(folder, {"steps": steps})
    if counts.get("tensors") != len(read_index(folder).state_dict_metadata):
        raise DamageError("it does not hold as many tensors as were written")
    read_steps(folder / RECORD, steps)


def set_aside(folder: Path, message: str) -> None:
    """Report what is wrong with a folder and rename it so that it is not used again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    with suppress(OSError):  # what cannot be renamed is found, checked and named again
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    warn(f"{message} ({folder})")


@contextmanager
def _alone_unwarned() -> Iterator[None]:
    """Without the warning that a process is taken to be alone, which PyTorch gives even to those that say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: BaseException) -> BaseException:
    """What a process failed of, of an error that PyTorch has gathered."""
    if isinstance(error, CheckpointException) and error.failures:
        cause: Any = next(iter(error.failures.values()))
        return cause[0] if isinstance(cause, tuple) else cause
    return error
