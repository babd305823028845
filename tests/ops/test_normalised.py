"""The scan with a normalised state, on every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from operator_cases import (
    Backend,
    check_propagate,
    draw,
    every_backend,
    relative_error,
    set_inputs,
    skip_unless_supported,
    with_gradients,
    with_keep,
)
from torch import Tensor
from torch.nn.functional import softplus

from cgspn.ops import DIRECTIONS, propagate_2d, propagate_2d_normalised, propagate_2d_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def mean_inputs(*args, lam: float = 1.0, **kwargs) -> list[Tensor]:
    x, logits, scale, *rest = set_inputs(*args, **kwargs)
    return [x, logits, lam * softplus(scale), *rest]


def check(backend: Backend, tensors: list[Tensor], **options) -> None:
    check_propagate(backend, tensors, normalise_state=True, **options)


@pytest.mark.parametrize("merge", ["sum", "none"])
def test_it_is_the_scan_over_the_scan_of_ones(merge: str) -> None:
    x, logits, lam, u, keep = mean_inputs((2, 5, 4, 6), 2, 2)
    shared = {"keep": keep, "directions": ("down", "left"), "merge": "none"}
    ones = torch.ones_like(x)
    expected = propagate_2d_reference(x, logits, lam, u, **shared)
    expected = expected / propagate_2d_reference(ones, logits, lam, torch.ones_like(u), **shared)
    expected = expected.sum(3) if merge == "sum" else expected
    for scan in (propagate_2d, propagate_2d_reference):
        found = scan(x, logits, lam, u, **(shared | {"merge": merge}), normalise_state=True)
        assert relative_error(found, expected) < 1e-12


@every_backend
def test_a_constant_stays_what_it_is_however_many_lines_there_are(backend: Backend) -> None:
    for lines in (3, 40):
        _, logits, lam, u, keep = mean_inputs((2, lines, 4, 16), 8, 2, torch.float32, backend.device)
        x = torch.full((2, lines, 4, 16), 2.5, device=backend.device)
        options = {"directions": ("up", "right"), "merge": "none", "backend": backend.name, "normalise_state": True}
        y = propagate_2d(x, logits, lam, torch.ones_like(u), keep=keep, **options)
        torch.testing.assert_close(y, torch.full_like(y, 2.5), rtol=1e-5, atol=0)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [8, 1])
def test_each_dtype(backend: Backend, dtype: torch.dtype, share: int) -> None:
    for keep, own, merge in ((True, True, "none"), (False, False, "sum")):
        tensors = mean_inputs((2, 5, 7, 16), share, dtype=dtype, device=backend.device, own=own, keep=keep)
        check(backend, tensors, merge=merge)


@every_backend
@pytest.mark.parametrize(("channels", "share"), [(12, 3), (32, 16), (24, 24), (10, 2), (8, 8), (21, 1)])
def test_each_share(backend: Backend, channels: int, share: int) -> None:
    for merge in ("sum", "none"):
        check(backend, mean_inputs((2, 4, 6, channels), share, dtype=torch.float32, device=backend.device), merge=merge)


@every_backend
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 1, 9, 16), (1, 9, 1, 16), (1, 70, 3, 8), (1, 3, 150, 8)], ids=str)
def test_borders_and_long_lines(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    check(backend, mean_inputs(shape, 8, dtype=torch.float32, device=backend.device, own=True), merge="none")


@every_backend
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_direction_alone(backend: Backend, direction: str) -> None:
    tensors = mean_inputs((2, 6, 5, 16), 8, 1, torch.float32, backend.device)
    for merge in ("sum", "none"):
        check(backend, tensors, merge=merge, directions=(direction,))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_that_no_vector_fits(backend: Backend, dtype: torch.dtype) -> None:
    """A latent of an odd width before the values; channels that do not lie side by side."""
    x, *rest = mean_inputs((2, 5, 6, 16), 8, dtype=dtype, device=backend.device, own=True)
    skip_unless_supported(backend, x)
    wide = torch.cat([x.new_zeros(2, 5, 6, 21), x.flatten(3)], -1)[..., 21:].unflatten(-1, (4, 16))
    turned = x.movedim(-1, 1).contiguous().movedim(1, -1)
    for view in (wide, turned):
        check(backend, [view, *rest], merge="none")


@every_backend
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_padding_may_hold_anything(backend: Backend, own: bool) -> None:
    tensors = mean_inputs((2, 6, 5, 16), 8, dtype=torch.float32, device=backend.device, own=own)
    mask = (draw(2, 6, 5, seed=7) > -0.7).to(backend.device)
    wanted = [t.where(mask.view(*mask.shape, *[1] * (t.dim() - 3)), torch.zeros_like(t)) for t in tensors]
    for t in tensors:
        t[~mask] = float("nan")
    options = {"mask": mask, "normalise_state": True}
    y, grads, dy = with_gradients(with_keep(propagate_2d, backend=backend.name, **options), tensors)
    want, want_grads, _ = with_gradients(with_keep(propagate_2d_reference, **options), [t.double() for t in wanted], dy)
    assert not y[~mask].any()
    for got, expected in zip([y, *grads], [want, *want_grads], strict=True):
        assert torch.isfinite(got).all()
        assert relative_error(got, expected) < 3e-5


def test_padding_is_zero_and_changes_nothing() -> None:
    x, logits, lam, u, keep = mean_inputs((2, 5, 6, 6), 2, 2)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    wide = propagate_2d_normalised(x, logits, lam, u, keep=keep, directions=("down", "left"), mask=mask)
    alone = propagate_2d_normalised(
        *(t[:, :, :4] for t in (x, logits, lam, u)), keep=keep[:, :, :4], directions=("down", "left")
    )
    assert not wide[:, :, 4:].any()
    torch.testing.assert_close(wide[:, :, :4], alone)


@every_backend
def test_extreme_gates(backend: Backend) -> None:
    x, logits, lam, u, keep = mean_inputs((1, 6, 5, 16), 8, dtype=torch.float32, device=backend.device, own=True)
    for logit, gate in ((1.0, 60.0), (1.0, -60.0), (-60.0, 1.0), (60.0, -60.0)):
        check(backend, [x, logits * logit, lam, u, keep * gate], merge="none")


@every_backend
@pytest.mark.parametrize("scale", [1e-6, 3e-8, 1e6])
def test_weights_that_are_nothing_or_huge(backend: Backend, scale: float) -> None:
    """n around the least that is divided by, and below, where it has no gradient."""
    tensors = mean_inputs((1, 5, 4, 8), 8, 1, dtype=torch.float32, device=backend.device, lam=scale)
    with_lam = [t.detach().requires_grad_() for t in tensors]
    options = {"normalise_state": True, "directions": ("down",)}
    y = with_keep(propagate_2d, backend=backend.name, **options)(*with_lam)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = with_keep(propagate_2d_reference, **options)(*wide)
    assert relative_error(y, want) < 1e-5
    grads, expected = (torch.autograd.grad(t.sum(), leaves) for t, leaves in ((y, with_lam), (want, wide)))
    for n, (a, b) in enumerate(zip(grads, expected, strict=True)):
        one = scale if n == 2 else 1.0  # the gradient of lam goes with 1 / lam
        assert relative_error(a * one, b * one) < 1e-4


def test_what_is_below_zero_is_refused_on_the_cpu() -> None:
    x, logits, lam, u, keep = mean_inputs((1, 3, 4, 4), 2)
    lam[0, 1, 2] = -0.5
    with pytest.raises(ValueError, match="lam holds 8 values below 0; a normalised state accepts none"):
        propagate_2d_normalised(x, logits, lam, u, keep=keep)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    assert propagate_2d_normalised(x, logits, lam, u, keep=keep, mask=mask).isfinite().all()


@every_backend
@pytest.mark.slow
def test_whole_in_a_compiled_program(backend: Backend) -> None:
    tensors = mean_inputs((1, 5, 6, 16), 8, dtype=torch.float32, device=backend.device)
    function = with_keep(propagate_2d, backend=backend.name, normalise_state=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (y, grads, dy), (want, want_grads, _) = with_gradients(compiled, tensors), with_gradients(function, tensors)
    assert all(torch.equal(a, b) for a, b in zip([y, *grads], [want, *want_grads], strict=True))
    assert dy.isfinite().all()


@every_backend
def test_opcheck(backend: Backend) -> None:
    tensors = [t.requires_grad_() for t in mean_inputs((1, 3, 4, 8), 4, dtype=torch.float32, device=backend.device)]
    for op in (torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving):
        torch.library.opcheck(op.default, (*tensors, None, [0, 1, 2, 3], False, backend.name, True))


def test_gradients_of_gradients() -> None:
    tensors = [t.requires_grad_() for t in mean_inputs((1, 2, 3, 2), 2, 2, own=True)]
    function = with_keep(propagate_2d, backend="torch", directions=("down", "left"), normalise_state=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_functorch_and_programs() -> None:
    x, logits, lam, u, keep = mean_inputs((2, 3, 4, 4), 2, 1)
    options = {"keep": keep, "directions": ("up",)}

    def scan(x: Tensor) -> Tensor:
        return propagate_2d_normalised(x, logits, lam, u, **options)

    want = scan(x)
    _, tangent = torch.func.jvp(scan, (x,), (x,))  # linear in x
    torch.testing.assert_close(tangent, want)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scan(x)

    torch.testing.assert_close(torch.export.export(Model(), (x,)).module()(x), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(8, 74, 74, 96), (1, 147, 147, 96), (2, 37, 41, 32)], ids=str)
def test_large_grids_in_a_cuda_graph(shape: tuple[int, int, int, int]) -> None:
    """Sizes whose lines are cut over clusters; a captured step gives the bits of a launched one."""
    tensors = mean_inputs(shape, 8, dtype=torch.bfloat16, device="cuda", own=True)
    check(Backend("cuda", "cuda"), [t[:1] for t in tensors], merge="none", more=4.0)
    leaves = [t.detach().requires_grad_() for t in tensors]
    function = with_keep(propagate_2d, backend="cuda", merge="none", normalise_state=True)
    dy = torch.randn_like(tensors[0])

    def step() -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
