"""PyTorch's Muon with matrices of the same shape orthogonalised in one batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..compat import foreach_add_, foreach_copy_, foreach_lerp, foreach_lerp_, foreach_mul_

TOGETHER = 1 << 26  # most elements of a batch; larger ones are not faster and need memory for copies


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of AdamW's size, in fewer and larger kernels. Results are equal up to rounding.

    One weight matrix of an encoder is too small to fill a GPU, and updating it takes about twenty kernel launches.
    Sharded parameters (DTensor) take PyTorch's own step, which gathers each.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        """Arguments and state are those of `torch.optim.Muon`; `adjust_lr_fn` is "match_rms_adamw"."""
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for matrices in stacks([p for p in group["params"] if p.grad is not None]):
                self.update(matrices, group)
        return None

    def update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        wanted = list(foreach_lerp(gradients, momenta, group["momentum"])) if group["nesterov"] else momenta
        steps = orthogonal(wanted, group["ns_coefficients"], group["ns_steps"], group["eps"])
        foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        ratio = 0.2 * max(matrices[0].shape) ** 0.5
        foreach_add_(matrices, steps.to(matrices[0].dtype).unbind(), alpha=-group["lr"] * ratio)


def stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group the matrices by shape, dtype and device, in batches of at most `TOGETHER` elements or one matrix."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
    for found in alike.values():
        count = max(1, TOGETHER // max(1, found[0].numel()))
        yield from (found[i : i + count] for i in range(0, len(found), count))


def orthogonal(matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices of one shape near 1. Returns bfloat16 [n, rows, columns], contiguous.

    This is the Newton-Schulz iteration of `torch.optim.Muon`, with the same rounding.
    """
    a, b, c = coefficients
    x = torch.empty(len(matrices), *matrices[0].shape, dtype=torch.bfloat16, device=matrices[0].device)
    foreach_copy_(x.unbind(), matrices)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
