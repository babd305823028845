"""What a task computes with: functions that are compiled or not, a cache of the teacher's features, sharding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..compat import recompile_limit
from ..layers import Block, Grid
from ..models.encoder import Encoder
from .cache import TeacherCache
from .config import ComputeConfig
from .losses import tap_loss
from .parallel import World, full_tensor, shard_encoder

if TYPE_CHECKING:
    from .tasks import Task

SomeTask = TypeVar("SomeTask", bound="Task")

COMPILED = 256  # graphs of a function: one for each shape of batches and kind of block, of which some tens are usual


def adapted_tap_loss(adapter: nn.Module, student: Tensor, teacher: Tensor, energy: Tensor, kl_weight: float) -> Tensor:
    """`tap_loss` of what the adapter makes of the student's features."""
    return tap_loss(adapter(student), teacher, kl_weight, energy)


@dataclass(frozen=True)
class Runtime:
    """How a task is computed. tapped: from a block, tokens and grid to the block's output (PB) and its mixing branch
    (PP). sublayer: to its mixing branch alone. cache: keeps the teacher's features. sharded: the student's weights are
    spread over the processes (FSDP2)."""

    tapped: Callable[[Block, Tensor, Grid], tuple[Tensor, Tensor]] = Block.tapped
    sublayer: Callable[[Block, Tensor, Grid], Tensor] = Block.sublayer
    tap_loss: Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor] = adapted_tap_loss
    cache: TeacherCache | None = None
    sharded: bool = False

    @classmethod
    def of(cls, compute: ComputeConfig, world: World, cache: TeacherCache | None = None) -> Runtime:
        """What the settings of a run ask for. A compiled function serves the blocks of teacher and student alike: those
        of an encoder share one graph for each shape of batches, whatever its depth."""
        sharded = compute.parallel == "fsdp" and world.size > 1
        if not compute.compile:
            return cls(cache=cache, sharded=sharded)
        compiled = partial(torch.compile, dynamic=False)
        return cls(compiled(Block.tapped), compiled(Block.sublayer), compiled(adapted_tap_loss), cache, sharded)


@contextmanager
def running(
    make: Callable[[Encoder, Runtime], SomeTask],
    student: Encoder,
    compute: ComputeConfig,
    world: World,
    cache: TeacherCache | None = None,
) -> Iterator[SomeTask]:
    """The task that `make` makes of a student and a runtime, for the time of the context.

    A sharded student is a copy, since sharding cannot be undone. Afterwards the student has what was learned, whole.
    """
    runtime = Runtime.of(compute, world, cache)
    working = copy.deepcopy(student) if runtime.sharded else student
    checkpointing = student.checkpointing
    working.set_grad_checkpointing(compute.checkpointing)
    task = make(working, runtime)
    if task.sharded:
        shard_encoder(working, compute.blocks_per_unit, compute.reshard_after_forward)
    try:
        with recompile_limit(COMPILED) if compute.compile else nullcontext():
            yield task
        task.collect()
        if working is not student:
            student.load_state_dict({key: full_tensor(value) for key, value in working.state_dict().items()})
    finally:
        student.set_grad_checkpointing(checkpointing)
