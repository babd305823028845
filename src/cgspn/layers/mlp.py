"""The MLP half of a block, the same for every mixer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from ..compat import addmm_activation
from ..ops.autocast import autocast_dtype
from ..ops.checks import check_choice
from ..ops.eager import is_eager
from ..ops.fused import rows as over_rows
from ..ops.gpu import on_accelerator
from .plain import has_global_hooks, is_plain

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x * (1.702 * x).sigmoid()


class SwiGLU(nn.Module):
    """silu(a) * b for the two halves of the channels, as in DINOv2-g: [..., 2 hidden] -> [..., hidden]."""

    def forward(self, x: Tensor) -> Tensor:
        """The first half of the channels is the gate."""
        gate, value = x.chunk(2, -1)
        return silu(gate) * value


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, "tanh")}
ACTIVATIONS |= {"quick_gelu": QuickGELU, "swiglu": SwiGLU}


def activation(name: Activation) -> nn.Module:
    """The module of a named activation. Raises ValueError for an unknown name."""
    check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]()


class Mlp(nn.Module):
    """Two linear layers with an activation between: [..., C] -> [..., out or C]."""

    def __init__(self, width: int, hidden: int, act: Activation = "gelu", out: int | None = None) -> None:
        """width: C; hidden: inner width; out: output width, C if None. Raises ValueError for an unknown activation."""
        super().__init__()
        self.act_name = act
        self.fc1 = nn.Linear(width, 2 * hidden if act == "swiglu" else hidden)  # both halves of the gate in one layer
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, out or width)
        nn.init.normal_(self.fc1.weight, std=width**-0.5)
        nn.init.normal_(self.fc2.weight, std=0.5 * hidden**-0.5)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] (or `out`)."""
        if torch.is_grad_enabled() and is_eager(x) and self.is_bare():
            dtype = None if x.dtype == torch.float64 else autocast_dtype(x)
            tensors = (x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            with torch.autocast(x.device.type, enabled=False):
                ready = [t.to(dtype or t.dtype) for t in tensors]
                out: Tensor = RecomputeGELU.apply(*ready, self.act.approximate)  # type: ignore[no-untyped-call]
                return out
        plain: Tensor = self.fc2(self.act(self.fc1(x)))
        return plain

    def is_bare(self) -> bool:
        """Whether this consists of two plain linear layers and a GELU, which fused kernels can replace."""
        layers = is_plain(self.fc1, nn.Linear) and is_plain(self.act, nn.GELU) and is_plain(self.fc2, nn.Linear)
        return layers and not has_global_hooks()

    def adder(self, x: Tensor) -> Callable[[Tensor], object]:
        """A function that adds the MLP of x [..., C], without its last bias, to tokens [M, C] in place.

        For a bare MLP with a tanh GELU, without gradients. It reads x in each call.
        """
        rows = x.flatten(0, -2)
        first, bias, second = (t.to(x.dtype) for t in (self.fc1.weight, self.fc1.bias, self.fc2.weight))
        first, second, fused = first.t(), second.t(), on_accelerator(x)

        def add_(tokens: Tensor) -> None:
            if fused:  # one launch if cuBLAS has this epilogue
                hidden = addmm_activation(bias, rows, first, use_gelu=True)
            else:
                hidden = gelu(torch.addmm(bias, rows, first), approximate="tanh")
            tokens.addmm_(hidden, second)

        return add_


class RecomputeGELU(torch.autograd.Function):
    """linear(GELU(linear(x))) that saves one hidden tensor instead of two, with a peak of two, not three.

    The backward recomputes the GELU, one more pass over memory. This saves a third of a block's activation memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str
    ) -> Tensor:
        """All tensors have the same dtype."""
        hidden = linear(x, weight1, bias1)
        ctx.approximate = approximate
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, hidden)
        return linear(gelu(hidden, approximate=approximate), weight2, bias2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; a second derivative goes through the plain layers."""
        *tensors, hidden = ctx.saved_tensors
        x, weight1, _, weight2, _ = tensors
        needed, approximate = ctx.needs_input_grad, ctx.approximate
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                plain = linear(gelu(linear(*tensors[:3]), approximate=approximate), *tensors[3:])
                wanted = [t for t, need in zip(tensors, needed) if need]
                found = iter(torch.autograd.grad(plain, wanted, dout, create_graph=True))
                return *(next(found) if need else None for need in needed[:5]), None
            d, hidden, rows = dout.flatten(0, -2), hidden.flatten(0, -2), x.flatten(0, -2)
            # free the activation before the gradient of the same size is allocated
            dweight2 = d.T @ gelu(hidden, approximate=approximate) if needed[3] else None
            dbias2 = _sum(d) if needed[4] else None
            if not any(needed[:3]):
                return None, None, None, dweight2, dbias2, None
            dhidden = d @ weight2
            dbias1 = _through_gelu(dhidden, hidden, approximate)
            dweight1 = _crossed(dhidden, rows) if needed[1] else None
            dx = (dhidden @ weight1).view_as(x) if needed[0] else None
        return dx, dweight1, dbias1 if needed[2] else None, dweight2, dbias2, None


def _crossed(d: Tensor, x: Tensor) -> Tensor:
    """The matrix product d^T x: [M, K], [M, C] -> [K, C].

    Computed as the transpose of x^T d if K is larger, which is a quarter faster on an H100.
    """
    return d.T @ x if d.shape[1] <= x.shape[1] else (x.T @ d).T.contiguous()


def _sum(d: Tensor) -> Tensor:
    """The sums over rows of d [M, C], computed in float32: [C]."""
    return over_rows.column_sums(d.contiguous(), dtype=d.dtype) if over_rows.can_use_rows(d) else d.sum(0)


def _through_gelu(d: Tensor, hidden: Tensor, approximate: str) -> Tensor:
    """Replace the gradient d [M, C] of a GELU's output by that of its input. Returns the sums over rows [C]."""
    if over_rows.can_use_rows(d, hidden):
        return over_rows.column_sums(d, hidden.contiguous(), approximate, d.dtype)
    torch.ops.aten.gelu_backward.grad_input(d, hidden, approximate=approximate, grad_input=d)
    return d.sum(0)
