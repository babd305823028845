"""Registration of the projected operator: see library.py, which this follows.

Where its parameters go is decided inside, like the backend, so a traced program never sees the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import Scan
from .backends import backend_for
from .functorch import check_reverse
from .library import FLOPS_BACKWARD, FLOPS_FORWARD, leaf_of, register_first
from .reference import DIRECTIONS, propagate_2d_reference
from .replay import column_sums, empty, linear, matmul

PARAMETERS = 5  # maps a direction: lam, u, three logits


def split_parameters(packed: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, lam and u, views of what the projection makes: [B, H, W, D * 5 * C]."""
    # One split, not three slices: its gradient is one concatenation instead of three zero-filled maps added up.
    shape = (*packed.shape[:-1], directions, PARAMETERS, packed.shape[-1] // (directions * PARAMETERS))
    lam, u, logits = packed.view(shape).split([1, 1, 3], -2)
    return logits, lam.squeeze(-2), u.squeeze(-2)


def check_chip(x: Tensor, *, backward: bool) -> None:
    """Raise RuntimeError, with the reason, where the kernels of a pass cannot run on `x`."""
    from .cuda import projected

    reason = projected.unsupported_reason(x, backward)
    if reason is not None:
        raise RuntimeError(f"parameters='chip' cannot run here: {reason}")


def _on_chip(parameters: str, backend: str, x: Tensor, directions: Sequence[int]) -> bool:
    if parameters == "chip":
        check_chip(x, backward=False)
        return True
    if parameters == "memory" or backend not in ("auto", "cuda"):
        return False
    from .cuda import projected

    return projected.is_faster(x, directions)


def projected_now(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    parameters: str,
    backend: str,
) -> Tensor:
    """Checked arguments in, tensors out: see `cgspn.ops.propagate_2d_projected`. Saves no more than its arguments."""
    check_reverse("propagate_2d_projected")
    out: Tensor
    if _on_chip(parameters, backend, x, directions):
        from .cuda import projected

        out = projected.forward(x, weight, bias, mask, directions, merge_sum)
    else:
        made = split_parameters(linear(x, weight, bias), len(directions))
        out = backend_for(backend, x).forward(Scan(x, *made, None, mask, directions, merge_sum))
    return out


projected_op = torch.library.custom_op("cgspn::propagate_2d_projected", projected_now, mutates_args=())


@projected_op.register_fake
def _(x, weight, bias, mask, directions, merge_sum, parameters, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape if merge_sum else (*x.shape[:3], len(directions), x.shape[3]))


def projected_backward_now(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    parameters: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `projected_op` to x, weight and bias; that of the bias also where there is none.

    On the chip where the forward is and lines fit: with the passes in one, an H100 took a fifth less time than with
    parameters made again in memory (B = 32, 74x74, C = 64: 1.59 against 1.98 ms, forward included).
    """
    chip = _on_chip(parameters, backend, x, directions)
    if chip:
        from .cuda import projected

        if parameters == "chip":
            check_chip(x, backward=True)
        if parameters == "chip" or projected.unsupported_reason(x, backward=True) is None:
            grads: tuple[Tensor, Tensor, Tensor] = projected.backward(dy, x, weight, bias, mask, directions, merge_sum)
            return grads
    return backward_in_memory(dy, x, weight, bias, mask, directions, merge_sum, backend, chip)


def backward_in_memory(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    directions: Sequence[int],
    merge_sum: bool,
    backend: str,
    chip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`projected_backward_now` with the parameters in memory; chip: the state alone is made without them."""
    d, c = len(directions), x.shape[-1]
    made = split_parameters(linear(x, weight, bias), d)
    module, scan = backend_for(backend, x), Scan(x, *made, None, mask, directions, merge_sum)
    if hasattr(module, "backward_saved"):
        # gradients side by side as the projection made the parameters: one product for each of what they lead to
        packed = empty((*x.shape[:3], weight.shape[0]), x.dtype, x.device)
        if chip:  # the state at least is made there, without an output beside it
            from .cuda import projected

            h = projected.state(x, weight, bias, mask, directions)
        else:
            _, h, _ = module.forward_saving(scan)
        dlogits, dlam, du = split_parameters(packed, d)
        dx = module.backward_saved(dy, scan, h, into=(dlam, du, dlogits))[0]
    else:
        dx, dlogits, dlam, du, _ = module.backward(dy, scan)
        packed = torch.cat([dlam.unsqueeze(-2), du.unsqueeze(-2), dlogits], -2)
    seen = x if mask is None else x.where(mask[..., None], 0)  # padding may hold anything
    flat, seen = packed.view(-1, weight.shape[0]), seen.reshape(-1, c)
    dx = matmul(flat, weight, dx.reshape(-1, c)).view(x.shape)
    return dx, matmul(flat.T, seen), flat.new_zeros(weight.shape[0]) if bias is None else column_sums(flat)


projected_backward_op = torch.library.custom_op(
    "cgspn::propagate_2d_projected_backward", projected_backward_now, mutates_args=()
)


@projected_backward_op.register_fake
def _(dy, x, weight, bias, mask, directions, merge_sum, parameters, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


Projected = register_first(projected_op, projected_now, projected_backward_op, projected_backward_now, 4)


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives through the reference: right, if slow."""
    directions, merge_sum, *_ = ctx.rest
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        dy, x, weight, bias, mask = ctx.saved_tensors
        leaves = [leaf_of(t, graph) for t in (dy, x, weight) + (() if bias is None else (bias,))]
        features = leaves[1].double()
        if mask is not None:
            features = features.where(mask[..., None], 0.0)
        packed = features @ leaves[2].double().T
        if bias is not None:
            packed = packed + leaves[3].double()
        packed = packed.unflatten(-1, (len(directions), PARAMETERS, x.shape[-1]))
        y = propagate_2d_reference(
            features,
            packed[..., 2:, :],
            packed[..., 0, :],
            packed[..., 1, :],
            mask=mask,
            directions=[DIRECTIONS[code] for code in directions],
            merge="sum" if merge_sum else "none",
        )
        first = torch.autograd.grad(y, leaves[1:], leaves[0].double(), create_graph=True)
        pairs = [(g, c.to(g.dtype)) for g, c in zip(first, cotangents) if c is not None]
        second = torch.autograd.grad(
            [g for g, _ in pairs], leaves, [c for _, c in pairs], create_graph=graph, allow_unused=True
        )
    return *second, *[None] * (9 - len(second))


projected_backward_op.register_autograd(_second_backward, setup_context=_second_setup)


def _counts(x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int]:
    """Of one projection, and elements of one map of all directions."""
    positions = torch.Size(x_shape[:3]).numel()
    return 2 * positions * torch.Size(weight_shape).numel(), positions * weight_shape[0] // PARAMETERS


@register_flop_formula(torch.ops.cgspn.propagate_2d_projected)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    projection, elements = _counts(x_shape, weight_shape)
    return projection + elements * sum(FLOPS_FORWARD.values())


@register_flop_formula(torch.ops.cgspn.propagate_2d_projected_backward)
def _(dy_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # the projection again, and its two gradients
    projection, elements = _counts(x_shape, weight_shape)
    return 3 * projection + elements * FLOPS_BACKWARD
