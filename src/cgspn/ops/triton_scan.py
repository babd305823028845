"""The Triton backend: the functions of torch_scan.py, each one launch. For GPUs that the CUDA backend does not know.

Keeps nothing from the forward: the backward scans again for a state in float32 (float64 where the inputs are), so its
gradients do not see a rounded state. Lines longer than LONGEST go to the PyTorch backend. With TRITON_INTERPRET=1 in
the environment it runs on the CPU, slowly: for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from . import torch_scan
from .arguments import GivenScan, Scan
from .gpu import Gpu
from .param_groups import per_channel, per_set
from .triton_kernels import scan_backward, scan_forward

LONGEST = 2048  # positions of a line: beyond that a tile no longer fits in the registers of a program
LOGITS = (3, 12)  # places of logits and their gradient among the kernels' arguments
INTERPRETED = not isinstance(scan_forward, triton.runtime.JITFunction)
STATES = {
    torch.float64: (tl.float64, torch.float64),
    torch.float32: (tl.float32, torch.float32),
    torch.float16: (tl.float32, torch.float32),
    torch.bfloat16: (tl.float32, torch.float32),
}


def unsupported_reason(device: torch.device, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """The reason this backend cannot run on tensors of a device and dtype, or None."""
    served = gpu.runs_triton if gpu is not None else device.type in ("cuda", "xpu")
    if not served and not (INTERPRETED and device.type == "cpu"):
        return f"x is on {device.type!r}, which Triton does not serve"
    if dtype not in STATES:
        return f"{dtype} has no kernel; accepted: float64, float32, float16, bfloat16"
    return None


def _strides(t: Tensor | None, neighbours: bool) -> tuple[int, ...]:
    """Strides of batch, row, column, direction, neighbour, channel; 0 for those that `t` does not have."""
    if t is None:
        return (0,) * 6
    dims = {5: "bhwkc", 6: "bhwdkc"} if neighbours else {3: "bhw", 4: "bhwc", 5: "bhwdc"}
    named = dict(zip(dims[t.dim()], t.stride(), strict=True))
    return tuple(named.get(name, 0) for name in "bhwdkc")


def tile(longest: int, channels: int, backward: bool) -> tuple[int, int, int]:
    """Positions and channels of a program's tile, and its warps.

    The best of six tilings timed on an H100 at 147x147 (results/operator): 8 channels in 4 warps forward, 4 channels in
    4 warps backward; with 8 channels and 16 warps the backward's addresses spill and it takes six times as long.
    """
    positions = triton.next_power_of_2(max(longest, 2))
    wide = min(triton.next_power_of_2(channels), 8)
    most = 1024 if backward else 4096  # 8 warps at most leave a thread 255 registers
    while wide > 1 and positions * wide > most:
        wide //= 2
    return positions, wide, max(1, min(16, positions * wide // (256 if backward else 512)))


def _launch(
    kernel: Any,
    tensors: Sequence[Tensor | None],
    codes: Sequence[int],
    chunk: int = 0,
    *,
    mean: bool = False,
    **flags: bool,
) -> None:
    """Launch on the current stream of the tensors' device; `tensors` in the order of the kernel's arguments."""
    x = tensors[0]
    assert x is not None
    b, h, w, c = *x.shape[:3], x.shape[-1]
    positions, wide, warps = tile(max(h, w), c, kernel is scan_backward)
    groups = triton.cdiv(c, wide)
    grid = b * groups * len(codes)
    if grid == 0:
        return
    strides = [_strides(t, n in LOGITS) for n, t in enumerate(tensors)]
    # An argument that a variant does not read still needs a pointer.
    pointers = [x if t is None else t for t in tensors]
    packed = sum(code << 2 * d for d, code in enumerate(codes))
    sizes = (h, w, c, len(codes), groups, packed, chunk)
    flags |= {"NORMALISE": tensors[2] is not None, "KEEP": tensors[4] is not None, "MASKED": tensors[5] is not None}
    constants = {"MEAN": mean, "STATE": STATES[x.dtype][0], "POSITIONS": positions, "CHANNELS": wide}
    with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
        kernel[(grid,)](*pointers, *strides, *sizes, **flags, **constants, num_warps=warps)


def _planes(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Scratch for one map per direction: [B, H, W, D, C] by its strides, stored direction by direction."""
    return x.new_empty((count, *x.shape[:3], x.shape[-1]), dtype=dtype).permute(1, 2, 3, 0, 4)


def _expanded(scan: Scan) -> list[Tensor | None]:
    """lam, u, logits and keep for every channel: the kernels know no sets of several."""
    return [None if t is None else per_channel(t, scan.share) for t in (scan.lam, scan.u, scan.logits, scan.keep)]


def _summed(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over directions, added in the planes' dtype or better, in a fixed order."""
    return planes.sum(3).to(dtype)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _run(
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
    y: Tensor | None,
    state: Sequence[Tensor | None],
    codes: Sequence[int],
    chunk: int = 0,
    mean: bool = False,
) -> None:
    """Scan x, lam, u, logits and keep: outputs to `y`, the state and n to `state`, each [B, H, W, D, C] (or without D)
    if wanted."""
    flags = {"WRITE": y is not None, "SAVE": state[0] is not None}
    _launch(scan_forward, (*tensors, _bytes(mask), y, *state), codes, chunk, mean=mean, **flags)


def forward(scan: Scan) -> Tensor:
    """The output of `propagate_2d`."""
    x, mean = scan.x, scan.normalise_state
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.forward(scan)
    y = _planes(x, len(scan.directions), x.dtype) if scan.merge_sum else x.new_empty(scan.output)
    _run([x, *_expanded(scan)], scan.mask, y, (None, None), scan.directions, mean=mean)
    return _summed(y, x.dtype) if scan.merge_sum else y


def backward(dy: Tensor, scan: Scan, *_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of `forward` to x, logits, lam, u and keep, each in its input's dtype and shape; None for None."""
    x, mean, count = scan.x, scan.normalise_state, len(scan.directions)
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.backward(dy, scan)
    parameters = _expanded(scan)
    state, n = (_planes(x, count, STATES[x.dtype][1]) if wanted else None for wanted in (True, mean))
    _run([x, *parameters], scan.mask, None, (state, n), scan.directions, mean=mean)
    dx = _planes(x, count, x.dtype) if x.dim() == 4 else x.new_empty(x.shape)
    gradients = [None if t is None else t.new_empty(t.shape) for t in parameters]
    tensors = (x, *parameters, _bytes(scan.mask), dy, state, n, dx, *gradients)
    _launch(scan_backward, tensors, scan.directions, mean=mean)
    # a set's gradient is the sum over its channels
    dlam, du, dlogits, dkeep = (None if t is None else per_set(t, scan.share) for t in gradients)
    return _summed(dx, x.dtype) if x.dim() == 4 else dx, dlogits, dlam, du, dkeep


def line_scan_forward(scan: GivenScan) -> Tensor:
    """The output of `line_scan`."""
    x, weights, lam = scan[:3]
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.line_scan_forward(scan)
    y = x.new_empty(x.shape)
    _run([x, lam, None, weights, None], None, y, (None, None), [scan.direction], scan.chunk or 0)
    return y


def line_scan_backward(dh: Tensor, scan: GivenScan, *_saved: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of `line_scan_forward` to x, weights and lam."""
    x, weights, lam = scan[:3]
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.line_scan_backward(dh, scan)
    state = x.new_empty(x.shape, dtype=STATES[x.dtype][1])
    _run([x, lam, None, weights, None], None, None, (state, None), [scan.direction], scan.chunk or 0)
    dx, dweights, dlam = (x.new_empty(t.shape) for t in (x, weights, lam))
    tensors = (x, lam, None, weights, None, None, dh, state, None, dx, dlam, None, dweights, None)
    _launch(scan_backward, tensors, [scan.direction], scan.chunk or 0)
    return dx, dweights, dlam
