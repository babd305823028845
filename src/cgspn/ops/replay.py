"""A pass of launches and products kept to run again: what the host does then is to fill in a few addresses.

While a pass is recorded, what lies between its launches is allocated in a workspace, which all passes of a stream use,
one after the other. So every address is known, but for those of what goes in and of what comes out.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from .gpu import Gpu, Launch, check, thread
from .products import check as check_product

ALIGNED = 15  # bits that are zero in the addresses that kernels were compiled for


SCRATCH = 1 << 25  # bytes that products may write to: what PyTorch gives them on large GPUs


class Workspace:
    """Memory of a stream. Whoever writes there, or launches what does, has the lock."""

    def __init__(self, device: torch.device) -> None:
        """No memory yet."""
        self.lock, self.device = threading.Lock(), device
        self.memory: Tensor | None = None

    @functools.cached_property
    def scratch(self) -> Tensor:
        """Of the products."""
        return torch.empty(SCRATCH if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device)

    def grow(self, size: int) -> None:
        """Have `size` bytes: another piece of memory if it had fewer."""
        if self.memory is None or self.memory.numel() < size:
            with torch.inference_mode(False):  # views of it are written to outside of it, too
                self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


class Recording:
    """What ran in the context of `recorded`, in order."""

    def __init__(self, gpu: Gpu, stream: int, workspace: Workspace) -> None:
        """Nothing yet."""
        self.gpu, self.stream, self.workspace = gpu, stream, workspace
        self.memory = workspace.memory
        self.used = 0
        self.complete = True
        self.steps: list[tuple[Any, Any]] = []  # a launch and its addresses; or what checks a status, and what gives it
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

    def computed(self, function: Callable[..., Tensor], *tensors: Tensor, out: Tensor) -> Tensor:
        """function(*tensors, out=out), kept."""
        self.reached += [t.data_ptr() for t in (*tensors, out)]
        self.steps.append((None, functools.partial(function, *tensors, out=out)))
        return function(*tensors, out=out)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A linear layer of rows x [M, C], kept: [M, K]."""
        out = self.empty((x.shape[0], weight.shape[0]), x.dtype, x.device)
        self.computed(torch.addmm, bias, x, weight.t(), out=out)
        product = self.product(x, weight, bias, out)
        if product is not None:
            self.steps[-1] = (check_product, product.run)
        return out

    def product(self, *arguments: Any, **options: Any) -> Any:
        """`Gpu.product` for this stream."""
        return self.gpu.product(self.stream, self.workspace.scratch, *arguments, **options)

    def mlp(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Callable[[Tensor], object] | None:
        """What adds an MLP of x [M, C] with a GELU by tanh, without its last bias, onto tokens [M, C]: two products.

        None where the library does not give them.
        """
        shape = (x.shape[0], weight1.shape[0])
        hidden = torch.empty(shape, dtype=x.dtype, device=x.device)
        first = self.product(x, weight1, bias1, hidden, gelu=True)
        second = self.product(hidden, weight2, None, torch.empty_like(x), onto=True)
        if first is None or second is None:
            return None

        def add_(tokens: Tensor) -> None:
            hidden = torch.empty(shape, dtype=tokens.dtype, device=tokens.device)
            first.out.value = second.x.value = hidden.data_ptr()
            second.out.value = tokens.data_ptr()
            check_product(first.run() or second.run())

        return add_

    def replay(self, held: Sequence[Tensor], given: Sequence[Tensor | None], made: Tensor) -> Replay | None:
        """What runs the pass again; None if something ran that was not kept.

        held: tensors that stay where they are; given: those that another call has its own of, None for none; made: what
        the pass made, which becomes the caller's.
        """
        self.workspace.grow(self.used)
        if not self.complete or not self.fits or self.memory is None:
            return None
        own = [0 if t is None else t.data_ptr() for t in (*given, made)]
        places = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (*held, self.memory)]
        addresses = [a for launch, where in self.steps if isinstance(launch, Launch) for a in where]
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
        self._steps: list[tuple[Callable[[int], None] | None, Callable[[], Any]]] = []
        self._changing: list[tuple[Any, int, int]] = []
        for checks, step in recording.steps:
            if not isinstance(checks, Launch):
                self._steps.append((checks, step))
                continue
            launch = checks.copy()
            launch.place(step)
            self._steps.append((check, recording.gpu.submission(launch, recording.stream)))
            changing = [(slot, own.index(a)) for slot, a in zip(launch.slots, step) if a and a in own]
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
        for checks, step in self._steps:
            status = step()
            if checks is not None and status:
                checks(status)


@contextmanager
def recorded(gpu: Gpu, device: torch.device, stream: int) -> Iterator[Recording]:
    """Keep what this thread launches, in the time of the context."""
    workspace = _workspaces.setdefault((device, stream), Workspace(device))
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
    out: Tensor = recording.linear(x.flatten(0, -2), weight, bias)
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
