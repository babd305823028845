"""The losses of a batch and their gradients: launched one by one, or replayed as one CUDA graph for each shape."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compat import foreach_copy_
from ..data import Batch
from .optimizers import Optimizers
from .parallel import local_shards, sync_gradients

WARM = 3  # steps before the first capture: allocations, autotuning and lazy set-up happen there

Shapes = tuple[torch.Size, ...]  # of the images of the parts of a batch


class Gradients:
    """Call with the parts of a batch: fills the parameters' gradients. names: of the losses, after the first call."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizers, lower: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """module: from a batch to its losses. optimizer: whose gradients are cleared. lower: the precision."""
        self.module, self.optimizer, self.lower = module, optimizer, lower
        self.names: list[str] = []

    def __call__(self, parts: list[Batch]) -> Tensor:
        """Mean losses over the parts, float32 [len(names)]; the gradient is that of the mean of "total"."""
        self.optimizer.zero_grad()
        return self.add_up(parts)

    def add_up(self, parts: list[Batch]) -> Tensor:
        """Forward and backward of every part."""
        values: list[Tensor] = []
        for part in parts:
            sync_gradients(self.module, part is parts[-1])
            with self.lower():
                losses = self.module(part)
            (losses["total"] / len(parts)).backward()
            self.names = list(losses)
            values.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        return torch.stack(values).mean(0)

    def close(self) -> None:
        """Let go of what calls keep."""


class CapturedStep(NamedTuple):
    """A recorded step. graph: it. parts: what it reads its images from. values: where it leaves the losses."""

    graph: torch.cuda.CUDAGraph
    parts: list[Batch]
    values: Tensor

    def replay(self, parts: list[Batch]) -> Tensor:
        """The losses of other images of the same shapes. The next replay of any step may overwrite its memory."""
        for own, given in zip(self.parts, parts, strict=True):
            own.images.copy_(given.images)
        self.graph.replay()
        return self.values.clone()


class CapturedGradients(Gradients):
    """The same as CUDA graphs, one for each shape of batches, for models whose kernels are shorter than their launches.

    The first three steps are launched, and the first one of every shape; the second one of a shape is captured and
    replayed. Graphs are never replayed at the same time, so that they share one pool of memory, and all write the same
    gradients. Losses need nothing from the host. What FSDP2 and placed blocks exchange with other processes is in the
    graphs; the gradients of a plain module are averaged after them (`average_gradients`).
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizers, lower: Callable[[], AbstractContextManager[object]]
    ) -> None:
        super().__init__(module, optimizer, lower)
        self.steps: dict[Shapes, CapturedStep] = {}
        self.seen: set[Shapes] = set()
        self.calls = 0
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, parts: list[Batch]) -> Tensor:
        """As in `Gradients`."""
        shapes = tuple(part.images.shape for part in parts)
        if shapes not in self.steps:
            if self.calls < WARM or shapes not in self.seen:
                return self.launch(parts, shapes)
            self.steps[shapes] = self.capture(parts)
        return self.steps[shapes].replay(parts)

    def launch(self, parts: list[Batch], shapes: Shapes) -> Tensor:
        """The step without a graph, on a stream of its own, as capture wants its warm-up."""
        self.calls += 1
        self.seen.add(shapes)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values = self.add_up_in_place(parts)
        torch.cuda.current_stream().wait_stream(side)
        return values

    def add_up_in_place(self, parts: list[Batch]) -> Tensor:
        """`add_up`, whose gradients end where those of the step before are: graphs write to that memory.

        Copies of all at once, as adding to what is there would take a kernel for each parameter.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.grad for p in parameters]
        self.optimizer.zero_grad()
        values = self.add_up(parts)
        kept = [(p, own, p.grad) for p, own in zip(parameters, before) if own is not None and p.grad is not None]
        if kept:
            foreach_copy_(local_shards(own for _, own, _ in kept), local_shards(new for _, _, new in kept))
        for parameter, own, _ in kept:
            parameter.grad = own
        return values

    def capture(self, parts: list[Batch]) -> CapturedStep:
        """Record a step on copies of these parts; nothing is computed yet."""
        parts = [replace(part, images=part.images.clone()) for part in parts]
        gc.collect()  # what cycles hold is memory that the graph needs
        graph = torch.cuda.CUDAGraph()
        # other threads, NCCL's among them, go on asking the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            values = self.add_up_in_place(parts)
        return CapturedStep(graph, parts, values)

    def close(self) -> None:
        """Free the graphs: a process group waits for those that hold its collectives before it goes."""
        self.steps.clear()
