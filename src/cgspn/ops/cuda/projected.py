"""The projected scan on CUDA. Tensor cores compute lam, u and logits from x line by line, without writing them to
memory.

The forward is kernels/projected_forward.cu. The backward saves only the inputs. It recomputes the state h, computes the
gradients of the parameters with kernels/projected_backward.cu for a part of the batch at a time, and turns them into
the gradients of x and of the weights with two matrix products. Sums have a fixed order, without atomics.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..arguments import PARAMETERS, ProjectedScan
from ..gpu import Gpu, Launch, gpu_of
from . import scan
from .compile import macros
from .launch import DTYPE_CODES, PLAIN, VIEW, Geometry, addresses_of, byte_strides, gpu_behind, merge_launch, view
from .projected_plan import OUTPUTS, ProjectedTileConfig, choose, choose_backward, depth, images
from .projected_plan import is_faster as is_faster_for

MOST_CHANNELS = 256
Directions = Sequence[int]


def unsupported_reason(x: Tensor, backward: bool = False) -> str | None:
    """The reason why the projected forward (or backward) cannot run on features `x` [B, H, W, C], or None."""
    gpu = gpu_of(x.device)
    reason = backends.unsupported_reason("cuda", x)
    if reason is not None or gpu is None:
        return reason
    if x.dtype == torch.float32:
        return "torch.float32 has no projected kernel; accepted: float16, bfloat16"
    c, longest = x.shape[3], max(x.shape[1:3])
    if c % 8 or c > MOST_CHANNELS:
        return f"x has {c} channels; the projected kernel takes a multiple of 8 up to {MOST_CHANNELS}"
    chosen = (choose_backward if backward else choose)(1, longest, c, 4, gpu.machine)
    if chosen is None:
        kernel_name = "backward" if backward else "forward"
        return f"lines of {longest} positions of {c} channels do not fit a block of the projected {kernel_name}"
    return None


def is_faster(x: Tensor, directions: Directions) -> bool:
    """Whether the projected forward can run on `x` and is faster than a separate projection and scan."""
    b, h, w, c = x.shape
    return unsupported_reason(x) is None and is_faster_for(b, max(h, w), c, len(directions), gpu_behind(x).machine)


def projected_defines(
    cut: ProjectedTileConfig, channels: int, dtype: int, *, masked: bool, gated: bool | None
) -> dict[str, int]:
    """The macros of kernels/projected_forward.cu, or of projected_backward.cu, which has no `gated`."""
    defines = {**PLAIN, "DTYPE": dtype, "VEC": 8, "DEPTH": depth(channels), "MASKED": int(masked)}
    defines |= {"TILES": cut.tiles, "ROW_WARPS": cut.row_warps, "GROUPS": cut.groups, "STAGES": cut.stages}
    defines |= {"THREADS": cut.threads}
    return defines if gated is None else defines | {"GATED": int(gated)}


@functools.lru_cache(maxsize=1024)
def _prepare(
    name: str, gpu: Gpu, dtype: torch.dtype, codes: tuple[int, ...], cut: ProjectedTileConfig, gated: bool,
    geometries: tuple[Geometry | None, ...], dims: tuple[str, ...],
) -> Launch:  # fmt: skip
    """The launch of a pass without its addresses. Raises ValueError if lines are too long for `cut`."""
    assert geometries[0] is not None
    b, h, w, c = geometries[0][0]
    if max(h, w) > cut.line:
        raise ValueError(f"{cut} has room for {cut.line} positions; a line has {max(h, w)}")
    backward, masked = name == "projected_backward", geometries[3] is not None
    defines = projected_defines(cut, c, DTYPE_CODES[dtype], masked=masked, gated=None if backward else gated)
    shared = cut.shared_bytes(c, backward)
    function = gpu.load(name, name, macros(defines), shared)
    numbers = (b, h, w, c, len(codes), *(*codes, 0, 0, 0)[:4], c // 8, -(-c // (16 * cut.groups)))
    sizes = {"bhw": 1, "bdkc": 4}  # of masks and of the sums of bias gradients
    packed = b"".join(view(byte_strides(g, d, sizes.get(d, dtype.itemsize))) for g, d in zip(geometries, dims))
    packed += struct.pack("<11i4x", *numbers)
    slots = [(0, n * VIEW.size) for n in range(len(dims))]
    return Launch(gpu, function, (cut.blocks(b, c, len(codes)),), cut.threads, shared, [packed], slots)


def _run(
    name: str, tensors: Sequence[Tensor | None], dims: tuple[str, ...], codes: Directions, cut: ProjectedTileConfig,
    gated: bool = True,
) -> None:  # fmt: skip
    x = tensors[0]
    assert x is not None
    addresses, geometries = addresses_of(tensors)
    _prepare(name, gpu_behind(x), x.dtype, tuple(codes), cut, gated, geometries, dims)(addresses)


def _cut_for(x: Tensor, codes: Directions, backward: bool = False) -> ProjectedTileConfig:
    b, h, w, c = x.shape
    cut = (choose_backward if backward else choose)(b, max(h, w), c, len(codes), gpu_behind(x).machine)
    assert cut is not None  # checked by unsupported_reason
    return cut


def _inputs(p: ProjectedScan) -> ProjectedScan:
    """The same arguments with x, weight and bias aligned for 16-byte loads."""
    bias = None if p.bias is None else scan.aligned(p.bias.contiguous())
    return p._replace(x=scan.aligned(p.x), weight=scan.aligned(p.weight.contiguous()), bias=bias)


def _forward(p: ProjectedScan, target: Tensor, cut: ProjectedTileConfig | None, gated: bool) -> None:
    tensors = (*p[:3], scan.mask_bytes(p.mask), target)
    dims = ("bhwc", "kc", "c", "bhw", "bhwdc")
    _run("projected_forward", tensors, dims, p.directions, cut or _cut_for(p.x, p.directions), gated)


def forward(p: ProjectedScan, cut: ProjectedTileConfig | None = None) -> Tensor:
    """The output of `propagate_2d_projected`.

    `cut` is for benchmarks; None takes that of projected_plan.py. Raises ValueError if lines are too long for it.
    """
    p, directions = _inputs(p), len(p.directions)
    y = scan.empty(p.x.shape if p.merge_sum else (*p.x.shape[:3], directions, p.x.shape[3]), p.x)
    merged = p.merge_sum and directions > 1
    target = scan.planes(p.x, p.directions) if merged else y.unsqueeze(3) if p.merge_sum else y
    _forward(p, target, cut, True)
    if merged:
        merge_launch(gpu_behind(y), y.dtype, y.numel(), directions)((target.data_ptr(), y.data_ptr()))
    return y


def state(p: ProjectedScan) -> Tensor:
    """The state h [B, H, W, D, C] of `forward` in the dtype of x, for `scan.backward`."""
    p = _inputs(p)
    h = scan.planes(p.x, p.directions)
    _forward(p, h, None, False)
    return h


def backward(dy: Tensor, p: ProjectedScan, cut: ProjectedTileConfig | None = None) -> tuple[Tensor, ...]:
    """Gradients of `forward` with respect to x, weight and bias ([0] without a bias), in the dtype of x.

    Temporary memory: 6 D + D maps for as many images as fill the GPU.
    """
    p, dy = _inputs(p), scan.aligned(dy)
    x, weight, bias, mask, directions = p[:5]
    (b, _, _, c), d = x.shape, len(directions)
    cut = cut or _cut_for(x, directions, backward=True)
    # one product with the weights covers the gradients of the parameters and the direct gradient of x
    identity = torch.eye(c, dtype=x.dtype, device=x.device).expand(d, 1, c, c)
    extended = torch.cat([weight.view(d, PARAMETERS, c, c), identity], 1).view(d * OUTPUTS * c, c)
    dx, dbias = scan.empty(x.shape, x), scan.empty((b, d, PARAMETERS, c), x.new_empty(0, dtype=torch.float32))
    dweight = torch.zeros(d * OUTPUTS * c, c, dtype=torch.float32, device=x.device)
    step = images(b, cut, c, d, gpu_behind(x).machine)
    dims = ("bhwc", "kc", "c", "bhw", "bhwc" if p.merge_sum else "bhwdc", "bhwdc", "bhwdkc", "bdkc")
    for part in range(0, b, step):
        here = slice(part, part + step)
        inside = None if mask is None else mask[here]
        h, out = state(p._replace(x=x[here], mask=inside)), scan.empty((*x[here].shape[:3], d, OUTPUTS, c), x)
        tensors = (x[here], weight, bias, scan.mask_bytes(inside), dy[here], h, out, dbias[here])
        _run("projected_backward", tensors, dims, directions, cut)
        flat = out.view(len(out), -1, d * OUTPUTS * c)
        torch.mm(flat.view(-1, d * OUTPUTS * c), extended, out=dx[here].view(-1, c))
        seen = x[here] if inside is None else x[here].where(inside.unsqueeze(-1), 0)  # padding may hold any value
        # one product per image, then a sum in a fixed order: this has more blocks than one long product
        dweight += torch.bmm(flat.transpose(1, 2), seen.reshape(len(out), -1, c)).float().sum(0)
    kept = dweight.view(d, OUTPUTS, c, c)[:, :PARAMETERS].reshape(weight.shape)
    return dx, kept.to(x.dtype), x.new_empty(0) if bias is None else dbias.sum(0).flatten().to(x.dtype)
