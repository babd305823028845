"""The CUDA backend: the functions of torch_scan.py, each as one launch of a kernel in kernels/.

Besides the inputs, `forward_saving` saves the state h [B, H, W, D, C] in the inputs' dtype for the backward. For a
normalised state it saves h / n, and n in float32 because n can overflow float16. The backward recomputes weights and
gated outputs line by line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import backends, replay
from ..arguments import Scan
from ..gpu import Gpu
from ..param_groups import per_channel, per_set
from .launch import ARGUMENTS, DTYPE_CODES, Call, addresses_of, gpu_behind, prepare, sum_directions
from .plan import TileConfig

MIN_CAPABILITY = (8, 0)
MASK = ARGUMENTS["forward"].index("mask")  # the same index in "backward"


def unsupported_reason(device: torch.device, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """The reason why this backend cannot run on a device and dtype, or None."""
    if gpu is None:
        return "PyTorch sees no CUDA GPU" if device.type == "cuda" else f"x is on {device.type!r}, not on a CUDA device"
    if dtype not in DTYPE_CODES:
        return f"{dtype} has no kernel; accepted: float32, float16, bfloat16"
    if gpu.capability < MIN_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return gpu.compiler_reason()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Allocate an output or scratch tensor. Tests replace this function to fill tensors with NaN."""
    return replay.empty(shape, like.dtype, like.device)


def _launch(
    name: str, scan: Scan, tensors: Sequence[Tensor | None], share: int, cut: TileConfig | None, first: Tensor,
    out: Tensor,
) -> bool:  # fmt: skip
    """Launch with `tensors` in the order of ARGUMENTS. Those with fewer channels than x are parameters of groups of
    `share` channels. If `first` is not `out`, it holds one output per direction, and their sum is written to `out`.
    Returns False without a launch if the lines are too long for the kernels.
    """
    x, (addresses, geometries) = scan.x, addresses_of(tensors)
    bits = 16
    for n, (address, geometry) in enumerate(zip(addresses, geometries)):
        # single parameters need no alignment
        if n != MASK and geometry is not None and (share == 1 or geometry[0][-1] == x.shape[-1]):
            bits |= address
    gpu, rest = gpu_behind(x), (bits & -bits, first is not out, share, scan.normalise_state, scan.chunk, cut)
    launch = prepare(Call(name, gpu, x.dtype, tuple(scan.directions), geometries, *rest))
    if launch is None:
        return False
    launch(addresses)
    if first is not out:
        sum_directions(gpu, first, out)
    return True


def _for_long_lines(x: Tensor) -> ModuleType:
    """The backend for lines that are too long for a thread block: Triton, or PyTorch."""
    return backends.backend_module("torch" if backends.unsupported_reason("triton", x) else "triton")


def planes(x: Tensor, directions: Sequence[int]) -> Tensor:
    """Scratch memory for one output per direction: a view [B, H, W, D, C], stored direction by direction."""
    return empty((len(directions), *x.shape[:3], x.shape[-1]), x).permute(1, 2, 3, 0, 4)


def vector_width(scan: Scan) -> int:
    """The channels of a parameter group that one thread handles: the largest power of two that divides the group."""
    bits = 16 // scan.x.element_size() | scan.share
    return bits & -bits


def aligned(x: Tensor, width: int | None = None) -> Tensor:
    """`x`, or a copy of it, aligned so that `width` channels (by default up to 16 bytes) can be read in one load."""
    width = width or math.gcd(16 // x.element_size(), x.shape[-1])
    bits = x.data_ptr() // x.element_size()
    for stride, size in zip(x.stride()[:-1], x.shape):
        bits |= stride if size > 1 else 0
    readable = width == 1 or (x.stride(-1) == 1 and bits % width == 0)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as bytes, as the kernels read it."""
    return None if mask is None else mask.view(torch.uint8)


def _inputs(scan: Scan) -> tuple[int, int, list[Tensor | None]]:
    """Channels per thread, threads per parameter group, and x, lam, u, logits and keep with one value per thread.

    An unaligned x is copied, which takes fewer bytes than parameters for every channel.
    """
    share = vector_width(scan)
    times, parameters = scan.share // share, (scan.lam, scan.u, scan.logits, scan.keep)
    return share, times, [aligned(scan.x, share), *[None if t is None else per_channel(t, times) for t in parameters]]


def forward(scan: Scan, cut: TileConfig | None = None, h: Tensor | None = None, n: Tensor | None = None) -> Tensor:
    """The output of `propagate_2d`; the state and n are written to `h` and `n`. `cut` is for benchmarks. Raises
    ValueError if it does not fit."""
    share, _, given = _inputs(scan)
    y = empty(scan.output, scan.x)
    merged = scan.merge_sum and len(scan.directions) > 1
    first = planes(scan.x, scan.directions) if merged else y
    tensors = (*given, first, h, mask_bytes(scan.mask), n)
    if not _launch("forward", scan, tensors, share, cut, first, y):
        y = _for_long_lines(scan.x).forward(scan)
    return y


def saved_shapes(scan: Scan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the saved tensors that `forward_saving` returns after the output."""
    sets = scan.x.shape[-1] // vector_width(scan)
    return scan.maps, (*scan.maps[:-1], sets) if scan.normalise_state else (0,)


def forward_saving(scan: Scan, cut: TileConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` that also returns the state [B, H, W, D, C] in the dtype of x, and n in float32 for a normalised state
    (else [0]), for `backward`."""
    shapes = saved_shapes(scan)
    h, n = empty(shapes[0], scan.x), empty(shapes[1], scan.x.new_empty(0, dtype=torch.float32))
    return forward(scan, cut, h, n if scan.normalise_state else None), h, n


def backward(
    dy: Tensor, scan: Scan, h: Tensor | None = None, n: Tensor | None = None, cut: TileConfig | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `forward` with respect to x, logits, lam, u and keep, each in its input's dtype and shape, or None.

    h, n: saved by `forward_saving`, or by `forward` without a gate; if None, they are recomputed. into: tensors of any
    strides for the gradients of lam, u and the logits, only if every channel has its own parameters.
    """
    if h is None:
        h, n = forward_saving(scan)[1:] if scan.u is not None else (forward(scan), None)
    share, times, given = _inputs(scan)
    x = scan.x
    dx = empty(x.shape, x)
    gradients = [*into, None] if into is not None else [None if t is None else empty(t.shape, x) for t in given[1:]]
    first = planes(x, scan.directions) if x.dim() == 4 and len(scan.directions) > 1 else dx
    seen = (aligned(dy), h, mask_bytes(scan.mask))
    tensors = (*given, *seen, first, *gradients, n if scan.normalise_state else None)
    if not _launch("backward", scan, tensors, share, cut, first, dx):
        grads: tuple[Tensor | None, ...] = _for_long_lines(x).backward(dy, scan)
        for target, gradient in zip(into or (), (grads[2], grads[3], grads[1])):
            assert gradient is not None
            target.copy_(gradient)
        return grads
    dlam, du, dlogits, dkeep = (None if g is None else per_set(g, times) for g in gradients)
    return dx, dlogits, dlam, du, dkeep
