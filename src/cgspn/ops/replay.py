"""A pass of launches and products kept to run again: what the host does then is to fill in a few addresses.

While a pass is recorded, what lies between its launches is allocated in a workspace, which all passes of a stream use,
one after the other. So every address is known, but for those of what goes in and of what comes out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from .gpu import Gpu, Launch, check, thread

ALIGNED = 15  # bits that are zero in the addresses that kernels were compiled for


class Workspace:
    """Memory of a stream. Whoever writes there, or launches what does, has the lock."""

    def __init__(self) -> None:
        """No memory yet."""
        self.lock = threading.Lock()
        self.memory: Tensor | None = None

    def grow(self, size: int, device: torch.device) -> None:
        """Have `size` bytes: another piece of memory if it had fewer."""
        if self.memory is None or self.memory.numel() < size:
            with torch.inference_mode(False):  # views of it are written to outside of it, too
                self.memory = torch.empty(size, dtype=torch.uint8, device=device)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


class Recording:
    """What ran in the context of `recorded`, in order."""

    def __init__(self, gpu: Gpu, stream: int, workspace: Workspace) -> None:
        """Nothing yet."""
        self.gpu, self.stream, self.workspace = gpu, stream, workspace
        self.memory = workspace.memory
        self.used = 0
        self.complete = True
        self.steps: list[Any] = []  # (launch, addresses), or what makes a product
        self.reached: list[int] = []  # addresses of what products read and write

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the workspace, where that is large enough."""
        start, size = self.used, torch.Size(shape).numel() * dtype.itemsize
        self.used += -(-size // 256) * 256
        if self.memory is None or self.used > self.memory.numel():
            return torch.empty(shape, dtype=dtype, device=device)
        return self.memory[start : start + size].view(dtype).view(shape)

    @property
    def fits(self) -> bool:
        """Whether all lay in the workspace."""
        return self.memory is not None and self.used <= self.memory.numel()

    def launched(self, launch: Launch, addresses: Sequence[int]) -> None:
        """Keep a launch."""
        self.steps.append((launch, tuple(addresses)))

    def computed(self, function: Callable[..., Tensor], *tensors: Tensor, out: Tensor, **options: Any) -> Tensor:
        """function(*tensors, out=out), kept."""
        self.reached += [t.data_ptr() for t in (*tensors, out)]
        self.steps.append(partial(function, *tensors, out=out, **options))
        return function(*tensors, out=out, **options)

    def replay(self, held: Sequence[Tensor], given: Sequence[Tensor | None], made: Tensor) -> Replay | None:
        """What runs the pass again; None if something ran that was not kept.

        held: tensors that stay where they are; given: those that another call has its own of, None for none; made: what
        the pass made, which becomes the caller's.
        """
        self.workspace.grow(self.used, made.device)
        if not self.complete or not self.fits or self.memory is None:
            return None
        own = [0 if t is None else t.data_ptr() for t in (*given, made)]
        places = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (*held, self.memory)]
        addresses = [a for step in self.steps if isinstance(step, tuple) for a in step[1]]
        known = {0, *own}
        for address in (*addresses, *self.reached):
            if address not in known and not any(first <= address < last for first, last in places):
                return None
        return Replay(self, own)


class Replay:
    """Launches and products in order. Runs in the stream that it was recorded in."""

    def __init__(self, recording: Recording, own: Sequence[int]) -> None:
        """own: the addresses that each call has its own of."""
        self.workspace, self.memory = recording.workspace, recording.memory
        self._bound = tuple(own)
        self._steps: list[tuple[bool, Callable[[], Any]]] = []
        self._changing: list[tuple[Any, int, int]] = []
        for step in recording.steps:
            if not isinstance(step, tuple):
                self._steps.append((False, step))
                continue
            launch, addresses = step[0].copy(), step[1]
            launch.place(addresses)
            self._steps.append((True, recording.gpu.submission(launch, recording.stream)))
            changing = [(s, own.index(a)) for s, a in zip(launch.slots, addresses) if a and a in own]
            self._changing += [(launch.words, slot, place) for slot, place in changing]

    def holds(self) -> bool:
        """Whether its memory is still the workspace's."""
        return self.memory is self.workspace.memory

    def run(self, *addresses: int) -> None:
        """Run with these addresses, aligned as `ALIGNED` says, by whoever has the workspace's lock.

        Raises RuntimeError with the driver's reason.
        """
        if addresses != self._bound:
            for words, slot, place in self._changing:
                words[slot] = addresses[place]
            self._bound = addresses
        for launches, step in self._steps:
            status = step()
            if launches and status:
                check(status)


@contextmanager
def recorded(gpu: Gpu, device: torch.device, stream: int) -> Iterator[Recording]:
    """Keep what this thread launches, in the time of the context."""
    workspace = _workspaces.setdefault((device, stream), Workspace())
    with workspace.lock:
        thread.recording = Recording(gpu, stream, workspace)
        try:
            yield thread.recording
        finally:
            thread.recording = None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; in a recorded pass, memory of the workspace."""
    recording = getattr(thread, "recording", None)
    if recording is None:
        return torch.empty(shape, dtype=dtype, device=device)
    made: Tensor = recording.empty(shape, dtype, device)
    return made


def empty_like(x: Tensor) -> Tensor:
    """`empty` of the shape, dtype and device of x."""
    return empty(x.shape, x.dtype, x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, which a recorded pass keeps: [..., C] -> [..., K]."""
    recording = getattr(thread, "recording", None)
    if recording is None or bias is None:
        return plain_linear(x, weight, bias)
    rows = x.flatten(0, -2)
    out = empty((rows.shape[0], weight.shape[0]), x.dtype, x.device)
    recording.computed(torch.addmm, bias, rows, weight.t(), out=out)
    return out.view(*x.shape[:-1], weight.shape[0])


def project(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """layer(x) of a linear layer, which a recorded pass keeps."""
    made: Tensor = layer(x) if getattr(thread, "recording", None) is None else linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return made


def pointwise(function: Callable[[Tensor], Tensor], into: Callable[..., Tensor], x: Tensor) -> Tensor:
    """function(x), of the shape and dtype of x, which a recorded pass keeps as into(x, out=...)."""
    recording = getattr(thread, "recording", None)
    if recording is None:
        return function(x)
    made: Tensor = recording.computed(into, x, out=empty_like(x))
    return made
