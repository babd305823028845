"""`cgspn bench`: measurements of speed and memory on this machine; one sub-command for each table."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..bench.encoder import EncoderBenchConfig
from ..bench.operator import OperatorConfig
from ..bench.scaling import ScalingConfig
from ..bench.table import TableConfig
from ..bench.train import TrainBenchConfig
from ..console import console
from ..distill import join_world
from .checks import check_folder, device_of
from .command import Command, Settings


@dataclass(frozen=True)
class _Measurement(Command):
    module: ClassVar[str]
    config: Any
    out: Path = Path("runs/bench")
    """Folder for the results: JSON, a table, and a plot if matplotlib is installed."""
    commit: str = ""
    """Commit to record in the results. The default is that of the working tree."""

    def run(self) -> None:
        """Raises ValueError for settings that cannot be measured or that this machine does not support."""
        check_folder(self.out, "--out")
        measure = import_module(f"..bench.{self.module}", __package__).run
        try:
            measure(self.config, self.out, torch.device(device_of("auto")), commit=self.commit, say=console.print)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        console.print(f"wrote the results to {self.out}")


@dataclass(frozen=True)
class Operator(_Measurement):
    """Compare propagate_2d and line_scan with memory bandwidth, PyTorch and attention. Needs a CUDA GPU.

    Examples:
        cgspn bench operator --out results/operator
    """

    module: ClassVar = "operator"
    config: Settings[OperatorConfig] = field(default_factory=OperatorConfig)


@dataclass(frozen=True)
class Table(_Measurement):
    """Measure the paper's efficiency table: attention with each available kernel, GSPN, C-GSPN and hybrid, from 378 to
    4116 px.

    Examples:
        cgspn bench table --out results/efficiency
        cgspn bench table --sizes 1036 2058 --batches 32 --modes inference
    """

    module: ClassVar = "table"
    config: Settings[TableConfig] = field(default_factory=TableConfig)


@dataclass(frozen=True)
class Encoders(_Measurement):
    """Measure whole encoders: images/s, memory, latency of one image, and very high resolution.

    Examples:
        cgspn bench encoder --out results/efficiency
        cgspn bench encoder --compile
    """

    module: ClassVar = "encoder"
    config: Settings[EncoderBenchConfig] = field(default_factory=EncoderBenchConfig)


@dataclass(frozen=True)
class Train(_Measurement):
    """Measure distillation steps end to end: images/s, MFU, memory, and the largest batch that fits.

    Examples:
        cgspn bench train --out results/training
        cgspn bench train --sizes 378 1036 --checkpointing --compile
    """

    module: ClassVar = "train"
    config: Settings[TrainBenchConfig] = field(default_factory=TrainBenchConfig)


@dataclass(frozen=True)
class Scaling(_Measurement):
    """Measure distillation on several GPUs: scaling efficiency, communication, memory, and equality of losses with one
    GPU.

    Each launch measures one number of GPUs and adds its results to those in the folder. Start with one GPU, which
    determines the batch sizes that fit.

    Examples:
        torchrun --nproc-per-node 1 -m cgspn.cli bench scaling --out results/scaling
        torchrun --nproc-per-node 2 -m cgspn.cli bench scaling --out results/scaling
    """

    config: Settings[ScalingConfig] = field(default_factory=ScalingConfig)

    def run(self) -> None:
        """Raises ValueError for an unknown model, other settings than earlier launches, or batches that do not fit."""
        from ..bench.scaling import run

        with join_world(device_of("auto")) as world:
            if world.rank == 0:  # only it writes
                check_folder(self.out, "--out")
            run(self.config, self.out, world, commit=self.commit, say=console.print)
            if world.rank == 0:
                console.print(f"wrote the results to {self.out}")
