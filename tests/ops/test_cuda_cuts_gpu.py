"""Paths of the CUDA kernels that the plan does not choose by itself yet, on a GPU against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cgspn.layers import Grid, PropagationConfig, PropagationMixer
from cgspn.ops import DIRECTIONS, propagate_2d_projected, propagate_2d_reference
from cgspn.ops.arguments import ProjectedScan, Scan
from cgspn.ops.cuda import launch, projected, scan
from cgspn.ops.cuda.plan import TileConfig
from cgspn.ops.cuda.projected_plan import cuts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FOUR = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and scratch tensor starts as NaN, so that an element nobody writes shows."""
    monkeypatch.setattr(scan, "empty", lambda shape, like: like.new_full(tuple(shape), float("nan")))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def error(a: Tensor, b: Tensor, floor: float = 0.01) -> float:
    """Relative, where the reference counts as at least `floor` an element: some gradients cancel."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=floor * b.numel() ** 0.5)).item()


def names(codes: list[int]) -> list[str]:
    return [DIRECTIONS[code] for code in codes]


def check_scan(
    shape: tuple[int, int, int, int],
    codes: list[int],
    dtype: torch.dtype,
    cut: TileConfig,
    back: TileConfig | None,
    masked: bool,
) -> None:
    b, h, w, c = shape
    d = len(codes)
    tensors = [draw(*shape), draw(b, h, w, d, 3, c, seed=1), draw(b, h, w, d, c, seed=2), draw(b, h, w, d, c, seed=3)]
    tensors = [t.to(dtype) for t in tensors]
    mask = draw(b, h, w, seed=4) > -1 if masked else None
    leaves = [t.double().requires_grad_() for t in tensors]
    y = propagate_2d_reference(*leaves, directions=names(codes), mask=mask)
    dy = draw(*y.shape, seed=5).to(dtype)
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    arguments = Scan(*tensors, None, mask, codes)
    out, *saved = scan.forward_saving(arguments, cut)
    got = [out, *scan.backward(dy, arguments, *saved, back)[:4]]
    for name, a, b_ in zip(("y", "x", "logits", "lam", "u"), got, want, strict=True):
        assert torch.isfinite(a).all(), name
        # the gradient of the logits is a difference of two states rounded to the dtype: test_cuda_gpu.py
        assert error(a, b_) < TOLERANCE[dtype] * (8 if name == "logits" else 1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "cut", "masked"),
    [
        ((2, 74, 74, 16), TileConfig(4, 2, 2, 2, halo=8), False),
        ((1, 33, 147, 8), TileConfig(4, 1, 2, 4, halo=16), True),
        ((1, 294, 41, 8), TileConfig(2, 2, 2, 8, halo=5), False),
        ((1, 20, 23, 6), TileConfig(2, 1, 2, 2, halo=3), True),
        ((2, 9, 40, 3), TileConfig(1, 2, 2, 4, halo=1), True),
    ],
    ids=str,
)
def test_lines_cut_over_a_cluster(shape, cut: TileConfig, dtype: torch.dtype, masked: bool) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    check_scan(shape, FOUR, dtype, cut, cut, masked)


def projected_case(shape, d: int, dtype: torch.dtype, biased: bool = True) -> list[Tensor]:
    c = shape[-1]
    tensors = [draw(*shape), draw(d * 5 * c, c, seed=1) / c**0.5, *([draw(d * 5 * c, seed=2)] if biased else [])]
    return [t.to(dtype) for t in tensors]


def want_of(tensors: list[Tensor], dy: Tensor, **options) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in tensors]
    packed = torch.nn.functional.linear(leaves[0], *leaves[1:]).unflatten(-1, (-1, 5, tensors[0].shape[-1]))
    y = propagate_2d_reference(leaves[0], packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def got_of(tensors: list[Tensor], dy: Tensor, **options) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    bias = inputs[2] if len(inputs) > 2 else None
    y = propagate_2d_projected(*inputs[:2], bias, **{"parameters": "chip", **options})
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def compare(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("y", "x", "weight", "bias"), got, want):
        assert torch.isfinite(a).all(), name
        assert error(a, b, 1e-3) < TOLERANCE[dtype], name


@pytest.mark.parametrize("merge", ["sum", "none"])
@pytest.mark.parametrize(("shape", "inside"), [((4, 74, 70, 64), True), ((1, 20, 31, 64), False)], ids=str)
def test_projected_by_default(shape, inside: bool, merge: str) -> None:
    """On the chip where that is faster, else in memory; padding may hold anything."""
    tensors = projected_case(shape, 4, torch.bfloat16)
    assert projected.is_faster(tensors[0], FOUR) == inside
    mask = draw(*shape[:3], seed=3) > -0.5
    dy = draw(*shape[:3], *([4] if merge == "none" else []), shape[3], seed=5).bfloat16()
    want = want_of(tensors, dy, mask=mask, merge=merge)
    tensors[0][~mask] = float("nan")
    compare(got_of(tensors, dy, mask=mask, merge=merge, parameters="auto"), want, torch.bfloat16)


@pytest.mark.parametrize("merge", ["sum", "none"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 74, 74, 64),
        (2, 20, 21, 40),
        (1, 147, 20, 64),
        (3, 9, 1, 8),
        (1, 1, 30, 24),
        (2, 13, 37, 48),
        (1, 20, 31, 56),
    ],
    ids=str,
)
def test_projected(shape, merge: str) -> None:
    dtype = torch.bfloat16 if shape[-1] != 48 else torch.float16
    for codes, biased in ((FOUR, True), ([3, 0], False)):
        tensors = projected_case(shape, len(codes), dtype, biased)
        options = {"directions": names(codes), "merge": merge}
        dy = draw(*shape[:3], *([len(codes)] if merge == "none" else []), shape[3], seed=5).to(dtype)
        compare(got_of(tensors, dy, **options), want_of(tensors, dy, **options), dtype)


def test_projected_mask_and_what_the_padding_holds() -> None:
    tensors = projected_case((3, 21, 34, 64), 4, torch.bfloat16)
    mask = draw(3, 21, 34, seed=3) > -0.5
    mask[0, 12:] = False
    dy = draw(3, 21, 34, 64, seed=5).bfloat16()
    want = want_of(tensors, dy, mask=mask)
    tensors[0][~mask] = float("nan")
    got = got_of(tensors, dy, mask=mask)
    compare(got, want, torch.bfloat16)
    assert not got[0][~mask].any()
    assert not got[1][~mask].any()


def test_projected_cuts() -> None:
    """A third of the cuts that the bench compares: it looks at the others' results itself."""
    tensors = projected_case((2, 74, 70, 64), 4, torch.bfloat16)
    want = want_of(tensors, draw(2, 74, 70, 64, seed=5).bfloat16())
    gpu = launch.gpu_behind(tensors[0]).machine
    for cut in list(cuts(74, 64, gpu))[::3]:
        assert error(projected.forward(ProjectedScan(*tensors), cut), want[0]) < 1e-2, cut


def test_projected_long_lines_and_many_channels() -> None:
    """What no block has room for: "auto" makes the parameters in memory, "chip" says why not."""
    for shape, message in (
        ((2, 3, 900, 32), "lines of 900 positions of 32 channels do not fit in a block"),
        ((4, 74, 30, 96), "x has 96 channels; the projected kernel takes a multiple of 8 up to 64"),
    ):
        tensors = projected_case(shape, 4, torch.bfloat16)
        dy = draw(*shape, seed=5).bfloat16()
        compare(got_of(tensors, dy, parameters="auto"), want_of(tensors, dy), torch.bfloat16)
        with pytest.raises(RuntimeError, match=message):
            got_of(tensors, dy)


def test_projected_strides() -> None:
    shape = (1, 5, 150, 32)
    tensors = projected_case(shape, 4, torch.bfloat16)
    dy = draw(*shape, seed=5).bfloat16()
    want = want_of(tensors, dy)
    wide = torch.cat([tensors[0], tensors[0]], -1)[..., :32]  # rows twice as far apart
    first = tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # channels first: copied
    for x in (wide, first):
        compare(got_of([x, *tensors[1:]], dy), want, torch.bfloat16)


def test_projected_twice_the_same_bits_also_as_a_graph() -> None:
    tensors = projected_case((4, 40, 33, 64), 4, torch.bfloat16)
    dy = draw(4, 40, 33, 64, seed=5).bfloat16()
    first = got_of(tensors, dy)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        got_of(tensors, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = got_of(tensors, dy)
    graph.replay()
    torch.cuda.synchronize()
    for other in (got_of(tensors, dy), captured):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_projected_compiles_and_counts() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run: Callable[..., Tensor] = torch.compile(
        lambda *t: propagate_2d_projected(*t, parameters="chip"), fullgraph=True, dynamic=True, backend=counter
    )
    for h, w in ((9, 12), (14, 11), (20, 30)):
        tensors = [t.requires_grad_() for t in projected_case((2, h, w, 16), 4, torch.bfloat16)]
        got = torch.autograd.grad(run(*tensors).sum(), tensors)
        want = torch.autograd.grad(propagate_2d_projected(*tensors, parameters="chip").sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count == 1
    arguments = (*projected_case((2, 5, 6, 8), 4, torch.bfloat16), None, FOUR, True, "chip", "auto")
    torch.library.opcheck(torch.ops.cgspn.propagate_2d_projected.default, arguments)
    with FlopCounterMode(display=False) as flops:
        torch.ops.cgspn.propagate_2d_projected(*arguments)
    assert flops.get_total_flops() == 2 * 60 * 160 * 8 + 60 * 4 * 8 * 18


def test_projected_saves_its_inputs_only() -> None:
    x, weight, bias = (t.requires_grad_() for t in projected_case((2, 16, 16, 64), 4, torch.bfloat16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        propagate_2d_projected(x, weight, bias, parameters="chip")
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (x, weight, bias)}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_mixer_scans_through_the_projected_operator(batch: int, compiled: bool) -> None:
    """The same as with its parameters shown, which a hook asks for; also under autocast and torch.compile."""
    mixer = PropagationMixer(144, PropagationConfig(compression=4.5)).cuda()
    torch.nn.init.normal_(mixer.param_proj.weight, std=0.5)
    mask = draw(batch, 40, 33, seed=3) > -1.5
    tokens, grid = draw(batch, 40 * 33, 144), Grid(40, 33, mask=mask)
    run = torch.compile(mixer, fullgraph=True, backend="aot_eager") if compiled else mixer
    found = []
    for shown in (False, True):
        handle = mixer.param_proj.register_forward_pre_hook(lambda *_: None) if shown else None
        with torch.autocast("cuda", torch.bfloat16):
            y = (mixer if shown else run)(tokens, grid)
            with torch.no_grad():
                inference = (mixer if shown else run)(tokens, grid)
        found.append([y, inference, *torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()))])
        if handle is not None:
            handle.remove()
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b, 1e-6) < 3e-2
