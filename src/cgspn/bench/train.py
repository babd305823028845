"""Benchmark of stage 2 on one device: images/s, MFU, memory, and the largest batch that fits.

Teacher and student have random weights, which does not change the speed. The trainer's loop is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..data import Batch
from ..distill import ComputeConfig, LossConfig, OptimConfig, World
from ..distill.flops import peak_of
from ..distill.runtime import Runtime, running
from ..distill.tasks import DistillTask, SublayerTask, Task
from ..distill.trainer import train
from ..environment import describe
from ..models.encoder import Encoder
from ..models.registry import create_model
from ..report.drawing import draw_sizes
from .checks import at_least, known, not_empty, tiled_by
from .machine import free
from .results import write

Result = TypeVar("Result")

WARM = 4  # untimed steps for allocation, autotuning, compilation, capture and first replay
TRIES = 2  # steps to test whether a batch fits; the second includes the optimiser's state


@dataclass(frozen=True)
class TrainBenchConfig:
    """Settings of the benchmark.

    Args:
        teacher: model name of the teacher.
        student: model name of the student, with the same depth and width.
        sizes: side lengths of the square images in pixels.
        teacher_is: "original" uses the teacher at the student's size. "previous" uses the frozen student at the
            previous size, as in the curriculum, for all sizes but the first.
        largest: largest batch size to try.
        steps: number of timed steps, after four warm-up steps.
        smallest: first batch size to try; if it does not fit, smaller ones are tried.
        loss: settings of the loss.
        compute: precision, compilation and activation checkpointing.
    """

    teacher: str = "vit_so400m_patch14_378"
    student: str = "cgspn_so400m_patch14_378"
    sizes: tuple[int, ...] = (378, 518, 756, 1036)
    teacher_is: Literal["original", "previous"] = "original"
    largest: int = 512
    steps: int = 5
    smallest: int = 1
    loss: LossConfig = field(default_factory=LossConfig)
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(precision="bfloat16"))

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings or an unknown model."""
        not_empty(self, "sizes")
        at_least(self, 1, "largest", "steps", "smallest")
        known("teacher", [self.teacher])
        known("student", [self.student])
        tiled_by("sizes", self.sizes, (self.teacher, self.student))


def largest_fitting(fits: Callable[[int], bool], largest: int, smallest: int = 1) -> int:
    """The largest batch that fits, to within an eighth, by doubling and bisection. 0 if one image does not fit."""
    low, high = 0, smallest
    while high <= largest and fits(high):
        low, high = high, 2 * high
    high = min(high, largest + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run_steps(
    task: DistillTask | SublayerTask,
    compute: ComputeConfig,
    size: int,
    batch: int,
    steps: int,
    after: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """Train on random images and return the time after each step. Raises torch.OutOfMemoryError.

    after: called after each step with the number of finished steps.
    """
    device = next(task.parameters()).device
    images = torch.randn(batch, task.student.config.channels, size, size, device=device)
    one = Batch(0, torch.arange(batch), images, torch.zeros(batch, dtype=torch.long))
    times: list[float] = []

    def watch(_: dict[str, float]) -> None:
        times.append(time.perf_counter())
        after(len(times))

    optim = OptimConfig(steps=steps, batch_size=batch, learning_rate=1e-6)
    train(task, lambda _: repeat(one), optim, f"{size} px", watch, compute=compute)
    return times


def unless_full(run: Callable[[], Result], task: Task, compute: ComputeConfig) -> Result | None:
    """The result of `run`, or None if it runs out of memory. Its memory is freed in both cases."""
    result = None
    try:
        result = run()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
    # outside of the except clause, whose traceback keeps the tensors alive
    task.zero_grad(set_to_none=True)
    if compute.compile:
        torch.compiler.reset()  # every batch size is compiled, and dynamo keeps only a few
    free(next(task.parameters()).device)
    return result


def measure(task: DistillTask, config: TrainBenchConfig, size: int) -> dict[str, Any]:
    """A row of the table: the largest batch that fits, and its speed and memory."""
    device = next(task.parameters()).device
    patch = task.student.config.patch_size
    row: dict[str, Any] = {"image": size, "tokens": (size // patch) ** 2}

    def attempt(batch: int, steps: int, config: TrainBenchConfig = config) -> list[float] | None:
        return unless_full(lambda: run_steps(task, config.compute, size, batch, steps), task, config.compute)

    batch = largest_fitting(lambda n: attempt(n, TRIES) is not None, config.largest, config.smallest)
    row["largest batch"] = f"{batch} or more" if batch == config.largest else batch
    times = None
    while batch and times is None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = attempt(batch, WARM + config.steps)
        if times is None:  # barely fitted before
            batch = batch * 7 // 8
    if times is None:
        return row
    flops, peak = task.flops((size, size)), peak_of(device, config.compute.precision)
    rate = batch * config.steps / (times[-1] - times[WARM - 1])
    row |= {"batch": batch, "images/s": rate, "ms a step": 1e3 * batch / rate}
    row["way"] = "captured" if config.compute.capture else "launched"
    if device.type == "cuda" and not config.compute.capture and not config.compute.compile and task.capturable:
        replayed = replace(config, compute=replace(config.compute, capture=True))
        again = attempt(batch, WARM + config.steps, replayed)
        row["captured images/s"] = again and batch * config.steps / (again[-1] - again[WARM - 1])
    row |= {
        "TFLOP an image": flops / 1e12,
        "TFLOP/s": rate * flops / 1e12,
        "MFU": rate * flops / peak if peak else None,
    }
    if device.type == "cuda":
        row["peak memory (GiB)"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def run(
    config: TrainBenchConfig, out: Path, device: torch.device, *, commit: str = "", say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """Measure every size, and write train.json, .md and .png after each. Raises ValueError for an unknown model."""
    rows: list[dict[str, Any]] = []
    before: int | None = None
    teacher, student = (create_model(name).to(device) for name in (config.teacher, config.student))
    machine = describe(commit) | {"settings": str(config)}
    for size in config.sizes:
        with running(partial(task_of, teacher, config, before), student, config.compute, World(device=device)) as task:
            rows.append(measure(task, config, size))
        del task
        before = size
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
        say(f"{size} px: " + ", ".join(shown))
        write(out, "train", machine, {"stage 2, one step": rows})
        panels = [(key, rows, key) for key in ("images/s", "MFU") if any(row.get(key) for row in rows)]
        draw_sizes(out / "train.png", panels, x="image")
    return rows


def task_of(
    teacher: Encoder, config: TrainBenchConfig, before: int | None, student: Encoder, runtime: Runtime
) -> DistillTask:
    """The task of stage 2, or of the curriculum stage after images of `before` pixels."""
    if config.teacher_is == "original" or before is None:
        return DistillTask(teacher.eval().requires_grad_(False), student, config.loss, runtime=runtime)
    previous = Encoder(student.config).to(next(student.parameters()).device).eval().requires_grad_(False)
    return DistillTask(previous, student, config.loss, teacher_size=(before, before), runtime=runtime)
