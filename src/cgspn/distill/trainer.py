"""The training loop, with warm-up and cosine decay, a check for NaN, snapshots, and a record of every step."""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import foreach_lerp_, foreach_mul_
from ..data import Batch
from ..ops.checks import NonFiniteError
from .backward_step import CapturedGradients, Gradients
from .config import ComputeConfig, OptimConfig
from .flops import peak_of
from .garbage import Garbage
from .optimizers import Optimizers, build_optimizer
from .parallel import (
    all_reduce,
    average_gradients,
    broadcast_params,
    gather_objects,
    local_shards,
    shard_root,
    world_size,
)
from .sizes import tokens_of
from .snapshots import Snapshots
from .tasks import Task
from .throughput import Throughput, over_processes

DETAILS = 200  # about this many steps of a stage record the losses of every block; others only their means

Stream = Callable[[int], Iterable[Batch]]


class DivergedError(RuntimeError):
    """Raised if the loss or a gradient is not finite. The message names the step and the part."""


@dataclass
class History:
    """Losses of every step: steps[i] is {"step": .., "lr": .., "total": .., ...}; and the throughput of all
    processes.

    The losses of single blocks are recorded in every step of a short stage, and in about two hundred steps of a long
    one including the last.
    """

    title: str
    steps: list[dict[str, float]] = field(default_factory=list)
    throughput: dict[str, Any] = field(default_factory=dict)

    def curve(self, name: str) -> list[float]:
        """Return one loss over the steps that recorded it."""
        return [step[name] for step in self.steps if name in step]


Watch = Callable[[dict[str, float]], None]


def learning_rate(config: OptimConfig, step: int) -> float:
    """The learning rate at a step as a fraction of the peak: linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(config.steps * config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def train(
    task: Task,
    stream: Stream,
    config: OptimConfig,
    title: str,
    watch: Watch | None = None,
    *,
    compute: ComputeConfig | None = None,
    snapshots: Snapshots | None = None,
) -> History:
    """Train a task, one step per batch, starting from the newest snapshot if there is one.

    With several processes, `ComputeConfig.parallel` says how the task is distributed.

    stream: maps a step to an iterator over this process's share of the batches from there on. The run ends early if the
    iterator does. title: name of the record. watch: called after every step with its losses and the rates of the last
    steps (`Throughput`), where images/s and tokens/s are those of all processes.

    Returns the record of every step, including those before a resume. Raises DivergedError at the first step whose loss
    or gradient is not finite, before it changes a weight; the newest snapshot then has the state before that step.
    Raises SnapshotError if a snapshot cannot be written.
    """
    compute = compute or ComputeConfig()
    device = next(task.parameters()).device
    captured = compute.capture and device.type == "cuda" and task.capturable
    averaged = not task.sharded and task.reduction == "mean"  # other tasks communicate in forward and backward
    if averaged:
        broadcast_params(task)
    elif task.sharded:
        shard_root(task)
    optimizer = build_optimizer(task, config)
    parameters = optimizer.parameters
    average = [p.detach().clone() for p in parameters] if config.ema else []
    history, start = History(title), 0
    if snapshots is not None and (start := snapshots.newest_whole()):
        optimizer.make_state()
        history.steps = snapshots.load(start, _state(task, optimizer, average))
    lower = partial(torch.autocast, device.type, torch.bfloat16, enabled=compute.precision == "bfloat16")
    gradients = (CapturedGradients if captured else Gradients)(task, optimizer, lower)

    def keep(done: int) -> None:
        """Save the state after `done` steps."""
        if snapshots is not None and snapshots.every and done > start:
            snapshots.save(done, _state(task, optimizer, average), history.steps)

    peak = peak_of(device, compute.precision)

    clock = Throughput(lambda size: (tokens_of(size, task.patch), task.flops(size) if peak else None), peak)
    with closing(gradients), Garbage(device.type == "cuda") as garbage:
        for step, batch in zip(range(start, config.steps), clock.timed(stream(start))):
            factor = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            parts = split_batch(batch, config.accumulate)
            try:
                if step == start:
                    with lower():
                        task.calibrate(parts)
                values = gradients(parts)
                if averaged:
                    average_gradients(parameters)
            except NonFiniteError as error:  # on a CPU the scan checks its input
                if world_size() == 1:  # with more processes, others may be in the middle of the step
                    keep(step)  # which has not changed a weight
                raise DivergedError(f"{title}: {error}, at step {step}") from error
            norm = clip_gradients(parameters, task, config.clip)
            shown = torch.cat([all_reduce(values, task.reduction), norm.reshape(1)])
            garbage.after_launch()
            *means, length = shown.tolist()  # synchronises once per step
            record = dict(zip(gradients.names, means, strict=True))
            bad = [name for name, value in record.items() if not math.isfinite(value)]
            if bad or not math.isfinite(length):
                keep(step)
                raise DivergedError(f"{title}: {', '.join(bad) or 'the gradient'} is not finite at step {step}")
            optimizer.step()
            if average:
                foreach_lerp_(local_shards(average), [p.detach() for p in local_shards(parameters)], 1 - config.ema)
            record = {"step": step, "lr": config.learning_rate * factor, "gradient": length, **record}
            # single blocks in about `DETAILS` steps of a stage and in the last one
            every = step % max(1, config.steps // DETAILS) == 0 or step == config.steps - 1
            history.steps.append({name: value for name, value in record.items() if every or "block" not in name})
            if watch is not None:
                all_of = {"images_per_second": world_size(), "tokens_per_second": world_size()}
                watch(record | {name: rate * all_of.get(name, 1) for name, rate in clock.recent().items()})
            if snapshots is not None and snapshots.due(step + 1) and step + 1 < config.steps:
                garbage.at_snapshot()
                keep(step + 1)
    optimizer.zero_grad()  # gradients of a CUDA graph keep its memory
    history.throughput = over_processes(gather_objects(clock.summary()))
    with torch.no_grad():
        for parameter, mean in zip(parameters, average):
            parameter.copy_(mean)
    return history


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into `parts` equal parts. Raises ValueError if it is not divisible."""
    if parts == 1:
        return [batch]
    if len(batch.indices) % parts:
        raise ValueError(f"accumulate is {parts}; expected a divisor of a process's share, {len(batch.indices)} images")
    size = len(batch.indices) // parts
    return [rows_of(batch, slice(part * size, (part + 1) * size)) for part in range(parts)]


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A batch of the given rows."""
    parts = {name: getattr(batch, name)[rows] for name in ("indices", "images", "labels", "captions")}
    return replace(batch, **parts)


def clip_gradients(parameters: list[nn.Parameter], task: Task, most: float) -> Tensor:
    """Clip the global gradient norm over all processes to `most`.

    Returns the norm before clipping, a scalar on the parameters' device.
    """
    gradients = local_shards(p.grad for p in parameters if p.grad is not None)
    norm = nn.utils.get_total_norm(gradients)
    if task.sharded or task.reduction == "sum":  # each process has different gradients
        norm = all_reduce(norm.square(), "sum").sqrt()
    foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1))
    return norm


def _state(task: Task, optimizer: Optimizers, average: list[Tensor]) -> dict[str, Tensor]:
    """The complete state of a run by name; loading fills these tensors in place."""
    names: dict[Tensor, str] = {p: name for name, p in task.named_parameters()}
    return {
        **{f"weight.{name}": p.detach() for p, name in names.items()},
        **{f"buffer.{name}": buffer for name, buffer in task.named_buffers()},
        **{f"optimizer.{names[p]}.{key}": value for p, key, value in optimizer.each_state()},
        **{f"average.{names[p]}": mean for p, mean in zip(optimizer.parameters, average)},
    }
