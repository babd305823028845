"""What test_spread.py runs in two processes: gradients and collectives of one step, written by the first of them."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from cgspn.data import Batch
from cgspn.distill import ComputeConfig, LossConfig, OptimConfig, World
from cgspn.distill.backward_step import Gradients
from cgspn.distill.optimizers import Optimizers, build_optimizer
from cgspn.distill.parallel import average_gradients, broadcast_params, full_tensor, local_shards, shard_root
from cgspn.distill.runtime import running
from cgspn.distill.snapshots import Snapshots
from cgspn.distill.tasks import DistillTask
from cgspn.distill.trainer import _state
from cgspn.layers import AttentionConfig
from cgspn.models import model_config, weights
from cgspn.models.encoder import Encoder
from cgspn.teachers import convert

DEPTH = 5
read = weights._read


def enter(rank, size, folder, name, settings):
    """One process of `size`: run the function of a name and let the first one save what it returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)
    result = globals()[name](rank, **settings)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def models(seed=0):
    torch.manual_seed(seed)
    config = model_config(
        "vit_mini_patch4_28", width=24, mixers=("attention",) * DEPTH, mlp_hidden=48, attention=AttentionConfig(heads=2)
    )
    teacher = Encoder(config).eval().requires_grad_(False)
    return teacher, convert(teacher, compression=4)


def parts(rank, count):
    """Other images on every process."""
    random = torch.Generator().manual_seed(rank)
    none = torch.zeros(2, dtype=torch.long)
    return [Batch(0, none, torch.randn(2, 3, 28, 28, generator=random), none) for _ in range(count)]


def backward(module, task, batches):
    optimizer = Optimizers(torch.optim.AdamW(task.parameters()))
    task.calibrate(batches)
    return Gradients(module, optimizer, partial(torch.autocast, "cpu", enabled=False))(batches)


def gradients_of(task):
    return {name: None if p.grad is None else full_tensor(p.grad).clone() for name, p in task.named_parameters()}


def by_hand_and_by_ddp(rank, *, output):
    """Gradients of two parts by `average_gradients`, from weights that only the first process has, and by DDP."""
    found = []
    for by_hand in (True, False):
        task = DistillTask(models()[0], models(rank if by_hand else 0)[1], LossConfig(output=output))
        if by_hand:
            broadcast_params(task)
            backward(task, task, parts(rank, 2))
            average_gradients(task.parameters())
        else:
            backward(DistributedDataParallel(task, find_unused_parameters=output == 0), task, parts(rank, 2))
        found.append(gradients_of(task))
    return found


def all_sharded(rank, *, cases):
    """Gradients of a copied task, and of each case `sharded`: blocks a unit, whether it reshards, checkpoints."""
    task = DistillTask(*models(), LossConfig())
    backward(DistributedDataParallel(task), task, parts(rank, 1))
    names = ("blocks_per_unit", "reshard_after_forward", "checkpointing")
    return gradients_of(task), {case: sharded(rank, **dict(zip(names, case, strict=True))) for case in cases}


def sharded(rank, **compute):
    """Gradients of a sharded task, and how often its units are gathered and scattered."""
    teacher, student = models()
    world = World(rank, dist.get_world_size(), torch.device("cpu"), dist.get_world_size())

    def make(student, runtime):
        return DistillTask(teacher, student, LossConfig(), runtime=runtime)

    with running(make, student, ComputeConfig(parallel="fsdp", **compute), world) as task:
        shard_root(task)
        backward(task, task, parts(rank, 1))
        with CommDebugMode() as seen:
            backward(task, task, parts(rank, 1))
        found = gradients_of(task)
    names = {str(op).rpartition(".")[2]: count for op, count in seen.get_comm_counts().items()}
    counts = [names["_allgather_base_"] - 1, names["_reduce_scatter_base_"] - 1]  # without those of the root
    return found, counts


def snapshot_of_shards(rank, *, at):
    """The full state of a sharded task before a snapshot, and after the snapshot is loaded over zeros."""
    teacher, student = models()
    world = World(rank, dist.get_world_size(), torch.device("cpu"), dist.get_world_size())

    def make(student, runtime):
        return DistillTask(teacher, student, LossConfig(), runtime=runtime)

    def full(state):
        return {name: full_tensor(tensor).clone() for name, tensor in state.items()}

    with running(make, student, ComputeConfig(parallel="fsdp"), world) as task:
        shard_root(task)
        optimizer = build_optimizer(task, OptimConfig(optimizer="muon"))
        optimizer.make_state()
        state, snapshots = _state(task, optimizer, []), Snapshots(Path(at), 1)
        uneven = torch.nn.Sequential(*(torch.nn.Linear(2, rows) for rows in (1, 3, 5)))
        fully_shard(uneven)
        state |= {name: parameter.detach() for name, parameter in uneven.named_parameters()}
        with torch.no_grad():
            for number, (whole, tensor) in enumerate(zip(state.values(), local_shards(state.values()), strict=True)):
                other = rank / 2 if whole is not tensor else 0  # a shard differs between the processes
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * number + other)
        before = full(state)
        snapshots.save(1, state, [{"total": 1.0}])
        with torch.no_grad():
            for tensor in local_shards(state.values()):
                tensor.zero_()
        assert snapshots.newest_whole() == 1
        sizes = []
        with patch.object(weights, "_read", lambda *at: sizes.append((found := read(*at)).numel()) or found):
            assert snapshots.load(1, state) == [{"total": 1.0}]
        assert sizes == [tensor.numel() for tensor in local_shards(state.values())]  # each process reads its own rows
        return before, full(state)
