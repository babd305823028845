"""Tensors to kernel arguments, and the launch: on PyTorch's current stream, from few microseconds of Python.

Everything but the addresses is worked out once per combination of shapes and strides and kept.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .compile import Kernel, Macros, check, kernel, macros
from .plan import Machine, Problem, choose

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_VIEW = struct.Struct("<7q")  # address, then byte strides of batch, row, column, direction, neighbour, channel


class Layout(NamedTuple):
    """Byte strides of one argument: batch, row, column, direction, neighbour, channel."""

    b: int = 0
    h: int = 0
    w: int = 0
    d: int = 0
    k: int = 0
    c: int = 0


class Call(NamedTuple):
    """What a launch depends on, addresses apart: the key under which it is kept."""

    name: str  # of the source: "forward" or "backward"
    device: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    codes: tuple[int, ...]
    normalise: bool
    masked: bool
    merged: bool
    save: bool
    chunk: int
    alignment: int
    layouts: tuple[Layout, ...]


class Prepared(NamedTuple):
    """A launch that lacks only addresses."""

    kernel: Kernel
    grid: int
    threads: int
    shared: int
    arguments: bytes
    merge: Kernel | None  # adds up the planes of the directions afterwards


def layout(t: Tensor | None, dims: str) -> Layout:
    """The byte strides of `t`, whose dimensions are named by letters of `dims` ("bhwdkc")."""
    if t is None:
        return Layout()
    size = t.element_size()
    strides = {name: s * size for name, s, n in zip(dims, t.stride(), t.shape, strict=True) if n > 1}
    if "c" in dims:  # one channel: its stride means nothing
        strides.setdefault("c", size)
    return Layout(**strides)


def alignment(tensors: Sequence[Tensor | None], layouts: Sequence[Layout]) -> int:
    """The largest power of two up to 16 that divides every address and stride; the element size if channels are
    not contiguous."""
    bits, size = 16, 16
    for t, strides in zip(tensors, layouts, strict=True):
        if t is None or t.dtype == torch.uint8:
            continue
        size = t.element_size()
        bits |= t.data_ptr() | strides.b | strides.h | strides.w | strides.d | strides.k
        if strides.c != size:
            return size
    return max(bits & -bits, 1)


@functools.cache
def machine(device: int) -> Machine:
    """What plans need to know about a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    return Machine(properties.multi_processor_count, shared, properties.major >= 9)


def merge_defines(dtype: torch.dtype, vec: int) -> Macros:
    """The macros of kernels/merge.cu; those it does not use are fixed, so that they make no further variants."""
    unused = {"POS": 1, "STAGES": 2, "THREADS": 256, "NORMALISE": 1, "MASKED": 0, "MERGE": 0, "SPLIT": 1, "NARROW": 0}
    return macros({"DTYPE": DTYPE_CODES[dtype], "VEC": vec, **unused})


def problem(call: Call) -> Problem:
    """The part of a call that decides how it is cut."""
    b, h, w, c = call.shape
    backward = call.name == "backward"
    return Problem(backward, call.normalise, call.dtype.itemsize, b, c, len(call.codes), max(h, w), call.alignment)


@functools.lru_cache(maxsize=1024)
def prepare(call: Call) -> Prepared | None:
    """Choose the cut, compile and load the kernel, pack the arguments. None where lines are too long."""
    p, gpu = problem(call), machine(call.device)
    cut = choose(p, gpu)
    if cut is None:
        return None
    b, h, w, c = call.shape
    directions = len(call.codes)
    defines = {
        "DTYPE": DTYPE_CODES[call.dtype],
        "VEC": cut.vec,
        "POS": cut.pos,
        "STAGES": cut.stages,
        "THREADS": cut.thread_bound(p),
        "NORMALISE": int(call.normalise),
        "MASKED": int(call.masked),
        "SPLIT": cut.split,
        "MERGE": int(call.merged),
        "NARROW": int(cut.lanes * cut.vec * p.itemsize < 32 and cut.groups(p) > 1),
    }
    major, minor = torch.cuda.get_device_capability(call.device)
    arch = f"sm_{major}{minor}"
    if call.name == "forward":
        defines["SAVE"] = int(call.save)
    scan = kernel(call.name, f"scan_{call.name}", macros(defines), arch)
    shared = cut.shared_bytes(p)
    scan.allow_shared(shared, call.device)
    codes = (*call.codes, 0, 0, 0)[:4]
    cuts = (c // cut.vec, cut.lanes, cut.groups(p), cut.rows(p), p.longest, call.chunk)
    packed = b"".join(_VIEW.pack(0, *strides) for strides in call.layouts)
    packed += struct.pack("<15i4x", b, h, w, c, directions, *codes, *cuts)
    merge = None
    if call.merged:
        wide = 16 // call.dtype.itemsize
        vec = wide if b * h * w * c % wide == 0 else 1
        merge = kernel("merge", "merge", merge_defines(call.dtype, vec), arch)
    return Prepared(scan, b * directions * cut.groups(p) * cut.split, cut.threads(p), shared, packed, merge)


def _launch(k: Kernel, grid: int, threads: int, shared: int, stream: int, *values: ctypes.Array[ctypes.c_char]) -> None:
    from cuda.bindings import driver

    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    address = ctypes.addressof(pointers)
    check(driver.cuLaunchKernel(k.handle, grid, 1, 1, threads, 1, 1, shared, stream, address, 0))


def _value(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * len(data)).from_buffer_copy(data)


def launch(prepared: Prepared, tensors: Sequence[Tensor | None], call: Call, planes: Tensor | None) -> None:
    """Fill in the addresses and launch on the current stream of the call's device."""
    arguments = _value(prepared.arguments)
    for n, t in enumerate(tensors):
        if t is not None:
            struct.pack_into("<q", arguments, n * _VIEW.size, t.data_ptr())
    if prepared.grid == 0:
        return
    with torch.cuda.device(call.device):
        stream = torch.cuda.current_stream(call.device).cuda_stream
        _launch(prepared.kernel, prepared.grid, prepared.threads, prepared.shared, stream, arguments)
        if prepared.merge is not None:
            out = tensors[-1]
            assert planes is not None
            assert out is not None
            wide = 16 // out.element_size()
            count = out.numel() // wide if out.numel() % wide == 0 else out.numel()
            stride = out.numel() * out.element_size()
            values = [_value(struct.pack("<q", v)) for v in (planes.data_ptr(), out.data_ptr(), count, stride)]
            blocks = -(-count // 256)
            _launch(prepared.merge, blocks, 256, 0, stream, *values, _value(struct.pack("<i", len(call.codes))))
