"""Snapshots of a training stage on disk: whole or not there, and readable by any number of processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..models.checkpoint import line_of, reason_of
from ..terminal import warn
from .dcp_reader import SafeReader, read_index
from .manifest import DamageError, Entries, check_manifest, entries_of, read_steps, write_manifest
from .parallel import barrier, gather_objects

RECORD = "record.json"
KEPT = 2  # the last one, and the one before in case the machine dies while an old one is removed


class SnapshotError(RuntimeError):
    """Raised if a snapshot could not be written; the message names the last complete one."""


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one stage, in folders named by the number of steps done.

    Attributes:
        folder: theirs alone.
        every: steps between two of them; 0 for none.
    """

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
        found = [0]
        if self._first():
            for steps in sorted(self._steps(), reverse=True):
                folder = self.folder / f"{steps:08d}"
                try:
                    check_snapshot(folder, steps)
                except (DamageError, OSError) as error:
                    set_aside(folder, f"the snapshot after step {steps} is damaged and not used: {error}")
                    continue
                found = [steps]
                break
        return gather_objects(found)[0][0]

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.glob("[0-9]*") if path.is_dir()]
        return [int(name) for name in names if re.fullmatch(r"[0-9]{8}", name)]

    def _first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def save(self, done: int, tensors: dict[str, Tensor], record: list[dict[str, float]]) -> None:
        """Write one, then remove those that are no longer needed. All processes call this.

        Args:
            done: steps done.
            tensors: by name; sharded ones (DTensor) and ones that only some processes have are put together on
                loading.
            record: of each of the steps; the first process's goes into JSON beside them.

        Raises SnapshotError, on every process, if the disk is full or the folder cannot be written.
        """
        whole, partial = self.folder / f"{done:08d}", self.folder / f"{done:08d}.partial"
        failure = ""
        first = self._first()
        try:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / RECORD).write_text(json.dumps(record))
        except OSError as error:
            failure = reason_of(error, self.folder)
        mine: Entries = {}
        if not _any(failure):
            try:
                with _alone_unwarned():
                    save(dict(tensors), checkpoint_id=partial, no_dist=not dist.is_initialized())
                # each process looks at its own files, which takes as long as reading them
                mine = entries_of(partial, f"__{dist.get_rank() if dist.is_initialized() else 0}_*")
            except (OSError, RuntimeError, CheckpointException) as error:
                failure = reason_of(_cause(error), self.folder)
        every = gather_objects(mine)
        if not _any(failure) and first:
            try:
                entries = entries_of(partial, ".*") | entries_of(partial, RECORD)
                for each in every:
                    entries |= each
                count = len(read_index(partial).state_dict_metadata)
                write_manifest(partial, entries, {"steps": done, "tensors": count})
            except (OSError, DamageError) as error:
                failure = reason_of(error, self.folder)
        if _any(failure):
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            last = self.newest()
            raise SnapshotError(
                f"the snapshot after step {done} could not be written to {self.folder} ({failure or 'other process'}); "
                + (f"the run can go on from the one after step {last}" if last else "there is none before it")
            )
        if first:
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(partial, whole)
            for old in sorted(self._steps())[:-KEPT]:
                shutil.rmtree(self.folder / f"{old:08d}", ignore_errors=True)
        barrier()

    def load(self, done: int, tensors: dict[str, Tensor]) -> list[dict[str, float]]:
        """Fill `tensors`, in place, from the snapshot after `done` steps; returns its record. No code of it is run.

        Raises SnapshotError if the snapshot does not hold one of them, or holds it in another shape.
        """
        folder = self.folder / f"{done:08d}"
        try:
            with _alone_unwarned():
                load(tensors, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
            return read_steps(folder / RECORD, done)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, CheckpointException) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {line_of(_cause(error))}") from error

    def clear(self) -> None:
        """Remove all of them: the stage is done."""
        barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
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
    """Say what is wrong with a folder, and give it a name by which it is not found again."""
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


def _any(failure: str) -> bool:
    """Whether the step failed on any process, so that all leave together."""
    if not dist.is_initialized():
        return bool(failure)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    flag = torch.tensor(float(bool(failure)), device=device)
    dist.all_reduce(flag)
    return bool(flag)


def _cause(error: BaseException) -> BaseException:
    """What a process failed of, of an error that PyTorch has gathered."""
    if isinstance(error, CheckpointException) and error.failures:
        cause: Any = next(iter(error.failures.values()))
        return cause[0] if isinstance(cause, tuple) else cause
    return error
