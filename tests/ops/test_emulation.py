"""The CUDA kernels run on the host, thread by thread, against the float64 reference: correct without a GPU.

Every case runs under three schedules (order of threads, moment at which copies land) and must give the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from operator_cases import (
    Backend,
    check_line_scan,
    check_propagate,
    draw,
    line_scan_inputs,
    propagate_inputs,
    relative_error,
    set_inputs,
    with_keep,
)
from torch import Tensor

from cgspn.ops import DIRECTIONS, propagate_2d_projected, propagate_2d_reference
from cgspn.ops.arguments import Scan
from cgspn.ops.cuda import compile as compiling
from cgspn.ops.cuda import launch, projected, scan
from cgspn.ops.cuda.plan import TileConfig
from cgspn.ops.cuda.projected_plan import ProjectedTileConfig

sys.path.append(str(Path(__file__).parent / "emulation"))
import emulate
from emulate import Schedule, emulated, needs_compiler  # noqa: F401 (a fixture)

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulated")]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
SCHEDULES = ((0, False), (1, True), (2, False))


def check(run: Callable[[], list[Tensor]], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The same bits under every schedule, and close to the reference."""
    first: list[Tensor] | None = None
    for Schedule.order, Schedule.eager in SCHEDULES:
        got = run()
        for a, b in zip(got, want, strict=True):
            assert torch.isfinite(a).all()
            assert relative_error(a, b) < TOLERANCE[dtype]
        assert first is None or all(torch.equal(a, b) for a, b in zip(first, got, strict=True)), "a race"
        first = got


def names(codes: Sequence[int]) -> list[str]:
    return [DIRECTIONS[code] for code in codes]


def check_scan(
    shape: tuple[int, int, int, int],
    codes: list[int],
    dtype: torch.dtype,
    cut: TileConfig | None,
    back: TileConfig | None,
    *,
    merge: str = "sum",
    masked: bool = False,
) -> None:
    tensors = propagate_inputs(shape, len(codes), dtype)
    mask = draw(*shape[:3], seed=3) > -0.8 if masked else None
    leaves = [t.double().requires_grad_() for t in tensors]
    y = propagate_2d_reference(*leaves, directions=names(codes), merge=merge, mask=mask)
    dy = draw(*y.shape, dtype=dtype, seed=9)
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]

    def run() -> list[Tensor]:
        arguments = Scan(*tensors, None, mask, codes, merge == "sum")
        out, *saved = scan.forward_saving(arguments, cut)
        return [out, *scan.backward(dy, arguments, *saved, back)[:4]]

    check(run, want, dtype)


SETS = [
    # shape, channels of a set, own features, forget gate, mask, merge, dtype, cuts of both passes
    ((2, 5, 7, 16), 8, True, True, False, "none", torch.bfloat16, None, None),
    ((1, 7, 5, 16), 8, False, True, True, "sum", torch.float16, None, None),
    ((1, 6, 5, 24), 12, True, False, True, "sum", torch.float32, None, None),
    ((1, 6, 5, 12), 3, True, True, True, "none", torch.float32, None, None),
    ((2, 5, 4, 6), 1, False, True, True, "sum", torch.float32, None, None),
    (
        (1, 23, 29, 8),
        4,
        True,
        True,
        True,
        "none",
        torch.float32,
        TileConfig(4, 2, 2, 2, 8),
        TileConfig(4, 1, 3, 4, 5),
    ),
    ((1, 9, 13, 16), 8, False, True, False, "sum", torch.bfloat16, TileConfig(8, 2, 3), TileConfig(8, 1, 2)),
    ((1, 5, 9, 16), 1, True, True, True, "none", torch.bfloat16, TileConfig(8, 2, 1), TileConfig(8, 1, 2)),
]


@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize(("shape", "share", "own", "keep", "masked", "merge", "dtype", "cut", "back"), SETS, ids=str)
def test_sets_of_parameters(shape, share, own, keep, masked, merge, dtype, cut, back, mean: bool) -> None:
    """One thread takes all channels of a set; sets that it cannot take are cut up; with and without a forget gate."""
    codes = [2, 0, 3, 1]
    tensors = set_inputs(shape, share, dtype=dtype, own=own, keep=keep)
    if mean:
        tensors[2] = torch.nn.functional.softplus(tensors[2])
    mask = draw(*shape[:3], seed=3) > -0.8 if masked else None
    leaves = [t.double().requires_grad_() for t in tensors]
    options = {"directions": names(codes), "merge": merge, "mask": mask, "normalise_state": mean}
    y = with_keep(propagate_2d_reference, **options)(*leaves)
    dy = draw(*y.shape, dtype=dtype, seed=9)
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    if mask is not None:
        for t in tensors:
            t[~mask] = float("nan")
    x, logits, lam, u, *gate = tensors
    gate = gate[0] if gate else None

    def run() -> list[Tensor]:
        arguments = Scan(x, logits, lam, u, gate, mask, codes, merge == "sum", normalise_state=mean)
        out, *saved = scan.forward_saving(arguments, cut)
        return [out, *[g for g in scan.backward(dy, arguments, *saved, back) if g is not None]]

    check(run, want, dtype)


def test_the_plans_own_cut() -> None:
    check_scan((2, 7, 5, 8), [0, 1, 2, 3], torch.bfloat16, None, None)


@pytest.mark.parametrize(
    ("shape", "codes", "cut", "stages", "options"),
    [
        ((1, 11, 29, 4), [0, 1, 2, 3], TileConfig(4, 1, 1, 4, halo=5), 2, {}),
        ((1, 23, 29, 4), [0, 1, 2, 3], TileConfig(2, 1, 3, 2, halo=8), 3, {"masked": True}),
        ((2, 13, 9, 4), [2, 0, 1], TileConfig(2, 2, 2, 2, halo=3), 2, {"merge": "none"}),
    ],
    ids=str,
)
def test_lines_cut_over_a_cluster(shape, codes, cut: TileConfig, stages: int, options) -> None:
    """Blocks of a line that scan a halo and exchange states once in as many lines, both passes."""
    back = TileConfig(cut.vec, cut.lanes, stages, cut.split, cut.halo)
    check_scan(shape, codes, torch.float32, cut, back, **options)


@pytest.mark.parametrize("cut", [None, TileConfig(4, 2, 2, 2, halo=4)], ids=str)
def test_line_scan(cut: TileConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut is not None:
        monkeypatch.setattr(launch, "choose", lambda *_: cut)
    for direction, chunk in (("up", 3), ("right", None)):
        check_line_scan(Backend("cuda", "cpu"), line_scan_inputs((1, 11, 13, 8), torch.float32), direction, chunk)


PROJECTED = [
    # shape, directions, dtype, merge, mask, bias, cut
    ((2, 7, 5, 8), [0, 1, 2, 3], torch.bfloat16, "sum", False, True, None),
    ((1, 18, 37, 24), [3, 0, 2], torch.bfloat16, "none", False, True, (2, 2, 3, 3)),
    ((1, 6, 20, 64), [2, 1], torch.float16, "sum", True, True, (2, 3, 1, 2)),
    ((1, 5, 4, 56), [0, 3], torch.bfloat16, "sum", True, False, (1, 1, 1, 3)),
    ((1, 3, 4, 40), [1, 2], torch.bfloat16, "sum", False, True, (2, 1, 1, 3)),  # a group without channels
]


@pytest.mark.parametrize(("shape", "codes", "dtype", "merge", "masked", "biased", "cut"), PROJECTED, ids=str)
def test_projected(shape, codes, dtype, merge, masked, biased, cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters made on the chip: output and gradients through the public function, padding full of NaN."""
    if cut is not None:
        monkeypatch.setattr(projected, "choose", lambda *_: ProjectedTileConfig(*cut))
    c, d = shape[-1], len(codes)
    tensors = [draw(*shape), draw(d * 5 * c, c, seed=1) / c**0.5, *([draw(d * 5 * c, seed=2)] if biased else [])]
    tensors = [t.to(dtype) for t in tensors]
    mask = draw(*shape[:3], seed=3) > -0.8 if masked else None
    options = {"directions": names(codes), "merge": merge, "mask": mask}
    leaves = [t.double().requires_grad_() for t in tensors]
    packed = torch.nn.functional.linear(leaves[0], *leaves[1:]).unflatten(-1, (d, 5, c))
    y = propagate_2d_reference(leaves[0], packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :], **options)
    dy = draw(*y.shape, dtype=dtype, seed=9)
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    if mask is not None:
        tensors[0][~mask] = float("nan")
    if cut is None:  # an element past where wide loads may begin
        tensors = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
        assert all(t.data_ptr() % 4 for t in tensors)

    def run() -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in tensors]
        bias = inputs[2] if biased else None
        out = propagate_2d_projected(*inputs[:2], bias, parameters="chip", **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, dy)]

    check(run, want, dtype)


@pytest.mark.parametrize("merge", ["sum", "none"])
def test_projected_by_default(merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training "auto" asks which is faster in the forward; the backward makes the parameters again in memory."""
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(projected, "is_faster_for", lambda *case: calls.append(case[:-1]) or True)
    tensors = [t.bfloat16() for t in (draw(2, 7, 5, 8), draw(80, 8, seed=1) / 3, draw(80, seed=2))]
    mask = draw(2, 7, 5, seed=3) > -0.8
    options = {"directions": ("left", "down"), "merge": merge, "mask": mask}
    leaves = [t.double().requires_grad_() for t in tensors]
    packed = torch.nn.functional.linear(*leaves).unflatten(-1, (2, 5, 8))
    y = propagate_2d_reference(leaves[0], packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :], **options)
    dy = draw(*y.shape, dtype=torch.bfloat16, seed=9)
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    tensors[0][~mask] = float("nan")

    def run() -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in tensors]
        out = propagate_2d_projected(*inputs, backend="cuda", **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, dy)]

    check(run, want, torch.bfloat16)
    assert calls == [(2, 7, 8, 2)] * len(SCHEDULES)


def test_projected_second_derivative_and_registration() -> None:
    """A double backward goes through the reference; the op passes PyTorch's own checks."""
    tensors = [t.bfloat16() for t in (draw(2, 7, 5, 8), draw(160, 8, seed=1) / 3, draw(160, seed=2))]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
        if dtype == torch.bfloat16:
            y = propagate_2d_projected(*leaves, parameters="chip")
        else:
            packed = torch.nn.functional.linear(*leaves).unflatten(-1, (4, 5, 8))
            y = propagate_2d_reference(leaves[0], packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :])
        first = torch.autograd.grad(y, leaves, tensors[0].to(dtype), create_graph=True)
        found.append(torch.autograd.grad(first, leaves, [t.to(dtype) for t in tensors]))
    errors = [relative_error(a, b) for a, b in zip(*found, strict=True)]
    assert max(errors) < 1e-2, errors
    arguments = (*[t.requires_grad_() for t in tensors], None, [0, 1, 2, 3], True)
    torch.library.opcheck(torch.ops.cgspn.propagate_2d_projected.default, (*arguments, "chip", "cuda"))


def test_lines_that_no_block_holds() -> None:
    check_propagate(Backend("cuda", "cpu"), propagate_inputs((1, 2, 9000, 1), 1, torch.float32), directions=("down",))


def test_the_emulation_sees_a_missing_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = "    __syncthreads();\n"
    text = compiling.source("forward")
    assert text.count(barrier) == 1
    monkeypatch.setattr(compiling, "source", lambda name: text.replace(barrier, ""))
    monkeypatch.setattr(emulate, "kernel", emulate.Kernel)
    tensors = propagate_inputs((1, 5, 40, 4), 1, torch.float32)
    found = []
    for Schedule.order, Schedule.eager in SCHEDULES[:2]:
        found.append(scan.forward(Scan(*tensors, directions=[0])))
    assert not torch.equal(*found)
