"""The CUDA backend: the functions of torch_scan.py, each one launch of a kernel in kernels/.

Saved for the backward besides the inputs: the state h [B, H, W, D, C] in the inputs' dtype, which the forward writes
on the way (`forward_saving`). Nothing normalised, gated or merged is kept; the backward recomputes it line by line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import replay, torch_scan
from ..gpu import Gpu
from ..param_groups import features, per_channel, per_set
from .launch import DTYPE_CODES, Call, addresses_of, gpu_behind, prepare
from .plan import TileConfig

MIN_CAPABILITY = (8, 0)


def unsupported_reason(device: torch.device, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """The reason this backend cannot run on tensors of a device and dtype, or None."""
    if gpu is None:
        return "PyTorch sees no CUDA GPU" if device.type == "cuda" else f"x is on {device.type!r}, not on a CUDA device"
    if dtype not in DTYPE_CODES:
        return f"{dtype} has no kernel; accepted: float32, float16, bfloat16"
    if gpu.capability < MIN_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return gpu.compiler_reason()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Where every output and scratch tensor comes from; tests replace it to fill them with NaN."""
    return replay.empty(shape, like.dtype, like.device)


def _scan(
    name: str,
    tensors: Sequence[Tensor | None],
    dims: tuple[str, ...],
    codes: Sequence[int],
    normalise: bool,
    mask: int,
    planes: int | None = None,
    save: bool = False,
    chunk: int | None = None,
    cut: TileConfig | None = None,
    share: int = 1,
    keep: bool = False,
) -> bool:
    """Launch. `tensors` in the order of the kernel's views; `mask` is the index of the mask, `planes` that of what is
    merged into the last.

    Tensors with fewer channels than x are parameters of sets of `share` channels. keep: there is a forget gate.

    False, with nothing done, where the lines are too long for the kernels.
    """
    x = tensors[0]
    assert x is not None
    addresses, geometries = addresses_of(tensors)
    c, bits = x.shape[-1], 16
    for n, (address, geometry) in enumerate(zip(addresses, geometries)):
        if n != mask and geometry is not None and (share == 1 or geometry[0][-1] == c):  # single parameters need none
            bits |= address
    masked, merged = geometries[mask] is not None, planes is not None
    flags = (normalise, masked, merged, save, chunk or 0, share, keep, cut)
    prepared = prepare(Call(name, gpu_behind(x), x.dtype, tuple(codes), geometries, dims, bits & -bits, *flags))
    if prepared is None:
        return False
    prepared.scan(addresses)
    if prepared.merge is not None and planes is not None:
        prepared.merge((addresses[planes], addresses[-1]))
    return True


def planes(x: Tensor, directions: Sequence[int]) -> Tensor:
    """Scratch for one plane per direction: [B, H, W, D, C] by its strides, stored direction by direction."""
    return empty((len(directions), *x.shape[:3], x.shape[-1]), x).permute(1, 2, 3, 0, 4)


def vector_width(x: Tensor, lam: Tensor) -> int:
    """How many channels of a set a thread can take: the largest power of two that they and the addresses of x allow."""
    each = x.shape[-1] // lam.shape[-1]
    bits = 16 // x.element_size() | each
    if each > 1:
        if x.stride(-1) != 1:
            return 1
        strides = [s for s, n in zip(x.stride()[:-1], x.shape) if n > 1]
        for offset in (x.data_ptr() // x.element_size(), *strides):
            bits |= offset
    return bits & -bits


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if mask is None else mask.view(torch.uint8)


def readable(t: Tensor) -> Tensor:
    """`t` in a layout that wide loads can read: autograd may hand over expanded or transposed cotangents."""
    step = 16 // t.element_size()
    wide = t.stride(-1) == 1 and all(s % step == 0 for s in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if wide else t.contiguous()


def _forward(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    h: Tensor | None,
    cut: TileConfig | None,
    keep: Tensor | None,
) -> Tensor:
    share = vector_width(x, lam)
    times = x.shape[-1] // lam.shape[-1] // share
    given = [None if t is None else per_channel(t, times) for t in (lam, u, logits, keep)]
    merged = merge_sum and len(directions) > 1
    shape = (*x.shape[:3], x.shape[-1])
    y = empty(shape if merge_sum else (*shape[:3], len(directions), shape[3]), x)
    first = planes(x, directions) if merged else y.unsqueeze(3) if merge_sum else y
    done = _scan(
        "forward",
        (x, *given, first, h, mask_bytes(mask), y if merged else None),
        (features(x), "bhwdc", "bhwdc", "bhwdkc", "bhwdc", "bhwdc", "bhwdc", "bhw", "bhwc"),
        directions,
        True,
        mask=7,
        planes=5 if merged else None,
        save=h is not None,
        cut=cut,
        share=share,
        keep=keep is not None,
    )
    return y if done else torch_scan.forward(x, logits, lam, u, mask, directions, merge_sum, keep)


def forward(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    keep: Tensor | None = None,
    cut: TileConfig | None = None,
) -> Tensor:
    """`propagate_2d` without checks. Shapes as there; `directions` are indices into DIRECTIONS.

    `cut` is for measurements; the plan's own otherwise. Raises ValueError for one that does not fit.
    """
    return _forward(x, logits, lam, u, mask, directions, merge_sum, None, cut, keep)


def forward_saving(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    keep: Tensor | None = None,
    cut: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward`, and the state h [B, H, W, D, C] that `backward_saved` takes, in the dtype of x."""
    h = empty((*x.shape[:3], len(directions), x.shape[-1]), x)
    return _forward(x, logits, lam, u, mask, directions, merge_sum, h, cut, keep), h


def backward_saved(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    h: Tensor,
    keep: Tensor | None = None,
    cut: TileConfig | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `forward` to x, logits, lam, u and, if it is there, keep, each in its input's dtype and shape.

    into: where the gradients of lam, u and the logits go, of any strides; for one set of parameters a channel.
    """
    share = vector_width(x, lam)
    times = x.shape[-1] // lam.shape[-1] // share
    given = [None if t is None else per_channel(t, times) for t in (lam, u, logits, keep)]
    merged = x.dim() == 4 and len(directions) > 1
    dx = empty(x.shape, x)
    gradients = [*into, None] if into is not None else [None if t is None else empty(t.shape, x) for t in given]
    first = planes(x, directions) if merged else dx if x.dim() == 5 else dx.unsqueeze(3)
    dy = readable(dy)
    maps = "bhwdc"
    of_sets = (maps, maps, "bhwdkc", maps)
    done = _scan(
        "backward",
        (x, *given, dy, h, mask_bytes(mask), first, *gradients, dx if merged else None),
        (features(x), *of_sets, "bhwc" if merge_sum else maps, maps, "bhw", maps, *of_sets, "bhwc"),
        directions,
        True,
        mask=7,
        planes=8 if merged else None,
        cut=cut,
        share=share,
        keep=keep is not None,
    )
    if not done:
        grads = torch_scan.backward(dy, x, logits, lam, u, mask, directions, merge_sum, keep)
        for target, gradient in zip(into or (), (grads[2], grads[3], grads[1])):
            target.copy_(gradient)
        return grads
    dlam, du, dlogits, *dkeep = (per_set(g, times) for g in gradients if g is not None)
    return dx, dlogits, dlam, du, *dkeep


def backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    keep: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`backward_saved` without a saved state: the forward runs again for it."""
    _, h = forward_saving(x, logits, lam, u, mask, directions, merge_sum, keep)
    return backward_saved(dy, x, logits, lam, u, mask, directions, merge_sum, h, keep)


def line_scan_forward(
    x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None, cut: TileConfig | None = None
) -> Tensor:
    """`line_scan` without checks. Shapes as there; `cut` as in `forward`."""
    h = empty(x.shape, x)
    done = _scan(
        "forward",
        (x, lam, None, weights, None, h, None, None, None),
        ("bhwc", "bhwc", "", "bhwkc", "", "bhwc", "", "", ""),
        [direction],
        False,
        mask=7,
        chunk=chunk,
        cut=cut,
    )
    return h if done else torch_scan.line_scan_forward(x, weights, lam, direction, chunk)


def line_scan_backward_saved(
    dh: Tensor,
    x: Tensor,
    weights: Tensor,
    lam: Tensor,
    direction: int,
    chunk: int | None,
    h: Tensor,
    cut: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `line_scan_forward` to x, weights and lam; `h` is what it returned."""
    dx, dweights, dlam = (empty(t.shape, x) for t in (x, weights, lam))
    dh = readable(dh)
    done = _scan(
        "backward",
        (x, lam, None, weights, None, dh, h, None, dx, dlam, None, dweights, None, None),
        ("bhwc", "bhwc", "", "bhwkc", "", "bhwc", "bhwc", "", "bhwc", "bhwc", "", "bhwkc", "", ""),
        [direction],
        False,
        mask=7,
        chunk=chunk,
        cut=cut,
    )
    if not done:
        return torch_scan.line_scan_backward(dh, x, weights, lam, direction, chunk)
    return dx, dweights, dlam


def line_scan_backward(
    dh: Tensor, x: Tensor, weights: Tensor, lam: Tensor, direction: int, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`line_scan_backward_saved` without the saved output: the forward runs again for it."""
    return line_scan_backward_saved(
        dh, x, weights, lam, direction, chunk, line_scan_forward(x, weights, lam, direction, chunk)
    )
