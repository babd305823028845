"""Launches of the scan kernels. Everything except addresses is computed once per shapes and strides."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu import Gpu, Launch, gpu_of
from .compile import Macros, macros
from .plan import Problem, TileConfig, choose

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VIEW = struct.Struct("<7q")  # address, then byte strides of batch, row, column, direction, neighbour, channel
Geometry = tuple[torch.Size, tuple[int, ...]]  # shape and strides


# The Views of a kernel's arguments, in order.
INPUTS = ("x", "lam", "u", "logits", "keep")
ARGUMENTS = {
    "forward": (*INPUTS, "y", "h", "mask", "n"),
    "backward": (*INPUTS, "dy", "h", "mask", "dx", "dlam", "du", "dlogits", "dkeep", "n"),
}


class Call(NamedTuple):
    """Everything a launch depends on except addresses: its cache key."""

    name: str  # of the kernel source: "forward" or "backward"
    gpu: Gpu
    dtype: torch.dtype
    codes: tuple[int, ...]
    geometries: tuple[Geometry | None, ...]  # in the order of ARGUMENTS; None for an absent tensor
    alignment: int  # of the addresses
    merged: bool = False  # outputs are planes of the directions, to be summed
    share: int = 1  # channels per parameter group
    mean: bool = False  # the state is divided by n
    chunk: int = 0
    cut: TileConfig | None = None  # for benchmarks; None takes that of plan.py

    @property
    def views(self) -> dict[str, Geometry | None]:
        """The shape and strides of each tensor, by name."""
        return dict(zip(ARGUMENTS[self.name], self.geometries, strict=True))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes [B, H, W, C] of the features, the first tensor."""
        first = self.geometries[0]
        assert first is not None
        return (*first[0][:3], first[0][-1])


def byte_strides(geometry: Geometry | None, dims: str, size: int) -> dict[str, int]:
    """The byte strides of a tensor with dimensions `dims` ("bhwdkc"). Dimensions of size 1 are left out."""
    if geometry is None:
        return {}
    strides = {name: s * size for name, n, s in zip(dims, *geometry, strict=True) if n > 1}
    if "c" in dims:  # with one channel its stride is arbitrary
        strides.setdefault("c", size)
    return strides


def view(strides: dict[str, int]) -> bytes:
    """A `View` of common.cuh without its address."""
    return VIEW.pack(0, *(strides.get(name, 0) for name in "bhwdkc"))


def strides_of(call: Call) -> dict[str, dict[str, int]]:
    """The byte strides of every tensor of a call."""
    found = {}
    for name, geometry in call.views.items():
        kinds = {5: "bhwkc", 6: "bhwdkc"} if name.endswith("logits") else {3: "bhw", 4: "bhwc", 5: "bhwdc"}
        dims = "" if geometry is None else kinds[len(geometry[0])]
        found[name] = byte_strides(geometry, dims, {"mask": 1, "n": 4}.get(name, call.dtype.itemsize))
    return found


def alignment(call: Call) -> int:
    """The largest power of two up to 16 that divides every address and stride of wide loads; the element size if
    channels are not contiguous. Parameters of groups are loaded one by one and need no alignment."""
    bits, size = call.alignment, call.dtype.itemsize
    for (name, geometry), strides in zip(call.views.items(), strides_of(call).values(), strict=True):
        if geometry is None or name in ("mask", "n") or (call.share > 1 and geometry[0][-1] != call.shape[-1]):
            continue
        if strides.pop("c") != size:
            return size
        for stride in strides.values():
            bits |= stride
    return max(bits & -bits, 1)


RIGHT = 2  # the first direction whose lines are columns

# Fixed macros of common.cuh for a kernel that uses only its types and arithmetic, so that it has no variants.
PLAIN = {"NORMALISE": 1, "MERGE": 0, "SPLIT": 1, "HALO": 0, "NARROW": 0, "MASKED": 0}
PLAIN |= {"SHARE": 0, "FORGET": 0, "MEAN": 0}


def merge_defines(dtype: torch.dtype, vec: int) -> Macros:
    """The macros of kernels/merge.cu."""
    return macros({"DTYPE": DTYPE_CODES[dtype], "VEC": vec, "STAGES": 2, "THREADS": 256, **PLAIN})


def scan_defines(
    cut: TileConfig, p: Problem, dtype: int, *, masked: bool, merged: bool, save: bool | None
) -> dict[str, int]:
    """The macros of kernels/forward.cu, or of backward.cu, which has no `save`."""
    defines = {"DTYPE": dtype, "VEC": cut.vec, "STAGES": cut.stages, "THREADS": cut.thread_bound(p)}
    defines |= {"SPLIT": cut.split, "HALO": cut.halo_width(), "NARROW": cut.partial_sector(p), "MASKED": masked}
    defines |= {"NORMALISE": p.normalise, "SHARE": p.share > 1, "FORGET": p.keep, "MEAN": p.mean, "MERGE": merged}
    return {name: int(value) for name, value in (defines if save is None else defines | {"SAVE": save}).items()}


def problem(call: Call) -> Problem:
    """The properties of a call from which its tile config is chosen."""
    b, h, w, c = call.shape
    sideways = any(code >= RIGHT for code in call.codes)
    sizes = (call.dtype.itemsize, b, c, len(call.codes), max(h, w), alignment(call), call.share)
    gated, keep = (call.views[name] is not None for name in ("u", "keep"))
    return Problem(call.name == "backward", gated, *sizes, keep, sideways, call.mean)


@functools.lru_cache(maxsize=1024)
def prepare(call: Call) -> Launch | None:
    """Choose the tile config, compile and load the kernel, and pack the arguments. None if lines are too long."""
    p, gpu = problem(call), call.gpu.machine
    cut = call.cut or choose(p, gpu)
    if cut is None:
        return None
    if call.cut is not None and not cut.fits(p, gpu):
        raise ValueError(f"{cut} does not fit {p}")
    b, h, w, c = call.shape
    directions = len(call.codes)
    masked, save = (call.views[name] is not None for name in ("mask", "h"))
    saves = save if call.name == "forward" else None
    defines = scan_defines(cut, p, DTYPE_CODES[call.dtype], masked=masked, merged=call.merged, save=saves)
    shared = cut.shared_bytes(p)
    function = call.gpu.load(call.name, f"scan_{call.name}", macros(defines), shared)
    codes = (*call.codes, 0, 0, 0)[:4]
    cuts = (c // cut.vec, cut.lanes, cut.groups(p), cut.rows(p), cut.own(p), p.longest, call.chunk)
    packed = b"".join(view(strides) for strides in strides_of(call).values())
    packed += struct.pack("<16i", b, h, w, c, directions, *codes, *cuts)
    slots = [(0, n * VIEW.size) for n in range(len(call.geometries))]
    return Launch(call.gpu, function, (cut.blocks(p),), cut.threads(p), shared, [packed], slots)


def sum_directions(gpu: Gpu, planes: Tensor, out: Tensor) -> None:
    """Write the sum of `planes` [B, H, W, D, C] over directions, which are stored one by one, to `out` [B, H, W, C]."""
    _merge(gpu, out.dtype, out.numel(), planes.shape[3])((planes.data_ptr(), out.data_ptr()))


@functools.lru_cache(maxsize=1024)
def _merge(gpu: Gpu, dtype: torch.dtype, count: int, directions: int) -> Launch:
    """A launch that sums the outputs of all directions, [D, count], in float32 and a fixed order."""
    size = dtype.itemsize
    wide = 16 // size if count % (16 // size) == 0 else 1
    function = gpu.load("merge", "merge", merge_defines(dtype, wide), 0)
    values = [struct.pack("<q", v) for v in (0, 0, count // wide, count * size)] + [struct.pack("<i", directions)]
    return Launch(gpu, function, (-(-(count // wide) // 256),), 256, 0, values, [(0, 0), (1, 0)])


def addresses_of(tensors: Sequence[Tensor | None]) -> tuple[list[int], tuple[Geometry | None, ...]]:
    """The addresses (0 for None) and geometries of tensors."""
    found = [0 if t is None else t.data_ptr() for t in tensors]
    return found, tuple([None if t is None else (t.shape, t.stride()) for t in tensors])


def gpu_behind(x: Tensor) -> Gpu:
    """The GPU of a tensor for which `unsupported_reason` returned None."""
    gpu = gpu_of(x.device)
    assert gpu is not None
    return gpu
