"""Snapshots of a training stage on disk. They are written atomically and can be read by any number of processes."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.checkpoint import line_of, reason_of
from ..models.reading import CheckpointError
from ..models.weights import Weights, open_safetensors
from .manifest import check_manifest, entries_of, read_steps, set_aside, write_manifest
from .parallel import Item, barrier, fill, full_tensor, gather_objects, rank

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
        whole = 0
        for steps in sorted(self._steps() if rank() == 0 else (), reverse=True):
            try:
                check_snapshot(self._folder(steps), steps)
                whole = steps
                break
            except (CheckpointError, OSError) as error:
                set_aside(self._folder(steps), f"the snapshot after step {steps} is damaged and not used: {error}")
        return gather_objects(whole)[0]

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.glob("[0-9]*") if path.is_dir()]
        return [int(name) for name in names if re.fullmatch(r"[0-9]{8}", name)]

    def _folder(self, steps: int, ending: str = "") -> Path:
        return self.folder / f"{steps:08d}{ending}"

    def save(self, done: int, tensors: dict[str, Tensor], record: list[dict[str, float]]) -> None:
        """Write a snapshot, then remove old ones. All processes must call this.

        done: number of finished steps. tensors: by name; they may be sharded (DTensor) or exist on only some processes.
        record: the losses of each step; the first process writes its own as JSON.

        Raises SnapshotError on every process if the disk is full or the folder is not writable.
        """
        whole, partial, first = self._folder(done), self._folder(done, ".partial"), rank() == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        share = share_of(tensors)

        def write() -> dict[str, dict[str, object]]:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(share, partial / f"{rank()}.safetensors")
            # each process reads its own file for the checksum
            return entries_of(partial, f"{rank()}.safetensors")

        def finish() -> None:
            if first:
                (partial / RECORD).write_text(json.dumps(record))
                entries = {name: entry for each in written for name, entry in each.items()}
                write_manifest(partial, entries | entries_of(partial, RECORD), done)
                shutil.rmtree(whole, ignore_errors=True)
                os.replace(partial, whole)
                for old in sorted(self._steps())[:-KEPT]:
                    shutil.rmtree(self._folder(old), ignore_errors=True)

        written = self._together(done, write)
        self._together(done, finish)

    def _together(self, done: int, work: Callable[[], Item]) -> list[Item]:
        """Gather the results of `work` from all processes. Raises SnapshotError on every process if it fails on any."""
        results, failure = list[Item](), ""
        try:
            results.append(work())
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = reason_of(error, self.folder)
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

    @torch.no_grad()
    def load(self, done: int, tensors: dict[str, Tensor]) -> list[dict[str, float]]:
        """Fill `tensors` from the snapshot after `done` steps and return its record.

        Raises SnapshotError if a tensor is missing or has another shape.
        """
        folder = self._folder(done)
        try:
            stored = tensors_in(folder)
            for name, tensor in tensors.items():
                if name not in stored or stored[name].shape != tensor.shape:
                    raise CheckpointError(f"it holds no {name} of shape {list(tensor.shape)}")
                fill(tensor, stored[name].read)
            return read_steps(folder / RECORD, done)
        except (OSError, CheckpointError) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {line_of(error)}") from error

    def clear(self) -> None:
        """Remove all snapshots of a finished stage."""
        barrier()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other stages may still need it
                self.folder.parent.rmdir()


def share_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors that this process writes, on the CPU: each is written by one of the processes that hold it."""
    held, share = gather_objects(dict.fromkeys(tensors)), dict[str, Tensor]()
    for i, name in enumerate(sorted({name for names in held for name in names})):
        holders = [number for number, names in enumerate(held) if name in names]
        if rank() in holders:
            full = full_tensor(tensors[name])  # gathered on all of them
            if holders[i % len(holders)] == rank():
                share[name] = full.detach().cpu().contiguous()
    return share


def tensors_in(folder: Path) -> Weights:
    """The tensors of a snapshot. Raises CheckpointError if a file is damaged or there are none."""
    files = [open_safetensors(path)[0] for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise CheckpointError("it holds no tensors")
    return {name: stored for each in files for name, stored in each.items()}


def check_snapshot(folder: Path, steps: int) -> None:
    """Raise CheckpointError if the snapshot after `steps` steps is damaged."""
    check_manifest(folder, RECORD, steps)
    tensors_in(folder)
