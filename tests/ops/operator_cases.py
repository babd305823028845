"""What the operator's tests share: inputs, the backends that can run here, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, currently_in_test_context
from torch import Tensor

from cgspn.ops import DIRECTIONS, PREFERENCE, line_scan, line_scan_reference, propagate_2d, propagate_2d_reference
from cgspn.ops.backends import unsupported_reason

NAMES = ("x", "logits", "lam", "u", "keep")
LINE_NAMES = ("x", "weights", "lam")


class Backend(NamedTuple):
    name: str
    device: str


def runnable_backends() -> list[Any]:
    """A pytest parameter for every backend of PREFERENCE on every device where it can run here."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        x = torch.zeros(1, 1, 1, 1, device=device)
        marks = [pytest.mark.gpu] if device == "cuda" else []
        found += [
            pytest.param(Backend(name, device), marks=marks, id=f"{name}-{device}")
            for name in PREFERENCE
            if unsupported_reason(name, x) is None
        ]
    return found


def every_backend(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test once for each backend, as its argument `backend`."""
    decorated: Callable[..., None] = pytest.mark.parametrize("backend", runnable_backends())(test)
    return decorated


def draw(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def propagate_inputs(
    shape: Sequence[int],
    directions: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """x, logits, lam and u for a grid [B, H, W, C]; the parameters are views of one packed tensor, as in a layer."""
    b, h, w, c = shape
    d = directions
    packed = draw(b, h, w, 5 * d * c, dtype=dtype, device=device, seed=seed)
    logits, lam, u = packed.split([3 * d * c, d * c, d * c], -1)
    x = draw(*shape, dtype=dtype, device=device, seed=seed + 1)
    return [x, logits.unflatten(-1, (d, 3, c)), lam.unflatten(-1, (d, c)), u.unflatten(-1, (d, c))]


def set_inputs(
    shape: Sequence[int],
    share: int,
    directions: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    *,
    own: bool = False,
    keep: bool = True,
) -> list[Tensor]:
    """x, logits, lam, u and, with `keep`, keep, where `share` channels have one set of parameters.

    own: each direction has features of its own, a slice of a wider map, as in a layer.
    """
    b, h, w, c = shape
    d, g = directions, c // share
    packed = draw(b, h, w, d, 5 + keep, g, dtype=dtype, device=device, seed=seed)
    wide = draw(b, h, w, 16 + (d if own else 1) * c, dtype=dtype, device=device, seed=seed + 1)[..., 16:]
    lam, u, logits, *rest = packed.split([1, 1, 3, 1][: 3 + keep], 4)
    x = wide.unflatten(-1, (d, c)) if own else wide
    return [x, logits, *(t.squeeze(4) for t in (lam, u, *rest))]


def line_scan_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    """x, weights and lam for a grid [B, H, W, C]; weights small enough that a long scan stays bounded."""
    b, h, w, c = shape
    weights = draw(b, h, w, 3, c, dtype=torch.float64, seed=seed).tanh() / 3
    return [
        draw(*shape, dtype=dtype, device=device, seed=seed + 1),
        weights.to(device, dtype),
        draw(*shape, dtype=dtype, device=device, seed=seed + 2),
    ]


def with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], dy: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, the gradient to every tensor, and the output's gradient (drawn in the output's dtype if not given)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    if dy is None:
        dy = draw(*y.shape, dtype=y.dtype, device=y.device.type, seed=99)
    return y.detach(), list(torch.autograd.grad(y, leaves, dy.to(y.dtype))), dy


def relative_error(a: Tensor, b: Tensor, terms: int = 1) -> float:
    """||a - b|| / ||b||, where b counts as at least 0.01 an element and term.

    The floor is for gradients that cancel: with one neighbour the weight is 1 whatever its logit, and what the
    reference holds there is the rounding error of a zero. terms: how many channels each element is a sum over, each of
    which brings its rounding errors.
    """
    floor = 0.01 * terms * max(b.numel(), 1) ** 0.5
    return (a.double() - b.double()).norm().item() / max(b.double().norm().item(), floor)


# The reference starts from the same rounded inputs, so what is left is the error of the backend.
# float64 and float32: some tens of roundings (2^-53, 2^-24) of sums with cancellation in the gradients.
# float16 and bfloat16: one rounding of a float32 result, at most 2^-11 and 2^-8 of each value and half of
# that in the norm; a backend may round the state once more for its backward, hence twice that for gradients.
OUTPUT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


# The CUDA kernels use the hardware's approximate exponential and reciprocal, and round the planes of the directions
# and, for the backward, the state to the dtype. Where neighbours hold nearly the same state, the gradient of the
# logits is the difference of two such rounded states (test_cuda_gpu.py measures it on their scale).
# Triton rounds the planes too, but not the state; its float64 exponential on a GPU is that of the vendor.
LOOSER: dict[str, dict[str, float]] = {"cuda": {"gradient of logits": 8.0}, "triton": {}}


def assert_close(
    names: Sequence[str],
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    dtype: torch.dtype,
    backend: str = "",
    more: float = 1.0,
    share: int = 1,
    cancelling: Sequence[str] = ("logits",),
) -> None:
    """Output (first) and gradients against the reference, all finite and in `dtype`. share: channels of a set.

    cancelling: whose gradients may be differences that are all rounding.
    """
    for name, a, b in zip(("output", *(f"gradient of {n}" for n in names)), got, want, strict=True):
        assert a.dtype == dtype, name
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        tolerance = (OUTPUT_TOLERANCE if name == "output" else GRADIENT_TOLERANCE)[dtype]
        if backend in LOOSER:
            tolerance *= LOOSER[backend].get(name, 3.0) * (more if name == "gradient of logits" else 1.0)
        error = relative_error(a, b, share if name.removeprefix("gradient of ") in cancelling else 1)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def skip_unless_supported(backend: Backend, x: Tensor) -> None:
    """Skip the test, or the example of hypothesis, where a backend has no kernel for a dtype."""
    reason = unsupported_reason(backend.name, x)
    if reason is None:
        return
    if currently_in_test_context():
        assume(False)
    pytest.skip(reason)


def check_propagate(backend: Backend, tensors: Sequence[Tensor], *, more: float = 1.0, **options: Any) -> None:
    """`propagate_2d` on a backend against the reference: output and every gradient."""
    skip_unless_supported(backend, tensors[0])
    options.setdefault("directions", DIRECTIONS[: tensors[2].shape[3]])
    y, grads, dy = with_gradients(with_keep(propagate_2d, backend=backend.name, **options), tensors)
    want, want_grads, _ = with_gradients(with_keep(propagate_2d_reference, **options), doubles(tensors), dy)
    share = tensors[0].shape[-1] // tensors[2].shape[-1]
    names, got = NAMES[: len(tensors)], [y, *grads]
    cancelling = ("logits", "lam") if options.get("normalise_state") else ("logits",)  # of one line, y = u x
    assert_close(names, got, [want, *want_grads], tensors[0].dtype, backend.name, more, share, cancelling)


def with_keep(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """`propagate_2d` of x, logits, lam, u and, if there is a fifth tensor, keep."""
    return lambda *t: function(*t[:4], keep=t[4] if len(t) > 4 else None, **options)


def check_line_scan(backend: Backend, tensors: Sequence[Tensor], direction: str, chunk: int | None = None) -> None:
    """`line_scan` on a backend against the reference: output and every gradient."""
    skip_unless_supported(backend, tensors[0])
    y, grads, dy = with_gradients(lambda *t: line_scan(*t, direction, chunk, backend=backend.name), tensors)
    want, want_grads, _ = with_gradients(lambda *t: line_scan_reference(*t, direction, chunk), doubles(tensors), dy)
    assert_close(LINE_NAMES, [y, *grads], [want, *want_grads], tensors[0].dtype, backend.name)


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double() for t in tensors]
