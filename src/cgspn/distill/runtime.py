"""The runtime of a task: compiled or eager functions, the teacher cache, and sharding."""

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

COMPILED = 256  # most graphs per function: one per batch shape and kind of block, usually some tens


def adapted_tap_loss(adapter: nn.Module, student: Tensor, teacher: Tensor, energy: Tensor, kl_weight: float) -> Tensor:
    """`tap_loss` of the student's features after the adapter."""
    return tap_loss(adapter(student), teacher, kl_weight, energy)


@dataclass(frozen=True)
class Runtime:
    """How a task is computed. tapped: maps a block, tokens and grid to the block's output (PB) and mixing branch (PP).
    sublayer: the same, but only the mixing branch. cache: keeps the teacher's features. sharded: the student's weights
    are sharded over the processes (FSDP2)."""

    tapped: Callable[[Block, Tensor, Grid], tuple[Tensor, Tensor]] = Block.tapped
    sublayer: Callable[[Block, Tensor, Grid], Tensor] = Block.sublayer
    tap_loss: Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor] = adapted_tap_loss
    cache: TeacherCache | None = None
    sharded: bool = False

    @classmethod
    def of(cls, compute: ComputeConfig, world: World, cache: TeacherCache | None = None) -> Runtime:
        """The runtime for given settings. Teacher and student share the compiled functions, and all blocks of an
        encoder share one graph per batch shape."""
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
    """Create a task with `make` from the student and a runtime, within the context.

    If it is sharded, the task trains a copy, since sharding cannot be undone, and the student gets its full weights
    back.
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
