"""Parameters that channels share, features of each direction's own, and the forget gate, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    Backend,
    check_propagate,
    draw,
    every_backend,
    relative_error,
    set_inputs,
    with_gradients,
    with_keep,
)

from cgspn.ops import DIRECTIONS, propagate_2d, propagate_2d_reference

FOUR = [0, 1, 2, 3]


def expanded(share: int, *parameters: torch.Tensor) -> list[torch.Tensor]:
    return [t.repeat_interleave(share, -1) for t in parameters]


def test_a_set_is_its_parameters_repeated() -> None:
    x, logits, lam, u, keep = set_inputs((2, 3, 4, 12), 3)
    want = propagate_2d_reference(x, *expanded(3, logits, lam, u), keep=expanded(3, keep)[0])
    assert relative_error(propagate_2d_reference(x, logits, lam, u, keep=keep), want) < 1e-15


def test_features_of_their_own_are_scans_apart() -> None:
    x, logits, lam, u, keep = set_inputs((2, 3, 4, 6), 2, own=True)
    y = propagate_2d_reference(x, logits, lam, u, keep=keep, merge="none")
    for d, name in enumerate(DIRECTIONS):
        one = [t[:, :, :, d : d + 1] for t in (logits, lam, u, keep)]
        apart = propagate_2d_reference(x[:, :, :, d], *one[:3], keep=one[3], directions=(name,))
        assert relative_error(y[:, :, :, d], apart) < 1e-15


def test_an_open_gate_keeps_all_and_a_closed_one_nothing() -> None:
    x, logits, lam, u, keep = set_inputs((1, 4, 5, 4), 1)
    plain = propagate_2d_reference(x, logits, lam, u)
    assert relative_error(propagate_2d_reference(x, logits, lam, u, keep=keep * 0 + 50), plain) < 1e-15
    closed = propagate_2d_reference(x, logits, lam, u, keep=keep * 0 - 800)
    assert torch.allclose(closed, (u * lam * x[..., None, :]).sum(3), rtol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("share", [8, 4])
def test_each_dtype(backend: Backend, dtype: torch.dtype, own: bool, keep: bool, share: int) -> None:
    tensors = set_inputs((2, 5, 7, 16), share, dtype=dtype, device=backend.device, own=own, keep=keep)
    check_propagate(backend, tensors, merge="none")


@every_backend
@pytest.mark.parametrize(("channels", "share"), [(12, 3), (32, 16), (24, 24), (10, 1), (10, 2), (8, 8)])
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_each_share(backend: Backend, channels: int, share: int, merge: str) -> None:
    for own in (False, True):
        tensors = set_inputs((2, 4, 6, channels), share, dtype=torch.float32, device=backend.device, own=own)
        check_propagate(backend, tensors, merge=merge)


@every_backend
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 1, 9, 16), (1, 9, 1, 16), (1, 70, 3, 8)], ids=str)
def test_borders(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    check_propagate(backend, set_inputs(shape, 8, dtype=torch.float32, device=backend.device, own=True), merge="none")


@every_backend
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_padding_may_hold_anything(backend: Backend, own: bool) -> None:
    tensors = set_inputs((2, 6, 5, 16), 8, dtype=torch.float32, device=backend.device, own=own)
    mask = (draw(2, 6, 5, seed=7) > -0.7).to(backend.device)
    for t in tensors:
        t[~mask] = float("nan")
    wanted = [t.where(mask.view(*mask.shape, *[1] * (t.dim() - 3)), torch.zeros_like(t)) for t in tensors]
    options = {"merge": "sum", "mask": mask}
    y, grads, dy = with_gradients(with_keep(propagate_2d, backend=backend.name, **options), tensors)
    want, want_grads, _ = with_gradients(with_keep(propagate_2d_reference, **options), [t.double() for t in wanted], dy)
    for got, expected in zip([y, *grads], [want, *want_grads], strict=True):
        assert torch.isfinite(got).all()
        assert relative_error(got, expected) < 3e-5


@every_backend
def test_extreme_gates(backend: Backend) -> None:
    x, logits, lam, u, keep = set_inputs((1, 6, 5, 16), 8, dtype=torch.float32, device=backend.device, own=True)
    for logit, gate in ((1.0, 60.0), (1.0, -60.0), (-60.0, 1.0), (60.0, -60.0)):
        check_propagate(backend, [x, logits * logit, lam, u, keep * gate], merge="none")


@every_backend
@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    share=st.sampled_from([1, 2, 4, 8]),
    sets=st.integers(1, 3),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=4, unique=True),
    own=st.booleans(),
    keep=st.booleans(),
)
def test_any_shape(
    backend: Backend, size: tuple[int, int, int], share: int, sets: int, directions: list[str], own: bool, keep: bool
) -> None:
    shape = (*size, share * sets)
    tensors = set_inputs(shape, share, len(directions), dtype=torch.float32, device=backend.device, own=own, keep=keep)
    check_propagate(backend, tensors, directions=directions, merge="none")


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep: bool) -> None:
    tensors = [t.requires_grad_() for t in set_inputs((1, 3, 4, 8), 4, dtype=torch.float32, own=True, keep=keep)]
    given_keep = tensors[4] if keep else None
    for op in (torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving):
        torch.library.opcheck(op.default, (*tensors[:4], given_keep, None, FOUR, False, "torch"))


def test_gradients_of_gradients() -> None:
    tensors = [t.requires_grad_() for t in set_inputs((1, 2, 3, 4), 2, own=True)]
    assert torch.autograd.gradgradcheck(with_keep(propagate_2d, backend="torch", merge="none"), tensors)
