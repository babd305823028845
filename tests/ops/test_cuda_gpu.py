"""The CUDA kernels against the float64 reference, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from cgspn.ops import DIRECTIONS, line_scan, line_scan_reference, propagate_2d, propagate_2d_reference
from cgspn.ops.arguments import Scan
from cgspn.ops.cuda import scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Rounding of the output to the dtype is 2^-9 for bfloat16, 2^-12 for float16; sums of rounded planes and gradients
# through a rounded state are a few of them. float32 differs by what approximate exp and reciprocal leave.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("y", "x", "logits", "lam", "u")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN, so that an element nobody writes shows."""
    monkeypatch.setattr(scan, "empty", lambda shape, like: like.new_full(shape, float("nan")))


def error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=max(floor, 1e-30))).item()


def logits_scale(want: list[Tensor], x: Tensor, dy: Tensor) -> float:
    """What an error of the logits' gradient is measured against where that gradient cancels to little or nothing.

    It is g w (1 - sigmoid) (neighbour's h - mean h): where neighbours agree (long scans, lines of one position,
    saturated logits) the difference of two states rounded to the dtype leaves their rounding, which goes with g h.
    The size of g is that of dlam / x, of h that of du / dy, and w (1 - sigmoid) is about a quarter.
    """

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    _, _, dlogits, dlam, du = want
    return 0.25 * rms(dlam) / rms(x) * rms(du) / rms(dy) * dlogits.numel() ** 0.5


def inputs(
    b: int, h: int, w: int, c: int, d: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(b, h, w, c), (b, h, w, d, 3, c), (b, h, w, d, c), (b, h, w, d, c)]
    made = [torch.randn(s, generator=g, device="cuda", dtype=torch.float32) for s in shapes]
    made[1] *= scale
    return [t.to(dtype) for t in made]


def gradients(function, tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    g = torch.Generator("cuda").manual_seed(seed)
    dy = torch.randn(y.shape, generator=g, device="cuda", dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def compare(tensors: list[Tensor], tolerance: float | None = None, **options) -> None:
    dtype = tensors[0].dtype
    got = gradients(lambda *t: propagate_2d(*t, backend="cuda", **options), tensors)
    # dy is drawn in the output's dtype: round it for the reference too
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    y = propagate_2d_reference(*leaves, **options)
    g = torch.Generator("cuda").manual_seed(1)
    dy = torch.randn(y.shape, generator=g, device="cuda", dtype=torch.float32).to(dtype).double()
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    floor = dict.fromkeys(NAMES, 0.0) | {"logits": logits_scale(want, tensors[0], dy)}
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all(), name
        found = error(a, b, floor[name])
        assert found < (tolerance or TOLERANCE[dtype]), (name, found)


SIZES = [
    (2, 7, 5, 8),
    (1, 1, 9, 16),
    (3, 9, 1, 24),
    (1, 1, 1, 1),
    (2, 13, 37, 21),
    (1, 33, 18, 64),
    (2, 5, 6, 12),
    (1, 3, 4, 1000),
    (1, 2, 300, 40),
    (1, 75, 74, 72),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_gradients(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for merge in ("sum", "none"):
        compare(inputs(*size, 4, dtype), merge=merge)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_directions_in_any_order(count: int) -> None:
    for directions in itertools.permutations(DIRECTIONS, count):
        if count == 4 and directions[0] != "left":
            continue
        for merge in ("sum", "none"):
            compare(inputs(1, 6, 9, 16, count, torch.float32), merge=merge, directions=directions)


@pytest.mark.parametrize("c", [1, 2, 3, 4, 6, 48, 96, 520, 4096])
def test_channels(c: int) -> None:
    compare(inputs(2, 4, 5, c, 4, torch.bfloat16))


@pytest.mark.parametrize("size", [(1, 3, 1024, 8), (1, 1024, 2, 16), (1, 2, 1025, 8), (1, 3, 2500, 4), (1, 2, 4096, 8)])
def test_long_lines(size: tuple[int, int, int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compare(inputs(*size, 4, dtype))


def test_lines_too_long_for_the_kernels() -> None:
    compare(inputs(1, 2, 4500, 1, 2, torch.float32), directions=("down", "up"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mask_and_what_the_padding_holds(dtype: torch.dtype) -> None:
    tensors = inputs(3, 11, 14, 16, 4, dtype)
    mask = torch.rand(3, 11, 14, device="cuda") < 0.7
    mask[0, 5:] = False
    mask[1, :, 9:] = False
    for merge in ("sum", "none"):
        compare(tensors, merge=merge, mask=mask)
        compare(tensors, merge=merge, mask=mask.transpose(1, 2).contiguous().transpose(1, 2))
    want = gradients(lambda *t: propagate_2d(*t, mask=mask, backend="cuda"), tensors)
    for t in tensors:
        t[~mask] = float("nan")
    got = gradients(lambda *t: propagate_2d(*t, mask=mask, backend="cuda"), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_padding_does_not_change_the_result() -> None:
    tensors = inputs(1, 9, 12, 16, 4, torch.float32)
    small = propagate_2d(*(t[:, :7, :8] for t in tensors), backend="cuda")
    mask = torch.zeros(1, 9, 12, dtype=torch.bool, device="cuda")
    mask[:, :7, :8] = True
    assert torch.equal(propagate_2d(*tensors, mask=mask, backend="cuda")[:, :7, :8], small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [64, 21])
def test_views_of_one_packed_tensor(c: int, dtype: torch.dtype) -> None:
    b, h, w = 2, 9, 10
    for order in ((0, 1, 2, 3, 4, 5), (3, 0, 4, 1, 2, 5), (0, 2, 1, 4, 3, 5), (0, 1, 2, 5, 3, 4)):
        shape = [(b, h, w, 4, 5, c)[n] for n in order]
        back = [order.index(n) for n in range(6)]
        packed = torch.randn(shape, device="cuda").to(dtype).permute(back)
        x = torch.randn(b, c, h, w, device="cuda").to(dtype).permute(0, 2, 3, 1)  # channels first in memory
        compare([x, packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :]])
        compare(
            [x.contiguous()[:, 1:, ::2], packed[:, 1:, ::2, :, 2:], packed[:, 1:, ::2, :, 0], packed[:, 1:, ::2, :, 1]]
        )


def test_misaligned_storage() -> None:
    tensors = inputs(1, 6, 7, 16, 4, torch.bfloat16)
    moved = []
    for t in tensors:
        storage = t.new_empty(t.numel() + 1)
        storage[1:] = t.flatten()
        moved.append(storage[1:].view(t.shape))
    compare(moved)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_logits(dtype: torch.dtype) -> None:
    for scale, shift in ((10, 0), (3, -20), (0.5, -16), (30, 0), (2, 40), (1, -60), (200, 0)):
        x, logits, lam, u = inputs(2, 12, 9, 16, 4, torch.float32)
        logits = logits * scale + shift
        compare([t.to(dtype) for t in (x, logits, lam, u)], 5e-5 if dtype == torch.float32 else None)


def test_long_scan_stays_finite_in_bfloat16() -> None:
    x, logits, lam, u = inputs(1, 1024, 3, 8, 4, torch.bfloat16)
    compare([x, logits, torch.ones_like(lam), u])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_line_scan(direction: str, dtype: torch.dtype) -> None:
    for (b, h, w, c), chunk in itertools.product([(2, 9, 13, 8), (1, 17, 5, 21), (2, 6, 70, 64)], [None, 1, 4, 100]):
        x, _, lam, _ = inputs(b, h, w, c, 1, dtype)
        weights = torch.rand(b, h, w, 3, c, device="cuda").div(3).to(dtype)
        tensors = [x, weights, lam[:, :, :, 0]]
        got = gradients(lambda *t: line_scan(*t, direction, chunk, backend="cuda"), tensors)  # noqa: B023
        leaves = [t.double().requires_grad_() for t in tensors]
        y = line_scan_reference(*leaves, direction, chunk)
        g = torch.Generator("cuda").manual_seed(1)
        dy = torch.randn(y.shape, generator=g, device="cuda", dtype=torch.float32).to(dtype).double()
        want = [y, *torch.autograd.grad(y, leaves, dy)]
        for a, b_ in zip(got, want, strict=True):
            assert error(a, b_) < TOLERANCE[dtype]


def test_twice_the_same_bits() -> None:
    tensors = inputs(4, 40, 33, 64, 4, torch.bfloat16)
    first, *others = [gradients(lambda *t: propagate_2d(*t, backend="cuda"), tensors) for _ in range(5)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_expanded_cotangent_and_empty_batch() -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 5, 6, 16, 4, torch.float32)]
    got = torch.autograd.grad(propagate_2d(*tensors, backend="cuda").sum(), tensors)
    want = torch.autograd.grad(propagate_2d(*tensors, backend="torch").sum(), tensors)
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert propagate_2d(*(t[:0] for t in tensors), backend="cuda").shape == (0, 5, 6, 16)


def test_second_derivative() -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 4, 3, 8, 4, torch.float32)]
    found = []
    for backend in ("cuda", "torch"):
        first = torch.autograd.grad(propagate_2d(*tensors, backend=backend).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), tensors))
    assert all(error(a, b) < 1e-4 for a, b in zip(*found, strict=True))


def test_other_stream() -> None:
    tensors = inputs(8, 64, 64, 64, 4, torch.bfloat16)
    want = propagate_2d(*tensors, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.empty_like(t) for t in tensors]
        torch.cuda._sleep(20_000_000)
        for a, b in zip(late, tensors, strict=True):
            a.copy_(b)
        got = propagate_2d(*late, backend="cuda")
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device() -> None:
    tensors = inputs(2, 9, 9, 16, 4, torch.bfloat16)
    want = propagate_2d(*tensors, backend="cuda")
    assert torch.equal(propagate_2d(*(t.to("cuda:1") for t in tensors), backend="cuda").cpu(), want.cpu())


def test_graph_capture() -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 20, 21, 64, 4, torch.bfloat16)]
    dy = torch.randn(2, 20, 21, 64, device="cuda").bfloat16()

    def step() -> tuple[Tensor, ...]:
        y = propagate_2d(*tensors, backend="cuda")
        return (y, *torch.autograd.grad(y, tensors, dy))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (3, 4):
        with torch.no_grad():
            for t, new in zip(tensors, inputs(2, 20, 21, 64, 4, torch.bfloat16, seed=seed), strict=True):
                t.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiled_without_recompiling_for_every_size() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda *t: propagate_2d(*t), fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((9, 12), (14, 11), (20, 30)):
        tensors = inputs(2, h, w, 16, 4, torch.bfloat16)
        got = gradients(function, tensors)
        want = gradients(lambda *t: propagate_2d(*t, backend="cuda"), tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count == 1


def test_opcheck() -> None:
    x, logits, lam, u = (t.requires_grad_() for t in inputs(2, 5, 4, 8, 4, torch.float32))
    mask = torch.rand(2, 5, 4, device="cuda") < 0.8
    for op in (torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving):
        torch.library.opcheck(op.default, (x, logits, lam, u, None, mask, [0, 1, 2, 3], True, "cuda"))
    torch.library.opcheck(torch.ops.cgspn.line_scan.default, (x, logits[:, :, :, 0], lam[:, :, :, 0], 1, 2, "cuda"))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    b, h, w, c = 12, 230, 170, 384  # logits: 2.16e9 elements
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(b, h, w, 4, 3, c, device="cuda", dtype=torch.bfloat16).normal_(generator=g)
    assert logits.numel() > 2**31
    x, lam, u = (
        torch.empty(b, h, w, *d, c, device="cuda", dtype=torch.bfloat16).normal_(generator=g) for d in ((), (4,), (4,))
    )
    whole = Scan(x, logits, lam, u)
    y, *saved = scan.forward_saving(whole)
    last = [t[-1:] for t in (x, logits, lam, u)]
    assert torch.equal(y[-1:], propagate_2d(*last, backend="cuda"))
    small = [t[..., 200:208].contiguous() for t in last]
    assert error(y[-1:, ..., 200:208], propagate_2d_reference(*small)) < 1e-2
    grads = scan.backward(x, whole, *saved)[:4]
    _, *saved = scan.forward_saving(Scan(*last))
    for a, b_ in zip(grads, scan.backward(last[0], Scan(*last), *saved)[:4], strict=True):
        assert torch.equal(a[-1:], b_)
