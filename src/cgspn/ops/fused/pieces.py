"""The pieces around the scan as layers call them: the definition, or a kernel where one is asked for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backends
from ..functorch import transformed
from . import definition
from .library import NormLinearPast, linear_residual_norm_op, linear_residual_op, local_norm_op, norm_linear_op

LATENT_MOST = 512  # channels that stay on the chip for a tile of rows
LATENT_BEST = 256  # beyond, "auto" leaves products to the libraries, which are then faster
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # GPUs with the 140 KB of shared memory that such a tile wants


def unsupported_reason(x: Tensor, latent: int) -> str | None:
    """Why the kernels cannot run on tokens `x` and a latent of so many channels; None if they can."""
    if latent > LATENT_MOST:
        return f"{latent} channels; it takes at most {LATENT_MOST}"
    if x.dtype == torch.float64:
        return "float64 has no kernel here; its sums would be float32"
    if transformed():
        return "under torch.func and forward-mode AD the definition runs"
    return backends.unsupported_reason("triton", x)


def suits(x: Tensor, latent: int, best: int = LATENT_BEST) -> bool:
    """Whether "auto" runs the kernels on tokens `x` and a latent of so many channels.

    In 16 bits on GPUs with the shared memory of data centres, as the tiles are made for those. Traced programs keep the
    definition, which every exporter and compiler knows.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _roomy(x.device) and latent <= best and unsupported_reason(x, latent) is None


@functools.cache
def _roomy(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) in ROOMY


def _fused(backend: str, x: Tensor, latent: int, best: int = LATENT_BEST) -> bool:
    """Whether the kernels run. Raises ValueError for an unknown backend, RuntimeError for one that cannot run."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is {backend!r}; accepted: 'auto', 'triton', 'torch'")
    if backend != "triton":
        return backend == "auto" and suits(x, latent, best)
    # a traced program cannot look for modules; what cannot run says so when it is called
    reason = None if torch.compiler.is_compiling() else unsupported_reason(x, latent)
    if reason is not None:
        raise RuntimeError(f"backend 'triton' cannot run here: {reason}")
    return True


def norm_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm, then a linear layer to a narrow latent, reading x once: [..., C] -> [..., K] in the dtype of x.

    Args:
        x: tokens [..., C].
        gain, shift: of the LayerNorm, [C]. weight [K, C], bias [K]: of the linear layer. Any floating dtype each.
        eps: of the LayerNorm.
        backend: "torch" (the definition), "triton", or "auto": the kernels where they `suits`, else the definition.
            The kernels have gradients, but not those of gradients.

    Raises ValueError for an unknown backend, RuntimeError for one that cannot run.
    Source: design, section 5 (about 1 ms of 1.69 in the sub-layer is avoidable traffic).
    """
    if not _fused(backend, x, weight.shape[0]):
        return definition.norm_linear(x, gain, shift, weight, bias, eps)
    out: Tensor = norm_linear_op(x, gain, shift, weight, bias, eps)[0]
    return out


def norm_linear_past(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`norm_linear`, and x for what goes past the norm: the gradients of both ways then meet in one pass.

    Arguments and errors as of `norm_linear`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _fused(backend, x, weight.shape[0]):
        return norm_linear(x, gain, shift, weight, bias, eps, backend=backend), x
    both: tuple[Tensor, Tensor] = NormLinearPast.apply(x, gain, shift, weight, bias, eps)  # type: ignore[no-untyped-call]
    return both


def local_norm(
    x: Tensor,
    kernel: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """x plus a depthwise convolution of it, then RMSNorm: [B, H, W, C] -> the same, in one pass.

    Args:
        x: latent [B, H, W, C].
        kernel: [C, 1, k, k], k odd; None for no convolution. bias: [C] or None.
        gain: [C]; None for no norm. eps: of the norm.
        mask: bool [B, H, W], False where x is taken as zero.
        backend: as in `norm_linear`.

    Raises as `norm_linear`.
    """
    if kernel is None or not _fused(backend, x, x.shape[-1], LATENT_MOST):
        return definition.local_norm(x, kernel, bias, gain, eps, mask)
    out: Tensor = local_norm_op(x, kernel, bias, gain, eps, mask)
    return out


def linear_residual(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """residual + scale * linear(RMSNorm(y)), reading and writing the tokens once: -> [..., C].

    Args:
        residual: tokens [..., C].
        y: latent [..., K].
        gain: of the RMSNorm, [K]; None for no norm. weight [C, K], bias [C]: of the linear layer. scale: LayerScale
            [C], or None.
        eps: of the RMSNorm.
        backend: as in `norm_linear`.

    Raises as `norm_linear`.
    """
    if not _fused(backend, residual, y.shape[-1]):
        return definition.linear_residual(residual, y, gain, weight, bias, scale, eps)
    out: Tensor = linear_residual_op(residual, y, gain, weight, bias, scale, eps)
    return out


def linear_residual_norm(
    residual: Tensor,
    y: Tensor,
    gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    eps: float,
    norm: tuple[Tensor, Tensor, float],
    after: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """t = `linear_residual(...)` and what the next half of a block wants of it: t + after and LayerNorm(t), [..., C].

    Without gradients: for inference, where the last product of the MLP is then added onto the first output in place.

    Args:
        residual, y, gain, weight, bias, scale, eps, backend: as in `linear_residual`.
        norm: gain and shift [C] of the LayerNorm, and its eps.
        after: [C], the bias of the MLP's second layer.

    Raises as `norm_linear`.
    """
    if not _fused(backend, residual, y.shape[-1]):
        t = definition.linear_residual(residual, y, gain, weight, bias, scale, eps)
        dtype = t.dtype
        normal = torch.nn.functional.layer_norm(t, t.shape[-1:], norm[0].to(dtype), norm[1].to(dtype), norm[2])
        return t + after.to(dtype), normal
    out: tuple[Tensor, Tensor] = linear_residual_norm_op(
        residual, y, gain, weight, bias, scale, eps, norm[0], norm[1], after, norm[2]
    )
    return out
