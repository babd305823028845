"""The losses of a batch and their gradients: launched one by one, or replayed as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data import Batch
from .optimizers import Optimizers
from .parallel import sync_gradients

WARM = 3  # steps before a capture: allocations, autotuning and lazy set-up happen there


class Gradients:
    """Call with the parts of a batch: fills the parameters' gradients.

    Attributes:
        names: of the losses, after the first call.
    """

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


class CapturedGradients(Gradients):
    """The same as one CUDA graph from the fourth call on, for models whose kernels are shorter than their launches.

    Batches must keep their shape, and losses need nothing from the host. What FSDP2 and placed blocks exchange with
    other processes is in the graph; the gradients of a plain module are averaged after it (`average_gradients`).
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, parts: list[Batch]) -> Tensor:
        """As in `Gradients`."""
        if self.graph is None:
            self.calls = getattr(self, "calls", 0) + 1
            # on a stream of its own, as capture wants its warm-up
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                values = super().__call__(parts)
            torch.cuda.current_stream().wait_stream(side)
            if self.calls == WARM:
                self.capture(parts)
            return values
        for own, given in zip(self.parts, parts, strict=True):
            own.images.copy_(given.images)
        self.graph.replay()
        return self.values.clone()

    def close(self) -> None:
        """Free the graph: a process group waits for those that hold its collectives before it goes."""
        self.graph = None

    def capture(self, parts: list[Batch]) -> None:
        """Record forward and backward on copies of these parts; nothing is computed, the gradients become the graph's.

        The gradients of the call before are kept: they have not been used yet.
        """
        self.parts = [replace(part, images=part.images.clone()) for part in parts]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        pending = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.optimizer.zero_grad()
        gc.collect()  # what cycles hold is memory that the graph needs
        self.graph = torch.cuda.CUDAGraph()
        # other threads, NCCL's among them, go on asking the device meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.values = self.add_up(self.parts)
        for parameter, gradient in zip(parameters, pending, strict=True):
            if parameter.grad is not None and gradient is not None:
                parameter.grad.copy_(gradient)
