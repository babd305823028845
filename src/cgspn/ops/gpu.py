"""GPUs, their streams, and kernel launches whose arguments are packed once.

The driver launches into the context that is current in the calling thread. PyTorch makes the device's primary context
current at its own first CUDA call in a thread. A launch here may come earlier, in the first backward of a process or in
a worker thread, so every launch makes sure that the context is current.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import current_device, current_raw_stream, is_capturing


@dataclass(frozen=True)
class Machine:
    """The properties of a GPU that a plan depends on."""

    num_sms: int
    shared_bytes: int  # most that a block may use
    clusters: bool


class LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


class Launch:
    """A kernel with fixed arguments except for the addresses of its tensors. Thread-safe."""

    def __init__(
        self, gpu: Gpu, function: int, grid: Sequence[int], threads: int, shared: int, values: Sequence[bytes],
        slots: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        """values: the kernel's arguments; slots: the argument (-1: none) and byte offset of each address."""
        self._given = (grid, threads, shared, values, slots)
        offsets = [0]
        for value in values:
            offsets.append(offsets[-1] + -(-len(value) // 16) * 16)
        self.words = (ctypes.c_longlong * (offsets[-1] // 8 + 1))()  # the last word takes addresses without a slot
        base = ctypes.addressof(self.words)
        for offset, value in zip(offsets, values):
            ctypes.memmove(base + offset, value, len(value))
        self.params = (ctypes.c_void_p * len(values))(*(base + offset for offset in offsets[:-1]))
        self.slots = [(offsets[argument] + byte) // 8 for argument, byte in slots]
        self._gpu, self.function, self._lock = gpu, function, threading.Lock()
        self.shape = (*grid, *(1,) * (3 - len(grid)), threads, 1, 1, shared)
        self.config = LaunchConfig(*self.shape)
        self._empty = 0 in grid

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of cuLaunchKernelEx as ctypes objects, cached because converting them takes as long as a
        launch.
        """
        config = ctypes.c_void_p(ctypes.addressof(self.config))
        return config, ctypes.c_void_p(self.function), ctypes.c_void_p(ctypes.addressof(self.params)), None

    def __call__(self, addresses: Sequence[int]) -> None:
        """Launch on PyTorch's current stream of the device. Raises RuntimeError with the driver's reason."""
        if self._empty:
            return
        with self._lock:  # held because the driver reads the words during the call
            self.place(addresses)
            self._gpu.submit(self)
        if (recording := getattr(thread, "recording", None)) is not None:
            recording.launched(self, addresses)

    def place(self, addresses: Sequence[int]) -> None:
        """Write the addresses into the kernel's arguments."""
        words = self.words
        for slot, address in zip(self.slots, addresses):
            words[slot] = address

    def copy(self) -> Launch:
        """A copy of the launch with its own arguments."""
        return Launch(self._gpu, self.function, *self._given)


class Gpu:
    """A CUDA device. Tests and benchmarks replace it with an object that has the same members (`registered`)."""

    runs_triton = computes = True  # computes: launches produce an output that can be checked

    def __init__(self, index: int) -> None:
        """index: the device's index. Raises RuntimeError in a process forked after CUDA was initialised."""
        properties = torch.cuda.get_device_properties(index)
        self.index, self.capability = index, (properties.major, properties.minor)
        self.arch = f"sm_{properties.major}{properties.minor}"
        shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        self.machine = Machine(properties.multi_processor_count, shared, properties.major >= 9)

    def load(self, name: str, entry: str, defines: tuple[tuple[str, int], ...], shared: int) -> int:
        """The handle of a kernel of ops/cuda/kernels that may take `shared` bytes, compiled at its first use."""
        from .cuda.compile import kernel

        with self.current():
            loaded = kernel(name, entry, defines, self.arch)
            loaded.allow_shared(shared, self.index)
            return loaded.handle

    def compiler_reason(self) -> str | None:
        """The reason why no kernel can be compiled for this GPU, or None."""
        from .cuda.compile import supported_architectures

        try:
            known = supported_architectures()
        except ImportError:
            return "cuda-core is not installed: pip install 'cgspn[cuda]'"
        except RuntimeError as error:
            return str(error)
        return None if self.arch in known else f"the installed NVRTC does not compile for {self.arch}"

    def through_triton(self, launch: Any, tensors: Sequence[Tensor | None], wanted: bool) -> Launch | None:
        """Run a TritonLaunch with Triton's own launcher. If `wanted`, returns a Launch of the compiled kernel."""
        from .triton_launch import prepare

        with self.current():
            compiled = launch.through_triton(tensors)
            return prepare(compiled, self, launch, len(tensors)) if wanted else None

    def submit(self, launch: Launch) -> None:
        """Submit a launch to the driver."""
        launch.config.stream = current_raw_stream(self.index)
        if self.is_current():
            status = driver().cuLaunchKernelEx(*launch.arguments)
        else:
            with self.current():
                status = driver().cuLaunchKernelEx(*launch.arguments)
        check(status)

    def is_current(self) -> bool:
        """Whether this is the current device of this thread, and its context is current."""
        return getattr(thread, "has_context", False) and current_device() == self.index

    def stream(self) -> int | None:
        """PyTorch's current stream of the device; None during CUDA graph capture."""
        return None if is_capturing() else current_raw_stream(self.index)

    def submission(self, launch: Launch, stream: int) -> Callable[[], int]:
        """A function that submits a launch to a stream, with its current addresses, and returns the status."""
        launch.config.stream = stream
        return functools.partial(driver().cuLaunchKernelEx, *launch.arguments)

    def product(self, *arguments: Any, **options: Any) -> Any:
        """A `products.Product` on this device; None if cuBLASLt does not support it."""
        from .products import Product

        try:
            return Product(self.index, *arguments, **options)
        except (KeyError, OSError, RuntimeError):
            return None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the current device, and its primary context current, within the context manager."""
        with torch.cuda.device(self.index):
            found = ctypes.c_void_p()
            check(driver().cuCtxGetCurrent(ctypes.byref(found)))
            if not found:
                check(driver().cuCtxSetCurrent(self._primary_context))
            thread.has_context = True
            yield

    @functools.cached_property
    def _primary_context(self) -> ctypes.c_void_p:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        check(driver().cuDeviceGet(ctypes.byref(device), self.index))  # both number the visible devices
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        return context


thread = threading.local()  # has_context: set once there is a CUDA context; recording: of launches (replay.py)
_gpus: dict[torch.device, Gpu] = {}
if hasattr(os, "register_at_fork"):  # a child asks again, and PyTorch then says why it cannot use CUDA
    os.register_at_fork(after_in_child=_gpus.clear)


def gpu_of(device: torch.device) -> Gpu | None:
    """The `Gpu` of a device; None without CUDA.

    Raises RuntimeError in a process forked after CUDA was initialised.
    """
    if (gpu := _gpus.get(device)) is not None:
        return gpu
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return _gpus.setdefault(device, Gpu(device.index if device.index is not None else torch.cuda.current_device()))


def on_accelerator(x: Tensor) -> bool:
    """Whether a tensor is not on the CPU, or on a CPU for which a GPU is registered."""
    return not x.is_cpu or x.device in _gpus


@contextmanager
def registered(device: torch.device, gpu: Gpu) -> Iterator[None]:
    """Use `gpu` for a device, such as torch.device("cpu"), within the context manager."""
    _gpus[device] = gpu
    try:
        yield
    finally:
        del _gpus[device]


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises OSError if there is none."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


def check(status: int) -> None:
    """Raise RuntimeError unless a driver call succeeded."""
    if status:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"CUDA driver: {(name.value or b'unknown error').decode()} ({status})")
