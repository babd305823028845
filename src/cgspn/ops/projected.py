"""`propagate_2d` with its parameters computed from the input inside the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import checks
from .arguments import ProjectedScan
from .autocast import autocast_dtype
from .backends import check_backend
from .eager import is_eager
from .functorch import check_plain, in_functorch
from .gpu import on_accelerator
from .projected_library import Projected, projected_now, projected_op
from .propagate import _look_at_values, scan_unchecked
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
    parameters: Literal["auto", "memory", "chip"] = "auto",
) -> Tensor:
    """`propagate_2d(x, logits, lam, u)` where lam, u and logits are a linear projection of `x`.

    With parameters="chip", one kernel computes the parameters line by line during the scan, in float32, and never
    writes them to memory. With "memory", the projection and the scan run one after the other. In training the
    parameters are not saved (`recompute`); the backward pass computes them again from `x`, in memory, so a layer saves
    one map of C channels instead of 25. Under torch.autocast, x, weight and bias are cast as in a linear layer.

    Args:
        x: features [B, H, W, C], channels last.
        weight: [D * 5 * C, C], with rows in the order [D, 5, C], where 5 stands for lam, u and the logits of j-1, j,
            j+1.
        bias: [D * 5 * C] or None.
        directions, merge, mask, backend: as in `propagate_2d`.
        recompute: compute projection and scan again in the backward pass; False saves the parameters and the state.
        parameters: where the forward pass computes the parameters: "memory" or "chip". "chip" needs CUDA, float16 or
            bfloat16, C a multiple of 8 up to 64, and lines that fit. "auto" uses the chip where it is faster, unless a
            backward needs saved parameters (`recompute=False`).

    Returns:
        As `propagate_2d`: [B, H, W, C] or [B, H, W, D, C], in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as `propagate_2d`, and if the shape, dtype or device of weight or bias does
            not match `x`; RuntimeError also if parameters="chip" cannot run, with the reason.

    Not in the paper: docs/operator.md, "Memory in training".
    """
    checks.check_features(x)
    x, weight, bias = _as_autocast(x, weight, bias)
    checks.check_like(x, weight=weight)
    codes, c = checks.check_directions(directions), x.shape[-1]
    checks.check_shape("weight", weight, (len(codes) * 5 * c, c), "[D * 5 * C, C]")
    if bias is not None:
        checks.check_like(x, bias=bias)
        checks.check_shape("bias", bias, (len(codes) * 5 * c,), "[D * 5 * C]")
    checks.check_mask(x, mask)
    checks.check_choice("merge", merge, ("sum", "none"))
    check_backend(backend)
    checks.check_choice("parameters", parameters, ("auto", "memory", "chip"))

    if parameters == "chip":
        if in_functorch():
            check_plain("cuda")
        if backend not in ("auto", "cuda"):
            raise ValueError(f"backend is {backend!r}; parameters='chip' accepts 'auto', 'cuda'")
        if not recompute:
            raise ValueError("recompute is False; parameters='chip' saves nothing and accepts only True")
    if _look_at_values(x):
        checks.check_finite(mask, x=x)
        checks.check_finite(weight=weight, **({} if bias is None else {"bias": bias}))
    p = ProjectedScan(x, weight, bias, mask, codes, merge == "sum", parameters, backend)
    return projected_unchecked(p, recompute)


def projected_unchecked(p: ProjectedScan, recompute: bool = True) -> Tensor:
    """`propagate_2d_projected` without argument checks, for the layers."""
    x, weight, bias = _as_autocast(*p[:3])
    p, wanted = p._replace(x=x, weight=weight, bias=bias), _wants_gradient(x, weight, bias)
    inside = p.parameters == "chip"
    if not inside:  # exported and transformed programs contain a projection and a scan instead of this operator
        inside = recompute if wanted else p.parameters == "auto" and on_accelerator(x)
        inside = inside and not torch.compiler.is_exporting() and not in_functorch()
    if not inside:
        return scan_unchecked(p.scan(linear(x, weight, bias)))
    scan: Any = projected_op
    if is_eager(x, weight, bias, p.mask):
        scan = Projected.apply if wanted else projected_now
    out: Tensor = scan(*p)
    return out


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The dtype that `torch.nn.functional.linear` would use under autocast; float64 stays float64."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
