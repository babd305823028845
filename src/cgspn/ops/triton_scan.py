"""The Triton backend, for GPUs without the CUDA backend: the functions of torch_scan.py.

The kernels do not implement masks and normalised states, which are expressed by their inputs. The backward recomputes
the state in float32 (float64 for float64 inputs) instead of saving it, so its gradients do not use a rounded state.
Lines longer than LONGEST go to the PyTorch backend. With TRITON_INTERPRET=1 in the environment it runs slowly on the
CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor
from torch.nn.functional import pad

from . import torch_scan
from .arguments import Scan
from .gpu import Gpu
from .param_groups import per_set
from .reference import SMALLEST
from .triton_kernels import scan_backward, scan_forward

LONGEST = 2048  # most positions of a line whose tile fits in the registers of a program
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


def _matrix(t: Tensor) -> Tensor:
    """A map [B, H, W, ...] or [B, H, W, D, ...] with its leading dimensions flattened, as a view if possible."""
    flat = t.flatten(0, 2 if t.dim() == 4 else 3)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _launch(
    kernel: Any, scan: Scan, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], **flags: bool
) -> None:  # fmt: skip
    """Launch on the current stream. The kernel's arguments are the tensors of the scan, then `inputs` and `outputs`."""
    x, count = scan.x, len(scan.directions)
    b, h, w, c = *x.shape[:3], x.shape[-1]
    positions, wide, warps = tile(max(h, w), c, kernel is scan_backward)
    groups = triton.cdiv(c, wide)
    grid = b * groups * count
    if grid == 0:
        return
    # even an argument that a variant does not read needs a pointer
    tensors = [_matrix(x if t is None else t) for t in (x, scan.lam, scan.u, scan.logits, scan.keep, *inputs)]
    strides = tuple(t.stride(0) for t in tensors)
    packed = sum(code << 2 * d for d, code in enumerate(scan.directions))
    sizes = (tensors[3].stride(1), h, w, c, count, groups, packed, scan.chunk, scan.share)
    flags |= {"OWN": x.dim() == 5, "NORMALISE": scan.u is not None, "KEEP": scan.keep is not None}
    constants = {"STATE": STATES[x.dtype][0], "POSITIONS": positions, "CHANNELS": wide}
    pointers = (*tensors, *(x if t is None else t for t in outputs))
    with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
        kernel[(grid,)](*pointers, strides, *sizes, **flags, **constants, num_warps=warps)


def _without_mask(scan: Scan) -> Scan:
    """An equal scan without a mask: padding has lam = u = 0, and neighbours in padding have weight 0."""
    mask, (h, w) = scan.mask, scan.x.shape[1:3]
    if mask is None:
        return scan
    around = pad(mask, (1, 1, 1, 1), value=True)
    exists = []
    for code in scan.directions:
        down, right = ((-1, 0), (1, 0), (0, -1), (0, 1))[code]  # to the previous line
        near = [(1 + (down or k), 1 + (right or k)) for k in (-1, 0, 1)]
        exists.append(torch.stack([around[:, y : y + h, x : x + w] & mask for y, x in near], -1))
    logits = scan.logits.masked_fill(~torch.stack(exists, 3)[..., None], -torch.inf)
    filled: list[Any] = [None if t is None else _inside(t, mask) for t in (scan.x, *scan[2:5])]
    x, lam, u, keep = filled
    return scan._replace(x=x, logits=logits, lam=lam, u=u, keep=keep, mask=None)


def _inside(t: Tensor, mask: Tensor) -> Tensor:
    return t.masked_fill(~mask.view(*mask.shape, *[1] * (t.dim() - 3)), 0.0)


def _counting(scan: Scan) -> Scan:
    """The scan over ones, whose output is n [B, H, W, D, G] of a normalised state, in float32 or wider."""
    ones = torch.ones_like(scan.lam, dtype=STATES[scan.x.dtype][1])
    return scan._replace(x=ones, u=ones, merge_sum=False, normalise_state=False)


def _summed(maps: Tensor) -> Tensor:
    """The sum over the directions of [B, H, W, D, C]."""
    return maps.squeeze(3) if maps.shape[3] == 1 else maps.sum(3)


def forward(scan: Scan) -> Tensor:
    """The output of `propagate_2d`."""
    if max(scan.x.shape[1:3]) > LONGEST:
        return torch_scan.forward(scan)
    scan = _without_mask(scan)
    if scan.normalise_state:  # y = u h / n
        assert scan.u is not None
        gate = scan.u / forward(_counting(scan)).clamp(min=SMALLEST)
        return forward(scan._replace(u=gate, normalise_state=False))
    y = scan.x.new_empty(scan.maps)
    _launch(scan_forward, scan, (), (y, None), SAVE=False)
    return _summed(y) if scan.merge_sum else y


def backward(dy: Tensor, scan: Scan, *_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of `forward` with respect to x, logits, lam, u and keep, in their dtypes and shapes."""
    if max(scan.x.shape[1:3]) > LONGEST:
        return torch_scan.backward(dy, scan)
    dy, scan = dy if scan.mask is None else _inside(dy, scan.mask), _without_mask(scan)
    if scan.normalise_state:
        return _backward_normalised(dy, scan)
    x, maps = scan.x, scan.maps
    state = x.new_empty(maps, dtype=STATES[x.dtype][1])
    _launch(scan_forward, scan, (), (None, state), SAVE=True)
    dx, shapes = x.new_empty(maps), (maps, maps, (*maps[:-1], 3, maps[-1]), maps)
    parameters = zip((scan.lam, scan.u, scan.logits, scan.keep), shapes)
    gradients = [None if t is None else t.new_empty(shape) for t, shape in parameters]
    _launch(scan_backward, scan, (dy,), (state, dx, *gradients), MERGED=scan.merge_sum)
    dlam, du, dlogits, dkeep = (None if t is None else per_set(t, scan.share) for t in gradients)
    return dx if x.dim() == 5 else _summed(dx), dlogits, dlam, du, dkeep


def _backward_normalised(dy: Tensor, scan: Scan) -> tuple[Tensor | None, ...]:
    """`backward` for y = (u / n) h, where the gradient of n flows through the scan over ones."""
    given, counted = scan[:5], _counting(scan)
    # two gradients that nearly cancel are added in float32
    wide: list[Any] = [None if t is None else t.to(counted.x.dtype) for t in given[1:]]
    logits, lam, u, keep = wide
    counted = counted._replace(logits=logits, lam=lam, keep=keep)
    n = forward(counted)
    least = n.clamp(min=SMALLEST)
    gated = scan._replace(logits=logits, lam=lam, u=u / least, keep=keep, normalise_state=False)
    dx, *grads = backward(dy, gated)
    dgate = grads[2]
    assert dgate is not None
    dn = torch.where(n < SMALLEST, 0.0, -dgate * u / least.square())
    _, *of_n = backward(dn, counted)
    grads = [a if a is None or b is None else a + b for a, b in zip(grads, of_n, strict=True)]
    grads[2] = dgate / least
    return dx, *(None if t is None or g is None else g.to(t.dtype) for t, g in zip(given[1:], grads, strict=True))
