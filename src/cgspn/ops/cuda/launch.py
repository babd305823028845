"""Tensors to kernel arguments, and the launch: on PyTorch's current stream, from few microseconds of Python.

Everything but the addresses is worked out once per combination of shapes and strides and kept.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .compile import Kernel, Macros, check, kernel, macros
from .plan import Cut, Machine, Problem, choose

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
    share: int = 1  # channels that have one set of parameters between them
    keep: bool = False
    cut: Cut | None = None  # for measurements; by default the plan's own


class Prepared(NamedTuple):
    """A launch that lacks only addresses."""

    kernel: Kernel
    grid: int
    threads: int
    shared: int
    arguments: bytes


def layout(t: Tensor | None, dims: str) -> Layout:
    """The byte strides of `t`, whose dimensions are named by letters of `dims` ("bhwdkc")."""
    if t is None:
        return Layout()
    size = t.element_size()
    strides = {name: s * size for name, s, n in zip(dims, t.stride(), t.shape, strict=True) if n > 1}
    if "c" in dims:  # one channel: its stride means nothing
        strides.setdefault("c", size)
    return Layout(**strides)


def view(strides: Layout) -> bytes:
    """A kernel's View of common.cuh, its address left out."""
    return _VIEW.pack(0, *strides)


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


@functools.cache
def architecture(device: int) -> str:
    """What kernels are compiled for: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextmanager
def current_stream(device: int) -> Iterator[int]:
    """PyTorch's current stream of a device, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


RIGHT = 2  # the first direction whose lines are columns

# The macros of common.cuh for a kernel that uses only its types and arithmetic, so that they make no variants of it.
PLAIN = {"POS": 1, "NORMALISE": 1, "MERGE": 0, "SPLIT": 1, "HALO": 0, "NARROW": 0, "MASKED": 0, "SHARE": 0, "FORGET": 0}


def merge_defines(dtype: torch.dtype, vec: int) -> Macros:
    """The macros of kernels/merge.cu."""
    return macros({"DTYPE": DTYPE_CODES[dtype], "VEC": vec, "STAGES": 2, "THREADS": 256, **PLAIN})


def scan_defines(cut: Cut, p: Problem, dtype: int, *, masked: bool, merged: bool, save: bool | None) -> dict[str, int]:
    """The macros of kernels/forward.cu, or of backward.cu, which has no `save`."""
    defines = {
        "DTYPE": dtype,
        "VEC": cut.vec,
        "POS": cut.pos,
        "STAGES": cut.stages,
        "THREADS": cut.thread_bound(p),
        "NORMALISE": int(p.normalise),
        "SHARE": int(p.share > 1),
        "FORGET": int(p.keep),
        "MASKED": int(masked),
        "SPLIT": cut.split,
        "HALO": cut.beyond(),
        "MERGE": int(merged),
        "NARROW": int(cut.narrow(p)),
    }
    return defines if save is None else defines | {"SAVE": int(save)}


def problem(call: Call) -> Problem:
    """The part of a call that decides how it is cut."""
    b, h, w, c = call.shape
    backward = call.name == "backward"
    return Problem(
        backward,
        call.normalise,
        call.dtype.itemsize,
        b,
        c,
        len(call.codes),
        max(h, w),
        call.alignment,
        call.share,
        call.keep,
        any(code >= RIGHT for code in call.codes),
    )


@functools.lru_cache(maxsize=1024)
def prepare(call: Call) -> Prepared | None:
    """Choose the cut, compile and load the kernel, pack the arguments. None where lines are too long."""
    p, gpu = problem(call), machine(call.device)
    cut = call.cut or choose(p, gpu)
    if cut is None:
        return None
    if call.cut is not None and not cut.fits(p, gpu):
        raise ValueError(f"{cut} does not fit {p}")
    b, h, w, c = call.shape
    directions = len(call.codes)
    save = call.save if call.name == "forward" else None
    defines = scan_defines(cut, p, DTYPE_CODES[call.dtype], masked=call.masked, merged=call.merged, save=save)
    scan = kernel(call.name, f"scan_{call.name}", macros(defines), architecture(call.device))
    shared = cut.shared_bytes(p)
    scan.allow_shared(shared, call.device)
    codes = (*call.codes, 0, 0, 0)[:4]
    cuts = (c // cut.vec, cut.lanes, cut.groups(p), cut.rows(p), cut.own(p), p.longest, call.chunk)
    packed = b"".join(view(strides) for strides in call.layouts)
    packed += struct.pack("<16i", b, h, w, c, directions, *codes, *cuts)
    return Prepared(scan, cut.blocks(p), cut.threads(p), shared, packed)


def launch_kernel(
    k: Kernel, grid: int, threads: int, shared: int, stream: int, *values: ctypes.Array[ctypes.c_char]
) -> None:
    """Launch on a stream of the current device; `values` are the kernel's arguments by value."""
    from cuda.bindings import driver

    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    address = ctypes.addressof(pointers)
    check(driver.cuLaunchKernel(k.handle, grid, 1, 1, threads, 1, 1, shared, stream, address, 0))


def value(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """Bytes as an argument of `launch_kernel`."""
    return (ctypes.c_char * len(data)).from_buffer_copy(data)


def launch(prepared: Prepared, tensors: Sequence[Tensor | None], call: Call, planes: Tensor | None) -> None:
    """Fill in the addresses and launch on the current stream of the call's device."""
    arguments = value(prepared.arguments)
    for n, t in enumerate(tensors):
        if t is not None:
            struct.pack_into("<q", arguments, n * _VIEW.size, t.data_ptr())
    if prepared.grid == 0:
        return
    with current_stream(call.device) as stream:
        launch_kernel(prepared.kernel, prepared.grid, prepared.threads, prepared.shared, stream, arguments)
    if planes is not None:
        out = tensors[-1]
        assert out is not None
        merge_planes(planes, out, len(call.codes))


def merge_planes(planes: Tensor, out: Tensor, directions: int) -> None:
    """Add up planes [D, ...] of outputs, D outermost in memory, into contiguous `out`, in float32 and in order."""
    size = out.element_size()
    wide = 16 // size if out.numel() % (16 // size) == 0 else 1
    device = out.get_device()
    merge = kernel("merge", "merge", merge_defines(out.dtype, wide), architecture(device))
    count = out.numel() // wide
    values = [value(struct.pack("<q", v)) for v in (planes.data_ptr(), out.data_ptr(), count, out.numel() * size)]
    if blocks := -(-count // 256):
        with current_stream(device) as stream:
            launch_kernel(merge, blocks, 256, 0, stream, *values, value(struct.pack("<i", directions)))
