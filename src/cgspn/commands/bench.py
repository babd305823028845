"""`cgspn bench`: measurements of speed on this machine, and of what students keep; one sub-command for each table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import getdoc
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..bench.ablation import AblationConfig
from ..bench.encoder import EncoderBenchConfig
from ..bench.inference import InferenceConfig
from ..bench.quality import QualityConfig
from ..bench.scaling import ScalingConfig
from ..bench.simulate import SimulationConfig
from ..bench.table import TableConfig
from ..bench.train import TrainBenchConfig
from ..console import console
from ..distill import join_world
from .checks import check_folder


@dataclass(frozen=True)
class _Measurement:
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
    """The GPU, or the processor where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Operator(_Measurement):
    """propagate_2d and line_scan against the memory bandwidth, PyTorch and attention. Needs a CUDA GPU.

    Examples:
        cgspn bench operator --out results/operator
        cgspn bench operator --variants --out results/operator
    """

    quick: bool = False
    """Leave out the slowest rivals."""
    variants: bool = False
    """Instead, time every way to cut the kernels beside the one that the plan chooses."""

    def run(self) -> None:
        """Raises ValueError without a CUDA GPU."""
        if self.variants:
            from ..bench.variants import run as run_variants

            return self._measure(lambda: run_variants(self.out, commit=self.commit, say=console.print))
        from ..bench.operator import run

        return self._measure(lambda: run(self.out, quick=self.quick, commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Table(_Measurement):
    """The source's efficiency table: attention by every kernel, GSPN, C-GSPN and hybrid, from 378 to 4116 px.

    Examples:
        cgspn bench table --out results/efficiency
        cgspn bench table --sizes 1036 2058 --batches 32 --modes inference
    """

    config: TableConfig = field(default_factory=TableConfig)
    """Sizes, batches, contenders."""

    def run(self) -> None:
        """Raises ValueError for a contender that does not exist."""
        from ..bench.table import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Ablation(_Measurement):
    """From the original GSPN layer to C-GSPN, one change at a time; sweeps over batch and width.

    Examples:
        cgspn bench ablation --out results/efficiency
    """

    config: AblationConfig = field(default_factory=AblationConfig)
    """Size, batch, what the sweeps run over."""

    def run(self) -> None:
        """Raises ValueError where memory ends at one image."""
        from ..bench.ablation import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Encoders(_Measurement):
    """Whole encoders: images a second, memory, one image at a time, very high resolution, linear peers.

    Examples:
        cgspn bench encoder --out results/efficiency
        cgspn bench encoder --compile
    """

    config: EncoderBenchConfig = field(default_factory=EncoderBenchConfig)
    """Models, sizes, batches."""

    def run(self) -> None:
        """Raises ValueError for an unknown model."""
        from ..bench.encoder import run

        self._measure(lambda: run(self.config, self.out, device(), commit=self.commit, say=console.print))


@dataclass(frozen=True)
class Train(_Measurement):
    """Steps of distillation end to end: images a second, MFU, memory, and the largest batch, found by trying.

    Examples:
        cgspn bench train --out results/training
        cgspn bench train --sizes 378 1036 --checkpointing --compile
    """

    config: TrainBenchConfig = field(default_factory=TrainBenchConfig)
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
        cgspn bench scaling --out results/scaling --simulate --gpus 64 512
    """

    config: ScalingConfig = field(default_factory=ScalingConfig)
    """Models, modes, sizes, batches."""
    simulate: bool = False
    """Instead, say what more GPUs would give, from what the folder holds: simulation.json and .md. Needs no GPU."""
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    """What that assumes."""

    def run(self) -> None:
        """Raises ValueError for an unknown model, other settings than before, or batches that do not fit."""
        if self.simulate:
            from ..bench.simulate import run as simulate

            return self._measure(lambda: simulate(self.simulation, self.out, say=console.print))
        from ..bench.scaling import run

        with join_world(device().type) as world:
            if world.rank == 0:  # the one that writes
                check_folder(self.out, "--out")
            run(self.config, self.out, world, commit=self.commit, say=console.print)
            if world.rank == 0:
                console.print(f"wrote the results to {self.out}")
        return None


@dataclass(frozen=True)
class Inference(_Measurement):
    """One image on the processor, teacher and student, and from which size the student is faster.

    Examples:
        cgspn bench inference --out results/teachers
        cgspn bench inference --threads 1 --models small --sizes 224 518
    """

    config: InferenceConfig = field(default_factory=InferenceConfig)
    """Models, sizes."""
    threads: int | None = None
    """Of PyTorch; by default as many as it chooses."""

    def run(self) -> None:
        """Raises ValueError for an unknown model."""
        from ..bench.inference import run

        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"threads is {self.threads}; accepted: 1 or more")
            torch.set_num_threads(self.threads)
        self._measure(lambda: run(self.config, self.out, commit=self.commit, say=console.print))


@dataclass(frozen=True, kw_only=True)
class Quality(_Measurement):
    """What students keep of a teacher, row by row at equal budget: cosine on held-out photographs, mIoU of a probe.

    Runs that are finished are not repeated: give the same command again after an interruption, or with more rows or
    seeds. Minutes a run on a GPU.

    Examples:
        cgspn bench quality runs/vit-s14 --photos photos.tar --camvid scenes/ --out results/quality
        cgspn bench quality runs/vit-s14 --photos photos.tar --rows ViT C-GSPN 'stage 2 rate / 3' --seeds 0 1 2
    """

    teacher: tyro.conf.Positional[str]
    """A checkpoint (file, folder or hub id) or "embedded"."""
    config: QualityConfig
    """Data, budget, rates, rows."""

    def run(self) -> None:
        """Raises ValueError for a row that does not exist, OSError for data that are not there."""
        from ..bench.quality import run

        self._measure(lambda: run(self.config, self.teacher, self.out, device(), commit=self.commit, say=console.print))


Measurement = (
    Annotated[Operator, tyro.conf.subcommand("operator", description=getdoc(Operator), prefix_name=False)]
    | Annotated[Table, tyro.conf.subcommand("table", description=getdoc(Table), prefix_name=False)]
    | Annotated[Ablation, tyro.conf.subcommand("ablation", description=getdoc(Ablation), prefix_name=False)]
    | Annotated[Encoders, tyro.conf.subcommand("encoder", description=getdoc(Encoders), prefix_name=False)]
    | Annotated[Inference, tyro.conf.subcommand("inference", description=getdoc(Inference), prefix_name=False)]
    | Annotated[Quality, tyro.conf.subcommand("quality", description=getdoc(Quality), prefix_name=False)]
    | Annotated[Scaling, tyro.conf.subcommand("scaling", description=getdoc(Scaling), prefix_name=False)]
    | Annotated[Train, tyro.conf.subcommand("train", description=getdoc(Train), prefix_name=False)]
)


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory on this machine, or what students keep.

    Examples:
        cgspn bench operator --out results/operator
        cgspn bench table --out results/efficiency
    """

    what: tyro.conf.OmitArgPrefixes[Measurement]
    """Which table."""

    def run(self) -> None:
        """Measure and write. Raises ValueError for what this machine lacks."""
        self.what.run()
