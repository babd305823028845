"""Every complaint names the argument, what came and what is accepted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from operator_cases import Backend, every_backend, line_scan_inputs, propagate_inputs

from cgspn.ops import PREFERENCE, backends, explain_backend, line_scan, propagate_2d

SHAPE = (2, 3, 4, 5)


def nan_at(t: torch.Tensor, *index: int) -> torch.Tensor:
    t = t.clone()
    t[index] = float("nan")
    return t


X, LOGITS, LAM, U = propagate_inputs(SHAPE, dtype=torch.float32)
WEIGHTS = line_scan_inputs(SHAPE, torch.float32)[1]
MASK = torch.ones(2, 3, 4, dtype=torch.bool)
BACKENDS = ", ".join(map(repr, PREFERENCE))

# what replaces a good argument -> the error and the whole of its message
PROPAGATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (
        {"x": X.long()},
        TypeError,
        "x has dtype torch.int64; accepted: torch.float16, torch.bfloat16, torch.float32, torch.float64",
    ),
    ({"x": X[0]}, ValueError, "x has shape (3, 4, 5); expected 4 dimensions [B, H, W, C], or 5 [B, H, W, D, C]"),
    (
        {"x": X.unsqueeze(3)},
        ValueError,
        "x has shape (2, 3, 4, 1, 5); expected [B, H, W, D, C] with D = 4 directions",
    ),
    (
        {"lam": LAM[..., :2]},
        ValueError,
        "lam has shape (2, 3, 4, 4, 2); expected [B, H, W, D, C] with the 5 channels of x, or a divisor",
    ),
    ({"keep": U[..., :1]}, ValueError, "keep has shape (2, 3, 4, 4, 1); expected [B, H, W, D, C] = (2, 3, 4, 4, 5)"),
    ({"keep": U.double()}, TypeError, "keep has dtype torch.float64; expected the dtype of x, torch.float32"),
    ({"x": X[:, :0]}, ValueError, "x has shape (2, 0, 4, 5); H, W and C must be at least 1"),
    ({"x": X[..., :0]}, ValueError, "x has shape (2, 3, 4, 0); H, W and C must be at least 1"),
    ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType"),
    ({"lam": LAM.double()}, TypeError, "lam has dtype torch.float64; expected the dtype of x, torch.float32"),
    ({"u": U.bfloat16()}, TypeError, "u has dtype torch.bfloat16; expected the dtype of x, torch.float32"),
    ({"u": U.to("meta")}, ValueError, "u is on meta; expected the device of x, cpu"),
    (
        {"logits": LOGITS[:, :, :, :2]},
        ValueError,
        "logits has shape (2, 3, 4, 2, 3, 5); expected [B, H, W, D, 3, C] = (2, 3, 4, 4, 3, 5)",
    ),
    ({"lam": LAM[:1]}, ValueError, "lam has shape (1, 3, 4, 4, 5); expected [B, H, W, D, C] = (2, 3, 4, 4, 5)"),
    ({"u": U[..., :4]}, ValueError, "u has shape (2, 3, 4, 4, 4); expected [B, H, W, D, C] = (2, 3, 4, 4, 5)"),
    (
        {"directions": ("down", "up")},
        ValueError,
        "logits has shape (2, 3, 4, 4, 3, 5); expected [B, H, W, D, 3, C] = (2, 3, 4, 2, 3, 5)",
    ),
    (
        {"directions": ()},
        ValueError,
        "directions is (); expected a non-empty sequence out of ('down', 'up', 'right', 'left')",
    ),
    (
        {"directions": "down"},
        ValueError,
        "directions is 'down'; expected a non-empty sequence out of ('down', 'up', 'right', 'left')",
    ),
    (
        {"directions": ("down", "north")},
        ValueError,
        "directions[1] is 'north'; accepted: 'down', 'up', 'right', 'left'",
    ),
    (
        {"directions": ("down", "up", "down")},
        ValueError,
        "directions is ('down', 'up', 'down'); each direction may occur once",
    ),
    ({"merge": "mean"}, ValueError, "merge is 'mean'; accepted: 'sum', 'none'"),
    (
        {"mask": MASK.float()},
        TypeError,
        "mask must be a torch.bool tensor (True = inside the image) or None, got torch.float32",
    ),
    ({"mask": [True]}, TypeError, "mask must be a torch.bool tensor (True = inside the image) or None, got list"),
    ({"mask": MASK[0]}, ValueError, "mask has shape (3, 4); expected [B, H, W] = (2, 3, 4)"),
    ({"mask": MASK.to("meta")}, ValueError, "mask is on meta; expected the device of x, cpu"),
    ({"backend": "fast"}, ValueError, f"backend is 'fast'; accepted: 'auto', {BACKENDS}"),
    (
        {"x": nan_at(X, 1, 2, 3, 4)},
        ValueError,
        "x holds 1 values that are not finite, the first at (1, 2, 3, 4); expected finite values",
    ),
    (
        {"lam": nan_at(LAM, 0, 1) / 0},
        ValueError,
        "lam holds 480 values that are not finite, the first at (0, 0, 0, 0, 0); expected finite values",
    ),
    (
        {"logits": LOGITS.masked_fill(LOGITS[0, 1, 2, 3, 2, 1] == LOGITS, -float("inf"))},
        ValueError,
        "logits holds 1 values that are not finite, the first at (0, 1, 2, 3, 2, 1); expected finite values",
    ),
    (
        {"u": nan_at(U, 0, 0, 1), "mask": MASK},
        ValueError,
        "u holds 20 values that are not finite, the first at (0, 0, 1, 0, 0); expected finite values",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), PROPAGATE_ERRORS, ids=[m[:40] for *_, m in PROPAGATE_ERRORS])
def test_propagate_complains(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "logits": LOGITS, "lam": LAM, "u": U, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        propagate_2d(**arguments)


LINE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ({"weights": WEIGHTS.half()}, TypeError, "weights has dtype torch.float16; expected the dtype of x, torch.float32"),
    (
        {"weights": WEIGHTS[:, :, :, :2]},
        ValueError,
        "weights has shape (2, 3, 4, 2, 5); expected [B, H, W, 3, C] = (2, 3, 4, 3, 5)",
    ),
    ({"lam": X[:, 1:]}, ValueError, "lam has shape (2, 2, 4, 5); expected [B, H, W, C] = (2, 3, 4, 5)"),
    ({"direction": "forward"}, ValueError, "direction is 'forward'; accepted: 'down', 'up', 'right', 'left'"),
    ({"chunk": 0}, ValueError, "chunk is 0; expected None or at least 1 line"),
    ({"chunk": 2.0}, TypeError, "chunk must be an int or None, got float"),
    ({"chunk": True}, TypeError, "chunk must be an int or None, got bool"),
    ({"backend": "fast"}, ValueError, f"backend is 'fast'; accepted: 'auto', {BACKENDS}"),
    (
        {"weights": nan_at(WEIGHTS, 1, 0, 0, 2, 0)},
        ValueError,
        "weights holds 1 values that are not finite, the first at (1, 0, 0, 2, 0); expected finite values",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), LINE_ERRORS, ids=[m[:40] for *_, m in LINE_ERRORS])
def test_line_scan_complains(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weights": WEIGHTS, "lam": X, "direction": "down", **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        line_scan(**arguments)


def test_finite_values_whose_sum_is_not_are_fine() -> None:
    x = torch.full_like(X.half(), 6e4)
    assert not torch.isfinite(x.sum())
    propagate_2d(x, LOGITS.half(), LAM.half() * 0, U.half())


def test_values_in_the_padding_are_not_looked_at() -> None:
    mask = MASK.clone()
    mask[0, 0, 1] = False
    assert propagate_2d(nan_at(X, 0, 0, 1), nan_at(LOGITS, 0, 0, 1), LAM, U, mask=mask).isfinite().all()


@every_backend
def test_values_are_looked_at_on_the_cpu_only(backend: Backend) -> None:
    tensors = [t.to(backend.device) for t in (nan_at(X, 0, 0, 0), LOGITS, LAM, U)]
    if backend.device == "cpu":
        with pytest.raises(ValueError, match="x holds 5 values that are not finite"):
            propagate_2d(*tensors, backend=backend.name)
    else:  # the look would stall the queue
        assert propagate_2d(*tensors, backend=backend.name).isnan().any()


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PREFERENCE", {"nowhere": "no_such_module", **PREFERENCE})
    with pytest.raises(RuntimeError, match="backend 'nowhere' cannot run here: not importable here: No module named"):
        propagate_2d(X, LOGITS, LAM, U, backend="nowhere")
    choice = explain_backend(X)
    assert choice.passed_over["nowhere"].startswith("not importable here")
    propagate_2d(X, LOGITS, LAM, U)  # "auto" goes on to the next
