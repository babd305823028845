"""Products by cuBLASLt with everything but addresses fixed.

PyTorch's own way to the library takes as long as several launches. Here y = x w^T (+ bias, then a GELU), or y += x w^T,
of rows of 16 bits. cuBLAS counts by columns: what is [M, K] here is [K, M] there. The constants are of cublasLt.h.
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
TRANSPOSE, EPILOGUE, BIAS = 3, 7, 8  # attributes of a product: that of its first matrix, ...
NO_EPILOGUE, WITH_BIAS, WITH_GELU = 1, 4, 32
WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # attributes of what is preferred
IN_FLOAT = 2  # sums of parts of a product are taken in float32


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@functools.cache
def library() -> Any:
    """The library that PyTorch has loaded. Raises OSError where there is none."""
    if torch.version.cuda is None:
        raise OSError("this PyTorch has no CUDA")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def _handle(index: int) -> c_void_p:
    """Of the device that is current, which has this index."""
    handle = c_void_p()
    check(library().cublasLtCreate(byref(handle)))
    return handle


@functools.cache
def _layout(dtype: torch.dtype, columns: int, rows: int, stride: int) -> c_void_p:
    layout = c_void_p()
    sizes = c_uint64(columns), c_uint64(rows), c_int64(stride)
    check(library().cublasLtMatrixLayoutCreate(byref(layout), TYPES[dtype], *sizes))
    return layout


def check(status: int) -> None:
    """Raise RuntimeError unless a call of the library succeeded."""
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


class Product:
    """out = x weight^T, for the stream that it was prepared for.

    Attributes:
        x, out: the addresses, whose `value` may change.
        run: starts the product; returns the library's status.
    """

    _description: c_void_p | None = None

    def __init__(
        self, device: int, stream: int, scratch: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor,
        *, gelu: bool = False, onto: bool = False,
    ) -> None:  # fmt: skip
        """x [M, K], weight [N, K], bias [N], out [M, N]: of one dtype of 16 bits, rows contiguous.

        Later addresses of x and out must be multiples of 16. scratch: what the product may write to. onto: add to out.

        Raises KeyError for another dtype, OSError without the library, RuntimeError with its status.
        """
        lib, self._handle = library(), _handle(device)
        self._description = c_void_p()
        check(lib.cublasLtMatmulDescCreate(byref(self._description), COMPUTE_FLOAT, FLOAT))
        epilogue = (WITH_GELU if gelu else 0) | (0 if bias is None else WITH_BIAS)
        settings: list[tuple[int, Any]] = [(TRANSPOSE, c_int(1)), (EPILOGUE, c_uint32(epilogue or NO_EPILOGUE))]
        settings += [] if bias is None else [(BIAS, c_void_p(bias.data_ptr()))]
        for name, value in settings:
            size = c_size_t(ctypes.sizeof(value))
            check(lib.cublasLtMatmulDescSetAttribute(self._description, name, byref(value), size))
        matrices = [_layout(t.dtype, t.shape[1], t.shape[0], t.stride(0)) for t in (weight, x, out, out)]
        found = self._choose(matrices, scratch.numel(), weight.data_ptr())
        self.x, self.out = c_void_p(x.data_ptr()), c_void_p(out.data_ptr())
        one, other = c_float(1), c_float(1 if onto else 0)
        first, second, third, _ = matrices
        self.run = functools.partial(
            lib.cublasLtMatmul, self._handle, self._description, byref(one), c_void_p(weight.data_ptr()), first,
            self.x, second, byref(other), self.out, third, self.out, third,
            byref(found), c_void_p(scratch.data_ptr()), c_size_t(scratch.numel()), c_void_p(stream),
        )  # fmt: skip

    def _choose(self, matrices: list[c_void_p], scratch: int, weight: int) -> Heuristic:
        """The algorithm that the library takes for the fastest."""
        lib, preference = library(), c_void_p()
        check(lib.cublasLtMatmulPreferenceCreate(byref(preference)))
        try:
            alignments = [min(256, weight & -weight), 16, 16, 16]
            settings: list[tuple[int, Any]] = [(WORKSPACE, c_uint64(scratch)), (REDUCTIONS, c_uint32(IN_FLOAT))]
            settings += [(name, c_uint32(value)) for name, value in zip(ALIGNMENTS, alignments)]
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
        """Free what the library made."""
        if self._description:
            library().cublasLtMatmulDescDestroy(self._description)
