"""`cgspn bench`: measurements of speed and memory on this machine; one sub-command for each table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..bench.encoder import EncoderBenchConfig
from ..bench.host import HostConfig
from ..bench.scaling import ScalingConfig
from ..bench.table import TableConfig
from ..bench.train import TrainBenchConfig
from ..console import console
from ..distill import join_world
from .checks import check_folder
from .command import Command, Settings


@dataclass(frozen=True)
class _Measurement(Command):
    out: Path = Path("runs/bench")
    """Folder for the results: JSON, a table and, where matplotlib is installed, a plot."""
    commit: str = ""
    """The commit to note in the results; by default that of the working tree."""

    def _measure(self, run: Callable[[], object]) -> None:
        """Raises ValueError for what this machine lacks."""
        check_folder(self.out, "--out")
        try:
            run()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        console.print(f"wrote the results to {self.out}")


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Operator(_Measurement):
    """propagate_2d and line_scan against the memory bandwidth, PyTorch and attention. Needs a CUDA GPU.

    Examples:
        cgspn bench operator --out results/operator
    """

    quick: bool = False
    """Leave out the slowest rivals."""

    def run(self) -> None:
        """Raises ValueError without a CUDA GPU."""
        from ..bench.operator import run

        self._measure(lambda: run(self.out, quick=self.quick, commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Table(_Measurement):
    """The paper's efficiency table: attention by every kernel, GSPN, C-GSPN and hybrid, from 378 to 4116 px.

    Examples:
        cgspn bench table --out results/efficiency
        cgspn bench table --sizes 1036 2058 --batches 32 --modes inference
    """

    config: Settings[TableConfig] = field(default_factory=TableConfig)
    """Sizes, batches, contenders."""

    def run(self) -> None:
        """Raises ValueError for a contender that does not exist."""
        from ..bench.table import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Encoders(_Measurement):
    """Whole encoders: images/s, memory, one image at a time, very high resolution.

    Examples:
        cgspn bench encoder --out results/efficiency
        cgspn bench encoder --compile
    """

    config: Settings[EncoderBenchConfig] = field(default_factory=EncoderBenchConfig)
    """Models, sizes, batches."""

    def run(self) -> None:
        """Raises ValueError for an unknown model."""
        from ..bench.encoder import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Host(_Measurement):
    """What the CPU does for a block besides launching: needs no GPU, and is what bounds one image at a time.

    Examples:
        cgspn bench host --out results/efficiency
    """

    config: Settings[HostConfig] = field(default_factory=HostConfig)
    """Blocks, calls."""

    def run(self) -> None:
        """Raises ValueError for a contender that does not exist."""
        from ..bench.host import run

        self._measure(lambda: run(self.config, self.out, commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Train(_Measurement):
    """Steps of distillation end to end: images/s, MFU, memory, and the largest batch, found by trying.

    Examples:
        cgspn bench train --out results/training
        cgspn bench train --sizes 378 1036 --checkpointing --compile
    """

    config: Settings[TrainBenchConfig] = field(default_factory=TrainBenchConfig)
    """Models, sizes, losses, precision."""

    def run(self) -> None:
        """Raises ValueError for an unknown model."""
        from ..bench.train import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Scaling(_Measurement):
    """Distillation on several GPUs: efficiency, communication, memory, and whether the losses are one GPU's.

    Each launch measures its own number of GPUs and adds to what the others have left in the folder. One GPU comes
    first: it says which batches fit.

    Examples:
        torchrun --nproc-per-node 1 -m cgspn.cli bench scaling --out results/scaling
        torchrun --nproc-per-node 2 -m cgspn.cli bench scaling --out results/scaling
    """

    config: Settings[ScalingConfig] = field(default_factory=ScalingConfig)
    """Models, modes, sizes, batches."""

    def run(self) -> None:
        """Raises ValueError for an unknown model, other settings than before, or batches that do not fit."""
        from ..bench.scaling import run

        with join_world(device().type) as world:
            if world.rank == 0:  # the one that writes
                check_folder(self.out, "--out")
            run(self.config, self.out, world, commit=self.commit, say=console.print)
            if world.rank == 0:
                console.print(f"wrote the results to {self.out}")
