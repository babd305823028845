"""Registration with torch.library, for torch.compile, export, autograd and FLOP counters.

The custom ops are the forward and backward of `propagate_2d` and of `line_scan`, and a forward for training that also
returns the tensors saved for the backward. They choose the backend inside, so a traced program does not contain the
choice. The backward ops are differentiable through the reference: a double backward is correct on every backend, but
slow. Eager code calls the same functions without the dispatcher, which takes as long as several launches for a custom
op; `Propagate` and `LineScan` are the autograd functions for that.
FLOP convention: a multiply-add is two, a division or a sigmoid one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import LINE_SCAN_SCHEMA, SCAN_SCHEMA, Scan, given_scan
from .backends import backend_for
from .functorch import check_reverse
from .reference import DIRECTIONS, line_scan_reference, propagate_2d_reference

Gradients = tuple[Tensor | None, ...]
FIELDS = SCAN_SCHEMA.count(",") + 1


def _forward(name: str, scan: Scan) -> Tensor:
    check_reverse(name)
    out: Tensor = backend_for(scan.backend, scan.x).forward(scan)
    return out


def propagate_2d_now(*arguments: Any) -> Tensor:
    """The output for the fields of a `Scan`: see `cgspn.ops.propagate_2d`."""
    return _forward("propagate_2d", Scan(*arguments))


def _output(*arguments: Any) -> Tensor:
    scan = Scan(*arguments)
    return scan.x.new_empty(scan.output)


def propagate_2d_saving_now(*arguments: Any) -> tuple[Tensor, ...]:
    """`propagate_2d_now` for training: also returns the two tensors that the backend's backward needs ([0] if none)."""
    scan = Scan(*arguments)
    module = backend_for(scan.backend, scan.x)
    if not hasattr(module, "forward_saving"):
        return propagate_2d_now(*arguments), scan.x.new_empty(0), scan.x.new_empty(0, dtype=torch.float32)
    check_reverse("propagate_2d")
    out: tuple[Tensor, ...] = module.forward_saving(scan)
    return out


def _saved(*arguments: Any) -> tuple[Tensor, ...]:
    scan = Scan(*arguments)
    module, x = backend_for(scan.backend, scan.x), scan.x
    shapes = module.saved_shapes(scan) if hasattr(module, "forward_saving") else ((0,), (0,))
    return x.new_empty(scan.output), x.new_empty(shapes[0]), x.new_empty(shapes[1], dtype=torch.float32)


def propagate_2d_backward_now(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `propagate_2d_op` with respect to x, logits, lam, u and keep; [0] for an argument that is None.

    arguments: the arguments of the forward, optionally followed by the saved tensors of `propagate_2d_saving_op`.
    """
    scan = Scan(*arguments[:FIELDS])
    grads = backend_for(scan.backend, scan.x).backward(dy, scan, *arguments[FIELDS:])
    return tuple(scan.x.new_empty(0) if g is None else g for g in grads)


def line_scan_now(*arguments: Any) -> Tensor:
    """The output for the arguments of `given_scan`: see `cgspn.ops.line_scan`."""
    return _forward("line_scan", given_scan(*arguments))


def line_scan_backward_now(dh: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `line_scan_op` with respect to x, weights and lam. A seventh argument may be the op's output."""
    scan = given_scan(*arguments[:6])
    dx, dweights, dlam, *_ = backend_for(scan.backend, scan.x).backward(dh, scan, *arguments[6:])
    return dx, dweights.squeeze(3), dlam.squeeze(3)


def register_op(name: str, function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Any:
    """Register a pure function as the custom op cgspn::`name`. `fake` gives the shapes and dtypes of its outputs."""
    op = torch.library.custom_op(f"cgspn::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def register_forward(
    name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any], backward_op: Any,
    backward: Callable[..., Any], *, outputs: int = 1, saves: bool = False,
) -> tuple[Any, type[torch.autograd.Function]]:  # fmt: skip
    """Register a forward op whose gradient is `backward_op`. Returns the op, and both functions without the dispatcher.

    schema: the arguments, tensors first; the backward returns their gradients in this order. saves: the backward also
    takes, as its last arguments, all outputs of the forward but the first (or the only output).
    """
    tensors, returns = schema.count("Tensor"), ", ".join(["Tensor"] * outputs)
    forward_op = register_op(name, forward, f"({schema}) -> ({returns})", fake)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        state = (outputs[1:] or outputs) if saves else ()
        if len(outputs) > 1:
            ctx.mark_non_differentiable(*state)
            ctx.set_materialize_grads(False)  # otherwise autograd would fill a map of zeros for the state
        ctx.save_for_backward(*inputs[:tensors], *state)
        ctx.rest = inputs[tensors:]

    def through(run: Callable[..., Any], ctx: Any, dy: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # read once: under checkpointing, saved tensors can be unpacked only once
        if dy is None:  # the loss does not depend on the output
            return (None,) * (len(ctx.rest) + tensors)
        found = run(dy, *saved[:tensors], *ctx.rest, *saved[tensors:])
        grads = [None if t is None else g for t, g in zip(saved[:tensors], found)]
        return *grads, *[None] * (len(ctx.rest) + tensors - len(grads))

    forward_op.register_autograd(lambda ctx, dy, *_: through(backward_op, ctx, dy), setup_context=setup)

    class Direct(torch.autograd.Function):
        """Forward and backward that bypass PyTorch's dispatcher."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            """The function's outputs. A separate `setup_context` would bind the arguments in each call."""
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, *_: None) -> Gradients:
            """The gradients; computed by the op if a second derivative is needed."""
            return through(backward_op if torch.is_grad_enabled() else backward, ctx, dy)

    return forward_op, Direct


def _leaf_of(t: Tensor, graph: bool) -> Tensor:
    """A leaf for `t`; with `graph`, `t` itself, so that the result stays connected to the graph of `t`."""
    return t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_()


def register_backward(
    name: str, schema: str, backward: Callable[..., Any], reference: Callable[..., Tensor], gradients: int,
    saved: str = "",
) -> Any:  # fmt: skip
    """Register the op that computes `gradients` gradients. Its own derivatives come from the reference.

    schema: the forward's arguments; saved: the saved tensors that the backward takes after them, as a schema.
    """
    tensors, arguments = schema.count("Tensor"), schema.count(",") + 1
    signature = f"(Tensor dy, {schema}{saved}) -> ({', '.join(['Tensor'] * gradients)})"
    backward_op = register_op(
        name, backward, signature,
        lambda dy, *given: tuple(dy.new_empty(0 if t is None else t.shape) for t in given[:gradients]),
    )  # fmt: skip

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: tensors + 1])
        ctx.rest = inputs[tensors + 1 :]

    def second(ctx: Any, *cotangents: Tensor | None) -> Gradients:
        graph = torch.is_grad_enabled()  # the caller's create_graph, without which third derivatives would lack terms
        with torch.enable_grad():
            dy, *inputs = ctx.saved_tensors  # keep and mask may be None, and a mask has no gradient
            wanted = [k for k, t in enumerate(inputs[: len(cotangents)]) if t is not None]
            dy = _leaf_of(dy, graph)
            for k in wanted:
                inputs[k] = _leaf_of(inputs[k], graph)
            leaves: list[Tensor] = [dy, *(inputs[k] for k in wanted)]
            y = reference(*inputs, *ctx.rest[: arguments - tensors])
            first = torch.autograd.grad(y, leaves[1:], dy.to(y.dtype), create_graph=True)
            asked = [cotangents[k] for k in wanted]
            pairs = [(g, c.to(g.dtype)) for g, c in zip(first, asked, strict=True) if c is not None]
            of_first = torch.autograd.grad(
                [g for g, _ in pairs], leaves, [c for _, c in pairs], create_graph=graph, allow_unused=True
            )
        found: list[Tensor | None] = [None] * (len(ctx.rest) + tensors + 1)
        for place, gradient in zip([0, *(k + 1 for k in wanted)], of_first, strict=True):
            found[place] = gradient
        return tuple(found)

    backward_op.register_autograd(second, setup_context=setup)
    return backward_op


def by_definition(*arguments: Any) -> Tensor:
    """The output of the float64 reference for the fields of a `Scan`."""
    scan = Scan(*arguments)
    return propagate_2d_reference(
        *arguments[:4],
        keep=scan.keep,
        mask=scan.mask,
        directions=[DIRECTIONS[code] for code in scan.directions],
        merge="sum" if scan.merge_sum else "none",
        normalise_state=scan.normalise_state,
    )


propagate_2d_backward_op = register_backward(
    "propagate_2d_backward",
    SCAN_SCHEMA,
    propagate_2d_backward_now,
    by_definition,
    5,
    ", Tensor? h=None, Tensor? n=None",
)
_backward = (propagate_2d_backward_op, propagate_2d_backward_now)
propagate_2d_saving_op, Propagate = register_forward(
    "propagate_2d_saving", SCAN_SCHEMA, propagate_2d_saving_now, _saved, *_backward, outputs=3, saves=True
)
# `propagate_2d` calls the saving op when a gradient is needed; this covers a program traced without one
propagate_2d_op, _ = register_forward("propagate_2d", SCAN_SCHEMA, propagate_2d_now, _output, *_backward)
line_scan_backward_op = register_backward(
    "line_scan_backward", LINE_SCAN_SCHEMA, line_scan_backward_now,
    lambda x, weights, lam, code, chunk, _: line_scan_reference(x, weights, lam, DIRECTIONS[code], chunk),
    3, ", Tensor? h=None",
)  # fmt: skip
line_scan_op, LineScan = register_forward(
    "line_scan", LINE_SCAN_SCHEMA, line_scan_now, lambda x, *_: x.new_empty(x.shape), line_scan_backward_op,
    line_scan_backward_now, saves=True,
)  # fmt: skip


# Per position and direction. Forward, per parameter group: 3 sigmoids, 2 adds, 3 divisions; per channel: 3
# multiply-adds of the recurrence plus lam * x as a fourth; the gate; the merge. The forget gate: a sigmoid, 3 products.
# Backward, per group: the normalisation again (8) and its gradient (subtract, divide, two products and 1 - s: 15); per
# channel: the recurrence again (8), the adjoint scan (6), dh, du, dlam, dx (4 + 1 add), dweights (3), their shared sum
# (5). The forget gate: as in the forward, plus its gradient (4).
FLOPS_FORWARD = {"normalise": 8, "recurrence": 8, "gate_and_merge": 2}
FLOPS_BACKWARD = 8 + 8 + 6 + 5 + 3 + 20
FLOPS_SETS = {"forward": FLOPS_FORWARD["normalise"], "backward": 8 + 15}
FLOPS_KEEP = {"forward": 4, "backward": 8}


def _scan_flops(
    which: str, each: int, x_shape: Sequence[int], lam_shape: Sequence[int], keep_shape: Any, rest: Sequence[Any]
) -> int:
    """FLOPs of a pass that takes `each` per channel if groups have one channel. n is one more channel per group."""
    sets, of_set = math.prod(lam_shape), FLOPS_SETS[which]
    channels = sets // lam_shape[-1] * (x_shape[-1] + (lam_shape[-1] if True in rest[4:5] else 0))
    return channels * (each - of_set) + sets * (of_set + (0 if keep_shape is None else FLOPS_KEEP[which]))


def register_flops(formula: Callable[..., int], *ops: Any) -> None:
    """Register the FLOP formula of these ops, a function of the argument shapes."""
    register_flop_formula(list(ops))(lambda *shapes, out_shape=None, **_: formula(*shapes))


register_flops(
    lambda x, logits, lam, u, keep, *rest: _scan_flops("forward", sum(FLOPS_FORWARD.values()), x, lam, keep, rest),
    torch.ops.cgspn.propagate_2d,
    torch.ops.cgspn.propagate_2d_saving,
)
register_flops(
    lambda dy, x, logits, lam, u, keep, *rest: _scan_flops("backward", FLOPS_BACKWARD, x, lam, keep, rest),
    torch.ops.cgspn.propagate_2d_backward,
)
register_flops(lambda x, *_: math.prod(x) * FLOPS_FORWARD["recurrence"], torch.ops.cgspn.line_scan)
register_flops(
    lambda dh, *_: math.prod(dh) * (FLOPS_FORWARD["recurrence"] + 6 + 2 + 3), torch.ops.cgspn.line_scan_backward
)
