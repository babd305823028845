"""The public operators. They check their arguments, choose a backend and call the custom op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compat import is_tracing
from . import checks
from .arguments import Scan
from .backends import check_backend
from .eager import is_eager
from .functorch import check_plain, in_functorch
from .library import (
    LineScan,
    Propagate,
    by_definition,
    line_scan_op,
    propagate_2d_now,
    propagate_2d_op,
    propagate_2d_saving_op,
)
from .reference import DIRECTIONS, line_scan_reference


def _look_at_values(x: Tensor) -> bool:
    # On an accelerator the check would synchronise; traced and transformed programs have no values.
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functorch()


def propagate_2d(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    *,
    keep: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    merge: str = "sum",
    mask: Tensor | None = None,
    normalise_state: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scan a 2D grid line by line in up to four directions; each position mixes three neighbours on the previous line.

    For each direction, over lines i and per channel, with h[-1] = 0::

        h[i] = sigmoid(keep[i]) * W[i] h[i-1] + lam[i] * x[i]        y[i] = u[i] * h[i]

    W[i] is tridiagonal and row-stochastic: sigmoid(logits), normalised over the neighbours that exist. Without `keep`,
    the factor sigmoid(keep[i]) is 1, as in the paper. "down" runs from row 0 to row H-1 and "right" from column 0 to
    column W-1.

    Args:
        x: features [B, H, W, C] that all directions scan, or [B, H, W, D, C] with separate features for each direction.
            Channels last, any strides; float16, bfloat16, float32 or float64.
        logits: [B, H, W, D, 3, C], D = len(directions); neighbours j-1, j, j+1, where j grows to the right in vertical
            scans and downwards in horizontal ones. Here and below, the last dimension may be G, a divisor of C; then C
            / G consecutive channels share their parameters.
        lam: input scale [B, H, W, D, C].
        u: output gate [B, H, W, D, C].
        keep: logits of the forget gate [B, H, W, D, C], which scales the previous line. None for a factor of 1.
        directions: any non-empty subset of ("down", "up", "right", "left"), in any order.
        merge: "sum" adds the directions; "none" returns them separately.
        mask: bool [B, H, W] or None. False marks padding: there h = 0, the output is 0 and the input is ignored.
            Padding is excluded from the neighbours and the normalisation.
        normalise_state: compute y[i] = u[i] * h[i] / n[i], where n is the same recurrence over an input of ones, at
            least 1e-6. The state is then a weighted mean and does not grow with the number of lines. Requires lam >= 0.
            Not in the paper; see results/resolution.
        backend: "auto", or one of `cgspn.ops.PREFERENCE`. `cgspn.ops.explain_backend(x)` tells what "auto" picks.

    Returns:
        [B, H, W, C] for merge="sum", [B, H, W, D, C] for merge="none", in the dtype of x.
        State, normalisation and sums are float32 (float64 for float64 inputs). With torch.func transforms and in
        forward-mode AD, the float64 reference runs instead, which is slow.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported, or dtypes differ.
        ValueError: a wrong shape, device, direction, merge or backend name. On the CPU in eager mode also a value that
            is not finite, or lam < 0 with a normalised state; on a GPU this check would synchronise the device.
        RuntimeError: the requested backend cannot run here, with the reason.

    Paper: "Scaling Parallel Sequence Models to Vision Foundation Models", equations (1) and (2); docs/operator.md.
    """
    codes = checks.check_directions(directions)
    checks.check_features(x, len(codes))
    gates = {} if keep is None else {"keep": keep}
    checks.check_like(x, logits=logits, lam=lam, u=u, **gates)
    b, h, w, c = *x.shape[:3], x.shape[-1]
    sets = lam.shape[-1] if lam.ndim else 0
    if sets < 1 or c % sets:
        expected = f"expected [B, H, W, D, C] with the {c} channels of x, or a divisor"
        raise ValueError(f"lam has shape {tuple(lam.shape)}; {expected}")
    last = "C" if sets == c else "G"
    checks.check_shape("logits", logits, (b, h, w, len(codes), 3, sets), f"[B, H, W, D, 3, {last}]")
    for name, t in {"lam": lam, "u": u, **gates}.items():
        checks.check_shape(name, t, (b, h, w, len(codes), sets), f"[B, H, W, D, {last}]")
    checks.check_mask(x, mask)
    checks.check_choice("merge", merge, ("sum", "none"))
    check_backend(backend)
    if _look_at_values(x):
        checks.check_finite(mask, x=x, logits=logits, lam=lam, u=u, **gates)
        if normalise_state:
            checks.check_not_negative(mask, lam=lam)
    return scan_unchecked(Scan(x, logits, lam, u, keep, mask, codes, merge == "sum", backend, normalise_state))


propagate_2d_normalised = partial(propagate_2d, normalise_state=True)


def scan_unchecked(scan: Scan) -> Tensor:
    """`propagate_2d` without argument checks, for the layers.

    Calls the functions directly in eager mode, and otherwise the custom ops, which a traced program can contain.
    """
    tensors, arguments = scan[:5], scan[:-1]  # drop `chunk`, which only `line_scan` has
    out: Tensor
    if in_functorch():
        check_plain(scan.backend)
        return by_definition(*arguments).to(scan.x.dtype)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    eager = is_eager(*tensors, scan.mask)
    if is_tracing():
        # A trace records the op, to be differentiated later. torch.jit.trace compares names and line numbers with a
        # trace without gradients.
        out = propagate_2d_op(*arguments)
    elif wanted:
        out, *_ = Propagate.apply(*arguments) if eager else propagate_2d_saving_op(*arguments)  # type: ignore[no-untyped-call]
    else:
        out = (propagate_2d_now if eager else propagate_2d_op)(*arguments)
    return out


def line_scan(
    x: Tensor, weights: Tensor, lam: Tensor, direction: str, chunk: int | None = None, *, backend: str = "auto"
) -> Tensor:
    """Scan one direction with the given weights: the operator of the original GSPN.

    h[i] = W[i] h[i-1] + lam[i] * x[i], with h[-1] = 0. There is no normalisation and no gate. Neighbours outside the
    line are zero.

    Args:
        x: features [B, H, W, C], channels last; float16, bfloat16, float32 or float64. Any strides.
        weights: [B, H, W, 3, C]: the weights of the neighbours j-1, j and j+1 on the previous line.
        lam: input scale [B, H, W, C].
        direction: "down", "up", "right" or "left".
        chunk: restart from h = 0 every `chunk` lines, counted in the order of the scan; None never restarts.
        backend: as in `propagate_2d`.

    Returns:
        h [B, H, W, C] in the dtype of x; the state is float32 inside (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, RuntimeError: as `propagate_2d`; ValueError also for chunk < 1.

    Paper: equation (1); docs/operator.md.
    """
    checks.check_features(x)
    checks.check_like(x, weights=weights, lam=lam)
    code = checks.check_direction(direction)
    b, h, w, c = x.shape
    checks.check_shape("weights", weights, (b, h, w, 3, c), "[B, H, W, 3, C]")
    checks.check_shape("lam", lam, (b, h, w, c), "[B, H, W, C]")
    checks.check_chunk(chunk)
    check_backend(backend)
    if _look_at_values(x):
        checks.check_finite(x=x, weights=weights, lam=lam)
    if in_functorch():
        check_plain(backend)
        return line_scan_reference(x, weights, lam, direction, chunk).to(x.dtype)
    scan: Any = LineScan.apply if is_eager(x, weights, lam) else line_scan_op
    out: Tensor = scan(x, weights, lam, code, chunk, backend)
    return out
