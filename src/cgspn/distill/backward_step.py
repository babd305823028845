"""The losses and gradients of a batch, computed eagerly or by replaying one CUDA graph per shape."""

import gc
from collections import Counter
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

WARM = 3  # steps before the first capture, for allocations, autotuning and lazy initialisation

Shapes = tuple[torch.Size, ...]  # image shapes of the parts (accumulation steps) of a batch


class Gradients:
    """Computes the losses and gradients of a batch. names: the names of the losses, known after the first call."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizers, lower: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """module: maps a batch to its losses. optimizer: its gradients are cleared. lower: an autocast context."""
        self.module, self.optimizer, self.lower = module, optimizer, lower
        self.names: list[str] = []

    def __call__(self, parts: list[Batch]) -> Tensor:
        """Losses, averaged over the parts, float32 [len(names)]. The gradients are those of the mean "total"."""
        self.optimizer.zero_grad()
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
        """Free the graphs of earlier calls, if there are any."""


class CapturedStep(NamedTuple):
    """A CUDA graph, its input batches and its output losses."""

    graph: torch.cuda.CUDAGraph
    parts: list[Batch]
    values: Tensor

    def replay(self, parts: list[Batch]) -> Tensor:
        """Replay the graph on new images with the same shapes and return a copy of its losses."""
        for own, given in zip(self.parts, parts, strict=True):
            own.images.copy_(given.images)
        self.graph.replay()
        return self.values.clone()


class CapturedGradients(Gradients):
    """`Gradients` with one CUDA graph per batch shape, for models whose kernels take less time than their launches.

    The first three steps, and the first step of each shape, run eagerly. The second step of a shape is captured and
    replayed. Graphs never run concurrently, so they share one memory pool, and all write the same gradients. Losses
    must not need the CPU. Communication of FSDP2 and placed blocks is inside the graphs; gradients of a plain module
    are averaged afterwards (`average_gradients`).
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizers, lower: Callable[[], AbstractContextManager[object]]
    ) -> None:
        super().__init__(module, optimizer, lower)
        self.steps: dict[Shapes, CapturedStep] = {}
        self.seen: Counter[Shapes] = Counter()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, parts: list[Batch]) -> Tensor:
        """See `Gradients`."""
        shapes = tuple(part.images.shape for part in parts)
        if shapes not in self.steps and (self.seen.total() < WARM or not self.seen[shapes]):
            self.seen[shapes] += 1
            return self.launch(parts)
        if shapes not in self.steps:
            self.steps[shapes] = self.capture(parts)
        return self.steps[shapes].replay(parts)

    def launch(self, parts: list[Batch]) -> Tensor:
        """Run the step eagerly on a separate stream, as the warm-up of a capture requires."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values = self.add_up_in_place(parts)
        torch.cuda.current_stream().wait_stream(side)
        return values

    def add_up_in_place(self, parts: list[Batch]) -> Tensor:
        """`Gradients.__call__` that writes the gradients to the memory of the previous step, to which graphs write too.

        It copies all gradients at once, because accumulating in place would take a kernel per parameter.
        """
        before = [p.grad for p in self.optimizer.parameters]
        values = super().__call__(parts)
        pairs = zip(self.optimizer.parameters, before, strict=True)
        kept = [(p, own, p.grad) for p, own in pairs if own is not None and p.grad is not None]
        if kept:
            foreach_copy_(local_shards(own for _, own, _ in kept), local_shards(new for _, _, new in kept))
        for parameter, own, _ in kept:
            parameter.grad = own
        return values

    def capture(self, parts: list[Batch]) -> CapturedStep:
        """Capture a step on copies of these parts, without computing it."""
        parts = [replace(part, images=part.images.clone()) for part in parts]
        gc.collect()  # frees memory in reference cycles, which the graph needs
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's, may call CUDA during the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            values = self.add_up_in_place(parts)
        return CapturedStep(graph, parts, values)

    def close(self) -> None:
        """Free the graphs. A process group cannot shut down before the graphs that contain its collectives."""
        self.steps.clear()
