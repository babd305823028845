"""Launch Triton kernels without Triton's launcher, whose CPU time exceeds that of several kernels.

The first launch goes through Triton, which compiles the kernel. Later launches use the compiled kernel directly if the
addresses have the same alignment. Without CUDA (AMD, Intel, the interpreter) every launch goes through Triton.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .gpu import Gpu, Launch, driver, thread

_PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d"}
ALIGNED = 15  # Triton treats an address as aligned if these bits are zero


class TritonLaunch:
    """A Triton kernel with fixed arguments, except for its tensors, which come first."""

    def __init__(
        self, kernel: Any, gpu: Gpu | None, grid: tuple[int, ...], numbers: tuple[int | float, ...], **constants: Any
    ) -> None:
        """numbers: the arguments after the tensors; constants: the constexpr arguments and Triton's options."""
        self.kernel, self.gpu, self.grid, self.numbers, self.constants = kernel, gpu, grid, numbers, constants
        self._prepared: Launch | None = None
        self._tried = gpu is None
        self._index = -1 if gpu is None else gpu.index

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the tensors' device. Dtypes must be those of the first launch."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if self._prepared is not None and not bits & ALIGNED:
            if any([t is not None and t.get_device() != self._index for t in tensors]):  # noqa: C419 (faster)
                devices = ", ".join(str(t.device) for t in tensors if t is not None)
                raise RuntimeError(f"expected all tensors on the same device, but they are on {devices}")
            self._prepared(addresses)
        elif 0 not in self.grid:
            if (recording := getattr(thread, "recording", None)) is not None:
                recording.incomplete = f"Triton launched {getattr(self.kernel, '__name__', self.kernel)}"
            if self.gpu is None:
                self.through_triton(tensors)
                return
            prepared = self.gpu.through_triton(self, tensors, wanted=not (self._tried or bits & ALIGNED))
            self._prepared = self._prepared or prepared
            self._tried = self._tried or not bits & ALIGNED

    def through_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        """Launch with Triton's own launcher. Returns the compiled kernel."""
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants)


def prepare(compiled: Any, gpu: Gpu, launch: TritonLaunch, tensors: int) -> Launch | None:
    """Prepare a launch of a compiled Triton kernel; None if it needs Triton's own launcher or has an unknown
    signature.
    """
    metadata, numbers, grid = compiled.metadata, launch.numbers, launch.grid
    plain = getattr(metadata, "num_ctas", 1) == 1 and not any(
        getattr(metadata, name, 0)
        for name in ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    )
    kinds = list(compiled.src.signature.values())[: tensors + len(numbers)]
    values: list[bytes] = []
    slots: list[tuple[int, int]] = []
    for place, kind in enumerate(kinds):
        if kind == "constexpr":  # None, or an integer 1
            slots += [(-1, 0)] if place < tensors else []
        elif place < tensors:
            slots.append((len(values), 0))
            values.append(bytes(8))
        elif kind in _PACKED:
            values.append(struct.pack(_PACKED[kind], numbers[place - tensors]))
        else:
            return None
    wanted = _parameter_count(int(compiled.function))
    # the remaining parameters are addresses of scratch memory, which these kernels do not use
    if not plain or wanted is None or not len(values) <= wanted <= len(values) + 2:
        return None
    values += [bytes(8)] * (wanted - len(values))
    return Launch(gpu, int(compiled.function), grid, 32 * metadata.num_warps, metadata.shared, values, slots)


def _parameter_count(function: int) -> int | None:
    """The number of parameters of a loaded kernel; None for drivers before CUDA 12.4, which cannot report it."""
    ask = getattr(driver(), "cuFuncGetParamInfo", None)
    if ask is None:
        return None
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    count = 0
    while count < 64 and not ask(
        ctypes.c_void_p(function), ctypes.c_size_t(count), ctypes.byref(offset), ctypes.byref(size)
    ):
        count += 1
    return count
