"""Snapshots of a training stage on disk: whole or not there, and readable by any number of processes."""

from __future__ import annotations

import json
import os
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

from .parallel import barrier

KEPT = 2  # the last one, and the one before in case the machine dies while an old one is removed


class SnapshotError(RuntimeError):
    """A snapshot that could not be written; the message names the last one that is whole."""


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
        """Steps done by the newest whole snapshot; 0 if there is none."""
        found = [int(p.name) for p in self.folder.glob("[0-9]*") if p.name.isdigit()]
        return max(found, default=0)

    def save(self, done: int, tensors: dict[str, Tensor], record: Any) -> None:
        """Write one, then remove those that are no longer needed. All processes call this.

        Args:
            done: steps done.
            tensors: by name; sharded ones (DTensor) and ones that only some processes have are put together on
                loading.
            record: what goes into JSON beside them, from the first process.

        Raises SnapshotError, on every process, if the disk is full or the folder cannot be written.
        """
        whole, partial = self.folder / f"{done:08d}", self.folder / f"{done:08d}.partial"
        failure = ""
        first = not dist.is_initialized() or dist.get_rank() == 0
        try:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / "record.json").write_text(json.dumps(record))
        except OSError as error:
            failure = str(error)
        if not _any(failure):
            try:
                with _alone_unwarned():
                    save(dict(tensors), checkpoint_id=partial, no_dist=not dist.is_initialized())
            except (OSError, RuntimeError, CheckpointException) as error:
                failure = _cause(error)
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
            for old in sorted(p for p in self.folder.glob("[0-9]*") if p.name.isdigit())[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        barrier()

    def load(self, done: int, tensors: dict[str, Tensor]) -> Any:
        """Fill `tensors`, in place, from the snapshot after `done` steps; returns its record.

        Raises RuntimeError if the snapshot does not hold one of them.
        """
        folder = self.folder / f"{done:08d}"
        with _alone_unwarned():
            load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
        return json.loads((folder / "record.json").read_text())

    def clear(self) -> None:
        """Remove all of them: the stage is done."""
        barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other stages may still need it
                self.folder.parent.rmdir()


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


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(str(e) for e in error.failures.values()) or str(error)
    return str(error)
