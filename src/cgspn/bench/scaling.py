"""Benchmark of distillation on 1, 2, 4 and 8 GPUs: speed, communication, memory, and equal losses.

Each launch with torchrun measures one number of GPUs and merges its rows into the common file. Models and images are
random, and the trainer's loop is used. Scaling is weak: the number of images per GPU is constant.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Literal

import torch

from ..data import Batch
from ..distill import ComputeConfig, LossConfig, OptimConfig, World, gather_objects
from ..distill.batches import share_of
from ..distill.block_parallel import PlacedSublayerTask
from ..distill.flops import forward_flops
from ..distill.parallel import barrier
from ..distill.runtime import Runtime, running
from ..distill.tasks import DistillTask, SublayerTask
from ..distill.trainer import rows_of, train
from ..environment import describe
from ..models.checkpoint import write_atomically
from ..models.encoder import Encoder
from ..models.registry import create_model
from .checks import at_least, known, not_empty, tiled_by
from .communication import Watched, link_rates
from .machine import free
from .scaling_report import report, stage_of
from .train import run_steps, unless_full

Mode = Literal["stage 2 ddp", "stage 2 fsdp", "stage 1 ddp", "stage 1 placed"]
MODES: tuple[Mode, ...] = ("stage 2 ddp", "stage 2 fsdp", "stage 1 ddp", "stage 1 placed")
FILE = "scaling.json"
WARM = 4  # untimed steps for allocation, autotuning, compilation, new buckets, capture and first replay
PROFILED = 2  # profiled steps after the timed ones, on several GPUs
INNER = ("bytes", "blocks", "student")  # fields for the simulation
FULL = 0.92  # largest fraction of memory on one GPU, since several GPUs need additional memory


@dataclass(frozen=True)
class ScalingConfig:
    """Settings of the benchmark.

    Args:
        teacher: model name of the teacher.
        student: model name of the student, with the same depth and width.
        modes: combinations of stage and parallelism; on one GPU, all modes of a stage are the same.
        sizes: side lengths of the square images in pixels.
        batches: images per GPU for each size, halved on one GPU until they fit in memory. A run on several GPUs uses
            the batch sizes found on one, if they have been measured.
        steps: number of timed steps, after four warm-up steps.
        check_size: image size in pixels of the run that compares losses with those of one GPU.
        check_batch: images per step of that run, over all GPUs.
        link: size in MiB of the buffers for measuring the bandwidth between GPUs.
        seed: random seed of weights and images.
        loss: settings of the loss of stage 2.
        compute: precision, compilation, checkpointing and FSDP2 units. With `capture`, steps are replayed as CUDA
            graphs, also on one GPU. Results with and without `capture` are both kept in the file.
    """

    teacher: str = "vit_so400m_patch14_378"
    student: str = "cgspn_so400m_patch14_378"
    modes: tuple[Mode, ...] = MODES
    sizes: tuple[int, ...] = (378, 756)
    batches: tuple[int, ...] = (64, 16)
    steps: int = 8
    check_size: int = 378
    check_batch: int = 16
    link: int = 256
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(precision="bfloat16"))

    def __post_init__(self) -> None:
        """Raise ValueError for sizes without a batch, fewer than two steps, other invalid settings, or an unknown
        model."""
        if len(self.sizes) != len(self.batches):
            raise ValueError(f"batches is {self.batches}; expected one number for each of the sizes, {self.sizes}")
        not_empty(self, "modes", "sizes")
        at_least(self, 2, "steps")
        at_least(self, 1, "batches", "check_batch", "link")
        known("teacher", [self.teacher])
        known("student", [self.student])
        for name in ("sizes", "check_size"):
            tiled_by(name, getattr(self, name), (self.teacher, self.student))


def settings_of(config: ScalingConfig, device: torch.device) -> dict[str, Any]:
    """The common settings of all rows in a file, as JSON values."""
    shared = asdict(config)
    for name in ("modes", "sizes", "batches"):
        shared.pop(name)
    for name in ("parallel", "capture"):  # stored per row
        shared["compute"].pop(name)
    shared["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    shared["torch"] = torch.__version__
    same: dict[str, Any] = json.loads(json.dumps(shared))
    return same


def load(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load the results of earlier launches. Raises ValueError if they used other settings."""
    if not path.exists():
        return {"settings": settings, "machines": {}, "rows": [], "losses": [], "links": []}
    saved: dict[str, Any] = json.loads(path.read_text())
    for name in settings:
        if saved["settings"].get(name) != settings[name]:
            raise ValueError(
                f"{path} holds rows with {name} {saved['settings'].get(name)}, not {settings[name]}; "
                "expected the same settings, or another folder"
            )
    return saved


def merge(rows: list[dict[str, Any]], row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Replace the row with the same values of `keys`, or append it."""
    place = next((n for n, old in enumerate(rows) if all(old[key] == row[key] for key in keys)), len(rows))
    rows[place : place + 1] = [row]


@dataclass(frozen=True)
class Bench:
    """The teacher and student of a launch, from which the tasks of all modes are created."""

    config: ScalingConfig
    world: World
    teacher: Encoder
    student: Encoder
    start: dict[str, torch.Tensor]

    @classmethod
    def of(cls, config: ScalingConfig, world: World) -> Bench:
        """Create models with the same random weights on all processes. Raises ValueError for an unknown model."""
        torch.manual_seed(config.seed)
        with world.device:
            teacher, student = create_model(config.teacher), create_model(config.student)
        start = {name: value.cpu().clone() for name, value in student.state_dict().items()}
        return cls(config, world, teacher.eval().requires_grad_(False), student, start)

    @contextmanager
    def ready(self, mode: str, replayed: bool) -> Iterator[tuple[DistillTask | SublayerTask, ComputeConfig]]:
        """A new task of a mode, distributed over the processes within the context."""
        torch.manual_seed(self.config.seed + 1)
        self.student.load_state_dict(self.start)
        parallel: Any = mode.split()[2] if self.world.size > 1 else "ddp"
        compute = replace(self.config.compute, parallel=parallel, capture=replayed)

        def make(student: Encoder, runtime: Runtime) -> DistillTask | SublayerTask:
            with self.world.device:
                if mode.startswith("stage 2"):
                    return DistillTask(self.teacher, student, self.config.loss, runtime=runtime)
                kind = PlacedSublayerTask if parallel == "placed" else SublayerTask
                return kind(self.teacher, student, runtime=runtime)

        with running(make, self.student, compute, self.world) as task:
            yield task, compute

    def losses(self, mode: str, replayed: bool) -> dict[str, Any]:
        """The total losses of some steps, on a batch that does not depend on the number of processes."""
        config, size = self.config, self.config.check_size
        random = torch.Generator().manual_seed(config.seed)
        images = torch.randn(config.check_batch, self.student.config.channels, size, size, generator=random)
        indices = torch.arange(config.check_batch)
        own = rows_of(Batch(0, indices, images, torch.zeros_like(indices)), share_of(config.check_batch, self.world))
        own = replace(own, images=own.images.to(self.world.device))
        optim = OptimConfig(steps=5, batch_size=config.check_batch, learning_rate=1e-4, seed=config.seed)  # 2 replayed
        with self.ready(mode, replayed) as (task, compute):
            history = train(task, lambda _: repeat(own), optim, mode, compute=compute)
        row = {"mode": mode, "gpus": self.world.size, "captured": replayed, "image": size, "batch": config.check_batch}
        return row | {"totals": history.curve("total")}

    def speed(self, mode: str, replayed: bool, size: int, batch: int) -> dict[str, Any] | None:
        """A row of timed and, on several GPUs, profiled steps. None on one GPU if memory does not suffice.

        On several GPUs too little memory raises ValueError, because other processes may be in the middle of a step.
        """
        with self.ready(mode, replayed) as (task, compute):
            world, timed = self.world, WARM + self.config.steps
            cuda, several = world.device.type == "cuda", world.size > 1
            stamps: list[float] = []
            watched = Watched(world.device)

            def after(done: int) -> None:
                if done == WARM - 1:
                    barrier()
                if WARM <= done <= timed:  # the trainer has just synchronised
                    stamps.append(time.perf_counter())
                if several and done == timed:
                    watched.begin()
                if several and done == timed + PROFILED:
                    watched.end()

            def go() -> list[float]:
                steps = timed + (PROFILED if several else 0)
                return run_steps(task, compute, size, batch, steps, after)

            sent = 4 * sum(p.numel() for p in task.parameters() if p.requires_grad)
            row: dict[str, Any] = {"mode": mode, "image": size, "batch": batch, "gpus": world.size}
            row |= {"captured": replayed, "bytes": sent, "blocks": self.student.config.depth}
            if cuda:
                torch.cuda.reset_peak_memory_stats(world.device)
            if several:
                try:
                    go()
                except torch.OutOfMemoryError as error:
                    raise ValueError(
                        f"{mode}, {size} px: {batch} images per GPU do not fit on {world.size} GPUs (rank "
                        f"{world.rank}); earlier rows are kept; measure one GPU with smaller batches, then repeat this"
                    ) from error
            elif unless_full(go, task, compute) is None:
                return None
            if cuda:
                peak = max(gather_objects(torch.cuda.max_memory_allocated(world.device)))
                row["peak memory (GiB)"] = peak / 2**30
                # several GPUs need a copy of the gradients
                if not several and peak + sent > FULL * torch.cuda.get_device_properties(world.device).total_memory:
                    return None
            each = gather_objects([b - a for a, b in pairwise(stamps)])
            mean = max(statistics.mean(steps) for steps in each)
            row |= {"step_ms": 1e3 * mean, "spread_ms": 1e3 * statistics.stdev(each[0])}
            row["images/s"] = world.size * batch / mean
            if several:
                row |= watched.shares()
            elif isinstance(task, DistillTask):
                row["student"] = 1 - forward_flops(self.teacher.config, (size, size)) / task.flops((size, size))
            return row

    def fitting(self, mode: str, replayed: bool, size: int, batch: int) -> dict[str, Any]:
        """`speed` with the batch halved until it fits. The row has no times if one image does not fit."""
        while (row := self.speed(mode, replayed, size, batch)) is None:
            free(self.world.device)
            if batch == 1:
                row = {"mode": mode, "image": size, "batch": 1, "gpus": self.world.size, "captured": replayed}
                return row | {"note": "out of memory"}
            batch //= 2
        return row


def run(
    config: ScalingConfig, out: Path, world: World, *, commit: str = "", say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Measure this number of processes. The first merges each row into scaling.json and rewrites .md and .png.

    Returns the content of the file. Raises ValueError for an unknown model, a file with other settings, and batches
    that are not divisible or do not fit.
    """
    path = out / FILE
    saved = load(path, settings_of(config, world.device))
    share_of(config.check_batch, world)
    bench = Bench.of(config, world)
    saved["machines"][str(world.size)] = describe(commit)

    def keep(kind: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
        merge(saved[kind], row, keys)
        free(world.device)
        if world.rank == 0:
            write_atomically(path, json.dumps(saved, indent=1) + "\n")
            report(saved, out)
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k not in INNER}
            say(f"{kind}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    barrier()  # all processes read the file before it is changed
    if world.size > 1:
        keep("links", {"gpus": world.size, **link_rates(world.device, config.link * 2**20)}, ("gpus",))
    replayed = config.compute.capture and world.device.type == "cuda"
    modes: tuple[str, ...] = config.modes
    if world.size == 1:
        modes = tuple(dict.fromkeys(map(stage_of, modes)))
    for mode in modes:
        keep("losses", bench.losses(mode, replayed), ("mode", "gpus", "captured"))
        if config.compute.compile:
            torch.compiler.reset()
        for size, batch in zip(config.sizes, config.batches):
            keys = {"mode": stage_of(mode), "image": size, "gpus": 1, "captured": replayed}
            alone = next((row for row in saved["rows"] if keys.items() <= row.items()), None)
            if world.size == 1:
                row = bench.fitting(mode, replayed, size, batch)
            elif alone is not None and "step_ms" not in alone:
                row = {**alone, "mode": mode, "gpus": world.size}
            else:
                if alone and alone["batch"] != batch and world.rank == 0:
                    say(f"{mode}, {size} px: {alone['batch']} images per GPU, as on one GPU, instead of {batch}")
                measured = bench.speed(mode, replayed, size, alone["batch"] if alone else batch)
                assert measured is not None
                row = measured
            if config.compute.compile:
                torch.compiler.reset()  # every shape is compiled, and dynamo keeps only a few
            keep("rows", row, ("mode", "image", "gpus", "captured"))
    return saved
