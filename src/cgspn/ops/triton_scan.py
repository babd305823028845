"""The Triton backend: the functions of torch_scan.py, one launch each. It is for GPUs that the CUDA backend does not
support.

The backward recomputes the state in float32 (float64 for float64 inputs) instead of saving it, so its gradients do not
use a rounded state. Lines longer than LONGEST go to the PyTorch backend. With TRITON_INTERPRET=1 in the environment it
runs slowly on the CPU, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from . import torch_scan
from .arguments import Scan
from .gpu import Gpu
from .param_groups import per_channel, per_set
from .triton_kernels import scan_backward, scan_forward

LONGEST = 2048  # most positions of a line whose tile fits in the registers of a program
LOGITS = (3, 12)  # indices of the logits and their gradient in the kernels' arguments
INTERPRETED = not isinstance(scan_forward, triton.runtime.JITFunction)
STATES = {
    torch.float64: (tl.float64, torch.float64),
    torch.float32: (tl.float32, torch.float32),
    torch.float16: (tl.float32, torch.float32),
    torch.bfloat16: (tl.float32, torch.float32),
}


def unsupported_reason(device: torch.device, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """The reason why this backend cannot run on a device and dtype, or None."""
    served = gpu.runs_triton if gpu is not None else device.type in ("cuda", "xpu")
    if not served and not (INTERPRETED and device.type == "cpu"):
        return f"x is on {device.type!r}, which Triton does not support"
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
    """Positions and channels of a program's tile, and its number of warps.

    The best of six tilings timed on an H100 at 147x147 (results/operator): 8 channels in 4 warps forward, 4 channels in
    4 warps backward; with 8 channels and 16 warps the backward's addresses spill and it takes six times as long.
    """
    positions = triton.next_power_of_2(max(longest, 2))
    wide = min(triton.next_power_of_2(channels), 8)
    most = 1024 if backward else 4096  # 8 warps at most leave a thread 255 registers
    while wide > 1 and positions * wide > most:
        wide //= 2
    return positions, wide, max(1, min(16, positions * wide // (256 if backward else 512)))


def _launch(kernel: Any, scan: Scan, *tensors: Tensor | None, **flags: bool) -> None:
    """Launch on the current stream. `tensors` follow x, lam, u, logits, keep and the mask in the kernel's arguments."""
    x = scan.x
    b, h, w, c = *x.shape[:3], x.shape[-1]
    positions, wide, warps = tile(max(h, w), c, kernel is scan_backward)
    groups = triton.cdiv(c, wide)
    grid = b * groups * len(scan.directions)
    if grid == 0:
        return
    mask = None if scan.mask is None else scan.mask.view(torch.uint8)
    tensors = (x, scan.lam, scan.u, scan.logits, scan.keep, mask, *tensors)
    strides = [_strides(t, n in LOGITS) for n, t in enumerate(tensors)]
    # Even an argument that a variant does not read needs a pointer.
    pointers = [x if t is None else t for t in tensors]
    packed = sum(code << 2 * d for d, code in enumerate(scan.directions))
    sizes = (h, w, c, len(scan.directions), groups, packed, scan.chunk)
    flags |= {"NORMALISE": scan.u is not None, "KEEP": scan.keep is not None, "MASKED": mask is not None}
    constants = {"STATE": STATES[x.dtype][0], "POSITIONS": positions, "CHANNELS": wide}
    with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
        kernel[(grid,)](*pointers, *strides, *sizes, **flags, MEAN=scan.normalise_state, **constants, num_warps=warps)


def _planes(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory for one map per direction: a view [B, H, W, D, C], stored direction by direction."""
    return x.new_empty((count, *x.shape[:3], x.shape[-1]), dtype=dtype).permute(1, 2, 3, 0, 4)


def _expanded(scan: Scan) -> Scan:
    """Expand lam, u, logits and keep to every channel, because the kernels do not support parameter groups."""
    fields: list[Any] = list(scan)
    fields[1:5] = [None if t is None else per_channel(t, scan.share) for t in fields[1:5]]
    return Scan(*fields)


def _summed(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over directions in a fixed order, in the dtype of the planes or a wider one."""
    return planes.sum(3).to(dtype)


def forward(scan: Scan) -> Tensor:
    """The output of `propagate_2d`."""
    x, count = scan.x, len(scan.directions)
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.forward(scan)
    merged = scan.merge_sum and count > 1
    y = _planes(x, count, x.dtype) if merged else x.new_empty(scan.output)
    _launch(scan_forward, _expanded(scan), y, None, None, WRITE=True, SAVE=False)
    return _summed(y, x.dtype) if merged else y


def backward(dy: Tensor, scan: Scan, *_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of `forward` with respect to x, logits, lam, u and keep, in the inputs' dtypes and shapes; None for
    None.
    """
    x, count = scan.x, len(scan.directions)
    if max(x.shape[1:3]) > LONGEST:
        return torch_scan.backward(dy, scan)
    wide = _expanded(scan)
    state, n = (_planes(x, count, STATES[x.dtype][1]) if wanted else None for wanted in (True, scan.normalise_state))
    _launch(scan_forward, wide, None, state, n, WRITE=False, SAVE=True)
    merged = x.dim() == 4 and count > 1
    dx = _planes(x, count, x.dtype) if merged else x.new_empty(x.shape)
    gradients = [None if t is None else t.new_empty(t.shape) for t in (wide.lam, wide.u, wide.logits, wide.keep)]
    _launch(scan_backward, wide, dy, state, n, dx, *gradients)
    # a group's gradient is the sum over its channels
    dlam, du, dlogits, dkeep = (None if t is None else per_set(t, scan.share) for t in gradients)
    return _summed(dx, x.dtype) if merged else dx, dlogits, dlam, du, dkeep
