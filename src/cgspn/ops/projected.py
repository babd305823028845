"""`propagate_2d` with its parameters made from the input inside the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import checks
from .projected_library import projected_op
from .propagate import propagate_2d
from .reference import DIRECTIONS


def propagate_2d_projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    merge: str = "sum",
    mask: Tensor | None = None,
    backend: str = "auto",
    recompute: bool = True,
    parameters: Literal["memory", "chip"] = "memory",
) -> Tensor:
    """`propagate_2d(x, logits, lam, u)` where lam, u and logits are a linear projection of `x`.

    By default the projection and the scan in turn: in the forward pass the parameters do go through memory. In training
    nothing of them is kept (`recompute`): the backward makes them again from `x`, so that a layer saves one map of C
    channels instead of 25. With `parameters="chip"` one kernel makes them line by line where it scans with them, in
    float32 instead of rounded to the dtype of x, and they never reach memory.

    Args:
        x: features [B, H, W, C], channels last.
        weight: [D * 5 * C, C], rows in the order [D, 5, C]; the five are lam, u and the logits of j-1, j, j+1.
        bias: [D * 5 * C] or None.
        directions, merge, mask, backend: as in `propagate_2d`.
        recompute: project and scan again in the backward; False keeps the parameters and the state.
        parameters: "memory", or "chip": CUDA, float16 or bfloat16, C a multiple of 8 up to 256; keeps nothing.

    Returns:
        As `propagate_2d`: [B, H, W, C] or [B, H, W, D, C], in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as `propagate_2d`; for a weight or bias of another shape, dtype or device
            than `x` asks for; RuntimeError for parameters="chip" where it cannot run, with the reason.

    Source: design section 5 ("parameters are an implementation detail of memory").
    """
    checks.check_features(x)
    checks.check_like(x, weight=weight)
    codes, c = checks.check_directions(directions), x.shape[-1]
    count = len(codes)
    checks.check_shape("weight", weight, (count * 5 * c, c), "[D * 5 * C, C]")
    if bias is not None:
        checks.check_like(x, bias=bias)
        checks.check_shape("bias", bias, (count * 5 * c,), "[D * 5 * C]")

    if parameters not in ("memory", "chip"):
        raise ValueError(f"parameters is {parameters!r}; accepted: 'memory', 'chip'")
    if parameters == "chip":
        checks.check_mask(x, mask)
        if merge not in ("sum", "none"):
            raise ValueError(f"merge is {merge!r}; accepted: 'sum', 'none'")
        if backend not in ("auto", "cuda"):
            raise ValueError(f"backend is {backend!r}; parameters='chip' accepts 'auto', 'cuda'")
        if not recompute:
            raise ValueError("recompute is False; parameters='chip' keeps nothing and accepts only True")
        made: Tensor = projected_op(x, weight, bias, mask, codes, merge == "sum")
        return made

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packed = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (count, 5, c))
        # One split, not three slices: its gradient is one concatenation instead of three zero-filled maps added up.
        lam, u, logits = packed.split([1, 1, 3], -2)
        lam, u = lam.squeeze(-2), u.squeeze(-2)
        return propagate_2d(x, logits, lam, u, directions=directions, merge=merge, mask=mask, backend=backend)

    wanted = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if recompute and torch.is_grad_enabled() and wanted:
        kept: Tensor = checkpoint(run, x, weight, bias, use_reentrant=False, preserve_rng_state=False)
        return kept
    return run(x, weight, bias)
