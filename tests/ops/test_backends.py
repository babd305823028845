"""Every backend that can run here against the float64 reference: the output and every gradient, by relative error.

All memory that PyTorch hands out uninitialised is filled with NaN under test, so an element that a backend forgets to
write, or reads before writing, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import (
    Backend,
    assert_close,
    check_line_scan,
    check_propagate,
    draw,
    every_backend,
    line_scan_inputs,
    propagate_inputs,
    skip_unless_supported,
    with_gradients,
)
from torch import Tensor

from cgspn.ops import DIRECTIONS, explain_backend, line_scan, propagate_2d

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Odd sizes, H != W either way, a square, one line, one column, one position, channels that fill no vector.
GRIDS = [(2, 7, 5, 3), (1, 4, 9, 8), (2, 6, 6, 4), (3, 1, 7, 5), (2, 7, 1, 1), (1, 1, 1, 2), (1, 3, 2, 33)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def test_the_poison() -> None:
    x = torch.zeros(2)
    assert all(t.isnan().all() for t in (torch.empty(2), torch.empty_like(x), x.new_empty(2)))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_propagate(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = propagate_inputs(shape, dtype=dtype, device=backend.device)
    check_propagate(backend, tensors)
    check_propagate(backend, tensors, merge="none")


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_line_scan(backend: Backend, direction: str, dtype: torch.dtype) -> None:
    for shape in GRIDS:
        check_line_scan(backend, line_scan_inputs(shape, dtype, backend.device), direction)
    for chunk in (1, 2, 3, 20):
        check_line_scan(backend, line_scan_inputs((2, 7, 6, 3), dtype, backend.device), direction, chunk)


@every_backend
@pytest.mark.parametrize("directions", [("left",), ("up", "right"), ("right", "left", "down")], ids=" ".join)
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_subsets_of_directions(backend: Backend, directions: tuple[str, ...], merge: str) -> None:
    for shape in ((2, 3, 5, 4), (2, 4, 4, 4)):
        tensors = propagate_inputs(shape, len(directions), torch.float32, backend.device)
        check_propagate(backend, tensors, directions=directions, merge=merge)


@every_backend
@pytest.mark.parametrize("merge", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask(backend: Backend, merge: str, dtype: torch.dtype) -> None:
    for shape in ((2, 5, 6, 3), (1, 6, 6, 4), (2, 1, 5, 2), (2, 5, 1, 2)):
        mask = (draw(*shape[:3], seed=3) > -0.6).to(backend.device)
        check_propagate(backend, propagate_inputs(shape, 4, dtype, backend.device), mask=mask, merge=merge)
    everything_outside = torch.zeros(2, 3, 4, dtype=torch.bool, device=backend.device)
    tensors = propagate_inputs((2, 3, 4, 2), 4, dtype, backend.device)
    y, grads, _ = with_gradients(
        lambda *t: propagate_2d(*t, mask=everything_outside, merge=merge, backend=backend.name), tensors
    )
    assert not any(t.any() for t in (y, *grads))


@every_backend
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_padding_changes_nothing(backend: Backend, merge: str, garbage: float) -> None:
    """A padded image gives what the image alone gives, whatever the padding and its gradient hold."""
    inside = (slice(None), slice(1, 4), slice(2, 7))
    small = propagate_inputs((2, 3, 5, 4), 4, torch.float32, backend.device)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool, device=backend.device)
    mask[inside] = True
    padded = [torch.full((2, 6, 7, *t.shape[3:]), garbage, dtype=t.dtype, device=t.device) for t in small]
    for big, t in zip(padded, small, strict=True):
        big[inside] = t

    def run(*t: Tensor, **options: Any) -> Tensor:
        return propagate_2d(*t, merge=merge, backend=backend.name, **options)

    y, grads, dy = with_gradients(run, small)
    big_dy = torch.full((2, 6, 7, *dy.shape[3:]), garbage, device=dy.device)
    big_dy[inside] = dy
    big_y, big_grads, _ = with_gradients(lambda *t: run(*t, mask=mask), padded, big_dy)
    for alone, with_padding in zip((y, *grads), (big_y, *big_grads), strict=True):
        torch.testing.assert_close(with_padding[inside], alone, rtol=1e-5, atol=1e-6)
        assert not with_padding[~mask].any()  # zero, not NaN, where there is no image


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    shape = (2, 5, 4, 6)
    x, logits, lam, u = propagate_inputs(shape, 4, dtype, backend.device)

    # channels first, as a convolution leaves them
    first = [t.movedim(-1, 1).contiguous().movedim(1, -1) for t in (x, logits, lam, u)]
    check_propagate(backend, first)
    # every other channel, every other row, a transposed grid
    check_propagate(backend, [torch.stack([t, t * 9], -1).flatten(-2)[..., ::2] for t in (x, logits, lam, u)])
    check_propagate(backend, [torch.cat([t, t], 1)[:, ::2] for t in (x, logits, lam, u)])
    check_propagate(backend, [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, logits, lam, u)])
    # broadcast parameters have stride 0
    check_propagate(
        backend,
        [x[:, :1].expand(x.shape), logits[..., :1].expand(logits.shape), lam[:1].expand(lam.shape), u],
    )
    # a mask that is a view, an output gradient that is one
    mask = (draw(2, 4, 5, seed=4) > -1).to(backend.device).transpose(1, 2)
    check_propagate(backend, [x, logits, lam, u], mask=mask)
    leaves = [t.detach().requires_grad_() for t in (x, logits, lam, u)]
    y = propagate_2d(*leaves, backend=backend.name)
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    written_out = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(expanded, written_out, strict=True))


@every_backend
def test_line_scan_any_strides(backend: Backend) -> None:
    tensors = line_scan_inputs((2, 5, 4, 6), torch.float32, backend.device)
    for direction in DIRECTIONS:
        check_line_scan(backend, [t.movedim(-1, 1).contiguous().movedim(1, -1) for t in tensors], direction)
        check_line_scan(backend, [t[:, :, :1].expand(t.shape) for t in tensors], direction, 3)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(backend: Backend, dtype: torch.dtype) -> None:
    """Saturated sigmoids (+-1e4 is finite even in float16) and sums below the clamp (-20) stay right and finite."""
    skip_unless_supported(backend, torch.empty(0, dtype=dtype, device=backend.device))
    x, logits, lam, u = propagate_inputs((2, 6, 5, 4), 4, torch.float64, backend.device)
    for extremes in ([-1e4, 1e4], [-20.0], [-1e4], [1e4], [-20.0, 0.0, 1e4, -1e4, -16.5, 88.0, -88.0, -104.0]):
        values = torch.tensor(extremes, dtype=torch.float64, device=backend.device)
        which = draw(*logits.shape, seed=8).abs().mul(1000).long().to(backend.device) % len(extremes)
        tensors = [t.to(dtype) for t in (x, values[which], lam, u)]
        y, grads, dy = with_gradients(lambda *t: propagate_2d(*t, backend=backend.name), tensors)
        want, want_grads, _ = with_gradients(
            lambda *t: propagate_2d(*t, backend="torch"), [t.double() for t in tensors], dy
        )
        # Gradients through a clamp or a saturated sigmoid are tiny or exactly zero, and which it is hangs on the last
        # bit of a float32 sigmoid: logits are compared on the scale of the other gradients.
        assert_close(
            ("x", "lam", "u"), [y, grads[0], *grads[2:]], [want, want_grads[0], *want_grads[2:]], dtype, backend.name
        )
        assert torch.isfinite(grads[1]).all()
        torch.testing.assert_close(grads[1].double(), want_grads[1], rtol=0.02, atol=1e-2)


@every_backend
def test_at_the_clamp(backend: Backend) -> None:
    tensors = propagate_inputs((2, 4, 4, 3), 4, torch.float64, backend.device)
    tensors[1] = tensors[1] - 17.5  # sums on either side of 1e-7
    check_propagate(backend, tensors)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_scans(backend: Backend, dtype: torch.dtype) -> None:
    """300 lines of a state that hardly decays: float16 sums would have lost it long before."""
    for shape, directions in (((1, 300, 2, 2), ("down", "up")), ((1, 2, 300, 2), ("left",))):
        x, logits, lam, u = propagate_inputs(shape, len(directions), dtype, backend.device)
        # neighbours of such a state differ by little: `more` for a backward that reads the state rounded to the dtype
        check_propagate(backend, [x.abs(), logits, lam.abs(), u], directions=directions, more=3.0)


@every_backend
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_the_same_twice(backend: Backend, merge: str) -> None:
    tensors = propagate_inputs((3, 9, 8, 16), 4, torch.float32, backend.device)
    runs = [with_gradients(lambda *t: propagate_2d(*t, merge=merge, backend=backend.name), tensors) for _ in range(2)]
    for a, b in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(a, b)


@every_backend
def test_inputs_stay_as_they_were(backend: Backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # float32 needs no conversion, so a backend could write into them
        tensors = propagate_inputs((1, 3, 4, 2), 4, dtype, backend.device)
        copies = [t.clone() for t in tensors]
        mask = torch.ones(1, 3, 4, dtype=torch.bool, device=backend.device)
        with_gradients(lambda *t, mask=mask: propagate_2d(*t, mask=mask, backend=backend.name), tensors)
        assert mask.all()
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
        tensors = line_scan_inputs((1, 3, 4, 2), dtype, backend.device)
        copies = [t.clone() for t in tensors]
        with_gradients(lambda *t: line_scan(*t, "up", 2, backend=backend.name), tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@every_backend
def test_only_some_gradients_wanted(backend: Backend) -> None:
    tensors = propagate_inputs((1, 3, 4, 2), 4, torch.float32, backend.device)
    _, all_grads, dy = with_gradients(lambda *t: propagate_2d(*t, backend=backend.name), tensors)
    for wanted in range(4):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        (grad,) = torch.autograd.grad(propagate_2d(*leaves, backend=backend.name), leaves[wanted], dy)
        assert torch.equal(grad, all_grads[wanted])


@every_backend
def test_an_empty_batch(backend: Backend) -> None:
    y, grads, _ = with_gradients(
        lambda *t: propagate_2d(*t, backend=backend.name),
        propagate_inputs((0, 3, 4, 2), 4, torch.float32, backend.device),
    )
    assert y.shape == (0, 3, 4, 2)
    assert [g.shape[0] for g in grads] == [0] * 4
    h, grads, _ = with_gradients(
        lambda *t: line_scan(*t, "left", backend=backend.name),
        line_scan_inputs((0, 3, 4, 2), torch.float32, backend.device),
    )
    assert h.shape == (0, 3, 4, 2)
    assert [g.shape[0] for g in grads] == [0] * 3


# The fixtures that `given` sees once for all its examples (poison) hold no state that an example could change.
few_examples = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_backend
@few_examples
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4, unique=True),
    merge=st.sampled_from(["sum", "none"]),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_case(backend: Backend, shape, directions, merge, masked, dtype, seed) -> None:
    tensors = propagate_inputs(shape, len(directions), dtype, backend.device, seed)
    mask = (draw(*shape[:3], seed=seed) > -1).to(backend.device) if masked else None
    check_propagate(backend, tensors, directions=directions, merge=merge, mask=mask)


@every_backend
@few_examples
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)),
    direction=st.sampled_from(DIRECTIONS),
    chunk=st.none() | st.integers(1, 10),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_line_scan(backend: Backend, shape, direction, chunk, dtype, seed) -> None:
    check_line_scan(backend, line_scan_inputs(shape, dtype, backend.device, seed), direction, chunk)


@every_backend
def test_auto_explains_itself(backend: Backend) -> None:
    choice = explain_backend(torch.zeros(1, 2, 2, 1, device=backend.device))
    assert choice.backend not in choice.passed_over
    assert all(isinstance(reason, str) and reason for reason in choice.passed_over.values())


def test_an_explanation_is_of_what_an_operator_takes():
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        explain_backend([1.0])
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64; accepted: torch\.float16"):
        explain_backend(torch.zeros(1, 2, 2, 1, dtype=torch.int64))
