"""Matrix products by cuBLASLt that are set up once and run with new addresses.

A matrix product called through PyTorch takes the CPU as long as several launches. These compute out = a b (+ bias, then
a GELU) or add + a b, in 16 bits. cuBLAS is column-major: a row-major [M, K] is its [K, M]. The constants are from
cublasLt.h.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float16: 2, torch.bfloat16: 14}
FLOAT, COMPUTE_FLOAT = 0, 68
TRANSPOSED, EPILOGUE, BIAS = (3, 4), 7, 8  # attributes of a product; TRANSPOSED for each of the two matrices
NO_EPILOGUE, WITH_BIAS, WITH_GELU = 1, 4, 32
WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # attributes of the preference
ALIGNED = 16  # required alignment of every matrix in bytes
IN_FLOAT = 2  # split-K sums are accumulated in float32


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int)]
    _fields_ += [("waves", c_float), ("reserved", c_int * 4)]


@functools.cache
def library() -> Any:
    """The cuBLASLt library that PyTorch has loaded. Raises OSError if there is none."""
    if torch.version.cuda is None:
        raise OSError("this PyTorch has no CUDA")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def _handle(index: int) -> c_void_p:
    """The cuBLASLt handle of the current device, whose index this is."""
    handle = c_void_p()
    check(library().cublasLtCreate(byref(handle)))
    return handle


@functools.cache
def _layout(dtype: torch.dtype, across: int, down: int, stride: int) -> c_void_p:
    layout = c_void_p()
    sizes = c_uint64(across), c_uint64(down), c_int64(max(stride, across))
    check(library().cublasLtMatrixLayoutCreate(byref(layout), TYPES[dtype], *sizes))
    return layout


def _matrix(t: Tensor) -> tuple[c_void_p, bool]:
    """The layout descriptor of a matrix, and whether it is column-major."""
    by_columns = t.stride(1) != 1
    if by_columns:
        t = t.t()
    return _layout(t.dtype, t.shape[1], t.shape[0], t.stride(0)), by_columns


def check(status: int) -> None:
    """Raise RuntimeError unless a library call succeeded."""
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


class Pointer(c_void_p):
    """An address with the same write interface as the arguments of a launch."""

    def __setitem__(self, _: int, address: int) -> None:
        """Write the address; the index is ignored."""
        self.value = address


class Product:
    """The product out = a b on the stream for which it was prepared.

    pointers: the addresses of a, b, out and add, replaceable by other multiples of 16. run: starts the product and
    returns the library's status.
    """

    _description: c_void_p | None = None

    def __init__(
        self, device: int, stream: int, scratch: Tensor, a: Tensor, b: Tensor, out: Tensor,
        *, bias: Tensor | None = None, add: Tensor | None = None, gelu: bool = False,
    ) -> None:  # fmt: skip
        """a [M, K], b [K, N] and out [M, N] have one 16-bit dtype; out is row-major, a and b row- or column-major.

        scratch: workspace; bias: [N], or add: [M, N], which may be out; gelu: apply a tanh GELU to the result.
        Raises KeyError for another dtype, OSError without the library, RuntimeError with its status.
        """
        lib, self._handle = library(), _handle(device)
        self._free = lib.cublasLtMatmulDescDestroy  # kept because modules may be gone at interpreter exit
        self._description = c_void_p()
        check(lib.cublasLtMatmulDescCreate(byref(self._description), COMPUTE_FLOAT, FLOAT))
        (first, over), (second, under), (third, _) = (_matrix(t) for t in (b, a, out))
        epilogue = (WITH_GELU if gelu else 0) | (0 if bias is None else WITH_BIAS)
        settings: list[tuple[int, Any]] = [(EPILOGUE, c_uint32(epilogue or NO_EPILOGUE))]
        settings += [(name, c_int(turned)) for name, turned in zip(TRANSPOSED, (over, under))]
        settings += [] if bias is None else [(BIAS, c_void_p(bias.data_ptr()))]
        for name, value in settings:
            size = c_size_t(ctypes.sizeof(value))
            check(lib.cublasLtMatmulDescSetAttribute(self._description, name, byref(value), size))
        found = self._choose([first, second, third, third], scratch.numel())
        a_at, b_at, out_at = (Pointer(t.data_ptr()) for t in (a, b, out))
        add_at = out_at if add is None or add is out else Pointer(add.data_ptr())
        self.pointers = (a_at, b_at, out_at, add_at)
        self.run = functools.partial(
            lib.cublasLtMatmul, self._handle, self._description, byref(c_float(1)), b_at, first, a_at, second,
            byref(c_float(0 if add is None else 1)), add_at, third, out_at, third,
            byref(found), c_void_p(scratch.data_ptr()), c_size_t(scratch.numel()), c_void_p(stream),
        )  # fmt: skip

    def _choose(self, matrices: list[c_void_p], scratch: int) -> Heuristic:
        """The algorithm that the library's heuristic ranks first."""
        lib, preference = library(), c_void_p()
        check(lib.cublasLtMatmulPreferenceCreate(byref(preference)))
        try:
            settings: list[tuple[int, Any]] = [(WORKSPACE, c_uint64(scratch)), (REDUCTIONS, c_uint32(IN_FLOAT))]
            settings += [(name, c_uint32(ALIGNED)) for name in ALIGNMENTS]
            for name, value in settings:
                size = c_size_t(ctypes.sizeof(value))
                check(lib.cublasLtMatmulPreferenceSetAttribute(preference, name, byref(value), size))
            found, count = Heuristic(), c_int()
            arguments = (*matrices, preference, 1, byref(found), byref(count))
            check(lib.cublasLtMatmulAlgoGetHeuristic(self._handle, self._description, *arguments) or found.state)
            if not count.value:
                raise RuntimeError("cuBLASLt: no algorithm")
        finally:
            lib.cublasLtMatmulPreferenceDestroy(preference)
        return found

    def __del__(self) -> None:
        """Free the library's descriptor."""
        if self._description:
            self._free(self._description)
