"""Process groups, collectives, averaging of gradients, and sharding with FSDP2."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from ..compat import foreach_copy_
from ..models.encoder import Encoder

Item = TypeVar("Item")

LET_GO = 0.25  # seconds


@dataclass(frozen=True)
class World:
    """A run's processes: rank and device of this one, their number, and their number on this machine."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes started by torchrun for the duration of the context, or use a single process without torchrun.

    device: "cpu" (gloo) or "cuda" (NCCL; each process takes the GPU of its local rank). Raises ValueError for "cuda"
    without a GPU.
    """
    kind = torch.device(device)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU; accepted here: 'cpu'")
    if "RANK" not in os.environ:
        yield World(device=kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    store, number, size = next(rendezvous("env://"))
    # the agent's store outlives a restart; without a prefix, processes would find those of the previous attempt
    attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend, device_id = ("nccl", kind) if kind.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=attempt, rank=number, world_size=size, device_id=device_id)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), kind, int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        if kind.type == "cpu":
            # wait for Gloo threads: one that still holds a Python object of the last backward's collective aborts the
            # process after the interpreter has exited (seen in 3 of 100 FSDP2 runs under load)
            time.sleep(LET_GO)
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(values: Tensor, reduction: str = "mean") -> Tensor:
    """The mean or sum of a tensor over all processes, without gradients."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size() if reduction == "mean" else values


def gather_objects(value: Item) -> list[Item]:
    """Gather one object from each process, by rank, on every process. Objects are pickled."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows [b, ...] of all processes into [b * size, ...] in order of rank, with gradients."""
    return torch.cat(all_gather(rows)) if world_size() > 1 else rows


def shard_encoder(encoder: Encoder, blocks_per_unit: int = 1, reshard: bool = True) -> None:
    """Shard the blocks of an encoder over all processes (FSDP2), in place. The caller shards the rest as the root.

    blocks_per_unit: number of consecutive blocks whose weights are gathered together. reshard: free weights after the
    forward and gather them again in the backward.
    """
    blocks = encoder.each_block()
    units = [blocks[i : i + blocks_per_unit] for i in range(0, len(blocks), blocks_per_unit)]
    for unit in units:  # hooks around `__call__` gather at its first block and reshard at its last
        fully_shard([*unit], reshard_after_forward=reshard)
    for unit, following in pairwise(units):
        # prefetch before a unit is launched: if the CPU is slower than the GPU, nothing else overlaps
        unit[0].set_modules_to_forward_prefetch([following[0]])  # type: ignore[operator]


def shard_root(task: nn.Module) -> None:
    """Shard the parameters of a task outside of the blocks (FSDP2), in place, after `shard_encoder`."""
    fully_shard(task)
    # it embeds images, and its weights are gathered only for the forward
    register_fsdp_forward_method(task, "calibrate")


def broadcast_params(task: nn.Module) -> None:
    """Broadcast the first process's parameters and buffers."""
    if world_size() > 1:
        for tensor in (*task.parameters(), *task.buffers()):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace float32 gradients by their means over all processes, in one all-reduce.

    The same parameters must have gradients on every process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([g.numel() for g in gradients])
    foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Set whether the next backward reduces sharded gradients; off for all but the last part of a batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards of sharded tensors (sharing memory) and all other tensors unchanged, without gradients."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor into a full tensor on every process; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, read: Callable[[slice | None], Tensor]) -> None:
    """Copy a stored tensor into a tensor, or only its own rows into a process's shard (FSDP2) of one.

    read: reads the given rows, or the whole tensor for None.
    """
    rows = None
    if isinstance(tensor, DTensor):
        count, mesh = len(tensor), tensor.device_mesh
        tensor = tensor.to_local()
        start = min(count, mesh.get_local_rank() * -(-count // mesh.size()))  # in equal parts, as torch.chunk
        rows = slice(start, start + len(tensor))
    tensor.copy_(read(rows))
