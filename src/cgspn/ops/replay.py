"""Record the launches and matrix products of one pass and replay them, so that the CPU only fills in a few addresses.

While a pass is recorded, its intermediate tensors are allocated in a workspace, which all passes of a stream reuse one
after the other. So all addresses are fixed except for those of the inputs and outputs.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from .gpu import Gpu, Launch, check, thread
from .products import check as check_product

ALIGNED = 15  # these bits must be zero in an address: kernels were compiled for that alignment


SCRATCH = 1 << 25  # bytes of workspace for products, as PyTorch uses on large GPUs


class Workspace:
    """Memory for the intermediate tensors of one stream. Hold the lock while kernels that use it are launched."""

    def __init__(self, device: torch.device) -> None:
        self.lock, self.device = threading.Lock(), device
        self.memory: Tensor | None = None

    @functools.cached_property
    def scratch(self) -> Tensor:
        """The workspace of the products."""
        return torch.empty(SCRATCH if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device)

    def grow(self, size: int) -> None:
        """Allocate new memory if there are fewer than `size` bytes."""
        if self.memory is None or self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)


# a workspace lives as long as a recording or replay refers to it
_workspaces: weakref.WeakValueDictionary[tuple[torch.device, int], Workspace] = weakref.WeakValueDictionary()


class Recording:
    """The launches and products recorded in a `recorded` context, in order."""

    def __init__(self, gpu: Gpu, stream: int, workspace: Workspace) -> None:
        self.gpu, self.stream, self.workspace = gpu, stream, workspace
        self.memory = workspace.memory
        self.used = 0
        self.incomplete = ""  # the reason if something could not be recorded
        self.steps: list[tuple[Any, Any]] = []  # (launch, addresses), or (status check, callable)
        self.reached: list[int] = []  # addresses that PyTorch operations read and write

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor in the workspace, or a new one if the workspace is too small."""
        start, size = self.used, torch.Size(shape).numel() * dtype.itemsize
        self.used += -(-size // 256) * 256
        if self.memory is None or self.used > self.memory.numel():
            return torch.empty(shape, dtype=dtype, device=device)
        return self.memory[start : start + size].view(dtype).view(shape)

    def launched(self, launch: Launch, addresses: Sequence[int]) -> None:
        """Record a launch."""
        self.steps.append((launch, tuple(addresses)))

    def computed(self, function: Callable[..., Tensor], *tensors: Tensor, out: Tensor) -> Tensor:
        """Run and record function(*tensors, out=out)."""
        self.reached += [t.data_ptr() for t in (*tensors, out)]
        self.steps.append((None, functools.partial(function, *tensors, out=out)))
        return function(*tensors, out=out)

    def product(
        self, a: Tensor, b: Tensor, *, out: Tensor | None = None, bias: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """Run and record a [M, K] b [K, N] + bias [N] or + add [M, N]. Returns [M, N], in `out` or in the workspace."""
        if out is None:
            out = self.empty((a.shape[0], b.shape[1]), a.dtype, a.device)
        prepared = self.prepare(a, b, out, bias=bias, add=add)
        if prepared is not None:
            self.steps.append((check_product, prepared))
            check_product(prepared.run())
            return out
        other = bias if add is None else add
        return (
            self.computed(torch.mm, a, b, out=out)
            if other is None
            else self.computed(torch.addmm, other, a, b, out=out)
        )

    def prepare(self, *matrices: Tensor, **options: Any) -> Any:
        """`Gpu.product` for this stream."""
        return self.gpu.product(self.stream, self.workspace.scratch, *matrices, **options)

    def mlp(self, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Callable[[Tensor], object] | None:
        """A function that adds the MLP of x [M, C] (tanh GELU, no last bias) to tokens [M, C] in place.

        None if cuBLASLt cannot run these products.
        """
        shape = (x.shape[0], weight1.shape[0])
        hidden, onto = torch.empty(shape, dtype=x.dtype, device=x.device), torch.empty_like(x)
        first = self.prepare(x, weight1.t(), hidden, bias=bias1, gelu=True)
        second = self.prepare(hidden, weight2.t(), onto, add=onto)
        if first is None or second is None:
            return None
        out, read, total = first.pointers[2], second.pointers[0], second.pointers[2]

        def add_(tokens: Tensor) -> None:
            hidden = torch.empty(shape, dtype=tokens.dtype, device=tokens.device)
            out.value = read.value = hidden.data_ptr()
            total.value = tokens.data_ptr()
            check_product(first.run() or second.run())

        return add_

    def replay(self, held: Sequence[Tensor], own: Sequence[Tensor | None]) -> Replay | str:
        """The replay of this pass, or the reason why it cannot be replayed.

        held: tensors with a fixed address; own: inputs and outputs that differ between calls (None for an absent one).
        """
        self.workspace.grow(self.used)
        if self.incomplete:
            return self.incomplete
        if self.memory is None or self.used > self.memory.numel():
            return "the workspace was too small"
        changing = [(0, 0) if t is None else (t.data_ptr(), t.numel() * t.element_size()) for t in own]
        places = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (*held, self.memory)]
        for address in {a for step in self.steps for a in addresses_of(step)} | set(self.reached):
            here = any(first <= address < first + size for first, size in changing)
            # PyTorch operations hold tensors, whose addresses cannot be changed
            if here and address in self.reached:
                return "a PyTorch operation uses a tensor that differs between calls"
            if not here and address and not any(first <= address < last for first, last in places):
                return "a launch or product uses memory that was not allocated in the pass"
        return Replay(self, changing)


def addresses_of(step: tuple[Any, Any]) -> Sequence[int]:
    """The addresses that a recorded launch or product reads and writes."""
    what, where = step
    if isinstance(what, Launch):
        return where  # type: ignore[no-any-return]
    return [pointer.value or 0 for pointer in where.pointers] if what is not None else []


class Replay:
    """Launches and products in order, run on the stream on which they were recorded."""

    def __init__(self, recording: Recording, changing: Sequence[tuple[int, int]]) -> None:
        """changing: addresses and sizes of the tensors that differ between calls."""
        self.workspace, self.memory = recording.workspace, recording.memory
        self._bound = tuple([first for first, _ in changing])
        self._steps: list[tuple[Callable[[int], None] | None, Callable[[], Any]]] = []
        self._changing: list[tuple[Any, int, int, int]] = []
        self._owners: list[Any] = []  # keeps alive the memory that the driver and cuBLASLt read by address
        for step in recording.steps:
            what, where = step
            if isinstance(what, Launch):
                launch = what.copy()
                launch.place(where)
                self._owners.append(launch)
                self._steps.append((check, recording.gpu.submission(launch, recording.stream)))
                words = [(launch.words, slot) for slot in launch.slots]
            else:
                self._steps.append((what, where if what is None else where.run))
                self._owners.append(where)
                words = [] if what is None else [(pointer, 0) for pointer in where.pointers]
            for (written, slot), address in zip(words, addresses_of(step)):
                for place, (first, size) in enumerate(changing):
                    if first <= address < first + size:
                        self._changing.append((written, slot, place, address - first))

    def holds(self) -> bool:
        """Whether the workspace still has the memory of this replay."""
        return self.memory is self.workspace.memory

    def run(self, *addresses: int) -> None:
        """Run with these addresses, aligned as `ALIGNED` says. The caller must hold the workspace's lock.

        Raises RuntimeError with the driver's reason.
        """
        if addresses != self._bound:
            for words, slot, place, offset in self._changing:
                words[slot] = addresses[place] + offset
            self._bound = addresses
        for checks, step in self._steps:
            status = step()
            if checks is not None and status:
                checks(status)


@contextmanager
def recorded(gpu: Gpu, device: torch.device, stream: int) -> Iterator[Recording]:
    """Record the launches of this thread within the context."""
    workspace = _workspaces.setdefault((device, stream), Workspace(device))
    # tensors created in inference mode could not be written to outside of it
    with workspace.lock, torch.inference_mode(False), torch.no_grad():
        thread.recording = Recording(gpu, stream, workspace)
        try:
            yield thread.recording
        finally:
            thread.recording = None


def active() -> Recording | None:
    """The recording of this thread, if there is one."""
    return getattr(thread, "recording", None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; while recording, a tensor in the workspace."""
    recording = active()
    if recording is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return recording.empty(shape, dtype, device)


def empty_like(x: Tensor) -> Tensor:
    """`empty` of the shape, dtype and device of x."""
    return empty(x.shape, x.dtype, x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, recorded if this thread is recording: [..., C] -> [..., K]."""
    recording = active()
    if recording is None or bias is None:
        return plain_linear(x, weight, bias)
    out = recording.product(x.flatten(0, -2), weight.t(), bias=bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def matmul(a: Tensor, b: Tensor, add: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """a [M, K] b [K, N] (+ add [M, N]) (+ bias [N]), recorded if this thread is recording."""
    recording = active()
    if recording is not None:
        return recording.product(a, b, bias=bias, add=add)
    if bias is not None:
        out = torch.addmm(bias, a, b)
        return out if add is None else out + add
    return a @ b if add is None else torch.addmm(add, a, b)


def column_sums(x: Tensor) -> Tensor:
    """x.sum(0) of x [M, C], recorded if this thread is recording."""
    if active() is None:
        return x.sum(0)
    from .fused.rows import column_sums as kept

    return kept(x, dtype=x.dtype)


def project(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """layer(x) of a linear layer, recorded if this thread is recording."""
    made: Tensor = layer(x) if active() is None else linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return made


def pointwise(function: Callable[[Tensor], Tensor], into: Callable[..., Tensor], x: Tensor) -> Tensor:
    """An elementwise function(x), with the dtype of x. While recording, it is computed by into(x, out=...) instead."""
    recording = active()
    if recording is None:
        return function(x)
    return recording.computed(into, x, out=empty_like(x))
