"""The projected scan on CUDA: tensor cores compute lam, u and logits from x line by line, without writing them to
memory (kernels/projected_forward.cu).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..arguments import ProjectedScan
from ..gpu import Gpu, Launch, gpu_of
from . import scan
from .compile import macros
from .launch import DTYPE_CODES, PLAIN, VIEW, Geometry, addresses_of, byte_strides, gpu_behind, sum_directions, view
from .projected_plan import MOST_CHANNELS, ProjectedTileConfig, choose, depth
from .projected_plan import is_faster as is_faster_for

DIMS = ("bhwc", "kc", "c", "bhw", "bhwdc")  # of x, weight, bias, mask and the output


def unsupported_reason(x: Tensor) -> str | None:
    """The reason why the projected scan cannot run on features `x` [B, H, W, C], or None."""
    gpu = gpu_of(x.device)
    reason = backends.unsupported_reason("cuda", x)
    if reason is not None or gpu is None:
        return reason
    if x.dtype == torch.float32:
        return "torch.float32 has no projected kernel; accepted: float16, bfloat16"
    c, longest = x.shape[3], max(x.shape[1:3])
    if c % 8 or c > MOST_CHANNELS:
        return f"x has {c} channels; the projected kernel takes a multiple of 8 up to {MOST_CHANNELS}"
    if choose(1, longest, c, 4, gpu.machine) is None:
        return f"lines of {longest} positions of {c} channels do not fit in a block of the projected kernel"
    return None


def is_faster(x: Tensor, directions: Sequence[int]) -> bool:
    """Whether the projected scan can run on `x` and is faster than a separate projection and scan."""
    b, h, w, c = x.shape
    return unsupported_reason(x) is None and is_faster_for(b, max(h, w), c, len(directions), gpu_behind(x).machine)


def projected_defines(cut: ProjectedTileConfig, channels: int, dtype: int, *, masked: bool) -> dict[str, int]:
    """The macros of kernels/projected_forward.cu."""
    defines = {**PLAIN, "DTYPE": dtype, "VEC": 8, "DEPTH": depth(channels), "MASKED": int(masked)}
    defines |= {"TILES": cut.tiles, "ROW_WARPS": cut.row_warps, "GROUPS": cut.groups, "STAGES": cut.stages}
    return defines | {"THREADS": cut.threads}


@functools.lru_cache(maxsize=1024)
def _prepare(
    gpu: Gpu, dtype: torch.dtype, codes: tuple[int, ...], cut: ProjectedTileConfig,
    geometries: tuple[Geometry | None, ...],
) -> Launch:  # fmt: skip
    """Everything of a launch except addresses. Raises ValueError if lines are too long for `cut`."""
    assert geometries[0] is not None
    b, h, w, c = geometries[0][0]
    if max(h, w) > cut.line:
        raise ValueError(f"{cut} has room for {cut.line} positions; a line has {max(h, w)}")
    defines = projected_defines(cut, c, DTYPE_CODES[dtype], masked=geometries[3] is not None)
    shared = cut.shared_bytes(c)
    function = gpu.load("projected_forward", "projected_forward", macros(defines), shared)
    numbers = (b, h, w, c, len(codes), *(*codes, 0, 0, 0)[:4], c // 8, -(-c // (16 * cut.groups)))
    packed = b"".join(view(byte_strides(g, d, 1 if d == "bhw" else 2)) for g, d in zip(geometries, DIMS))
    packed += struct.pack("<11i4x", *numbers)
    slots = [(0, n * VIEW.size) for n in range(len(DIMS))]
    return Launch(gpu, function, (cut.blocks(b, c, len(codes)),), cut.threads, shared, [packed], slots)


def forward(p: ProjectedScan, cut: ProjectedTileConfig | None = None) -> Tensor:
    """The output of `propagate_2d_projected`. `cut` is for benchmarks; None uses the config of projected_plan.py.
    Raises ValueError if lines are too long for it.
    """
    # aligned for 16-byte loads
    x, weight = scan.aligned(p.x), scan.aligned(p.weight.contiguous())
    bias = None if p.bias is None else scan.aligned(p.bias.contiguous())
    (b, h, w, c), directions, gpu = x.shape, len(p.directions), gpu_behind(x)
    y = scan.empty(x.shape if p.merge_sum else (b, h, w, directions, c), x)
    merged = p.merge_sum and directions > 1
    target = scan.planes(x, p.directions) if merged else y.unsqueeze(3) if p.merge_sum else y
    cut = cut or choose(b, max(h, w), c, directions, gpu.machine)
    assert cut is not None  # checked by unsupported_reason
    addresses, geometries = addresses_of((x, weight, bias, scan.mask_bytes(p.mask), target))
    _prepare(gpu, x.dtype, tuple(p.directions), cut, geometries)(addresses)
    if merged:
        sum_directions(gpu, target, y)
    return y
