"""The fused pieces against their definitions in float64: values and every gradient, by relative error.

The kernels run on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

import os

import pytest
import torch

from cgspn.ops.fused import linear_residual, local_norm, norm_linear
from cgspn.ops.fused.linear_residual import LinearResidual
from cgspn.ops.fused.local_norm import LocalNorm
from cgspn.ops.fused.norm_linear import NormLinear

triton = pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = {torch.float32: 2e-5, torch.float16: 3e-3}  # some roundings of 24, 11 and 8 bits
if GPU:  # the interpreter multiplies the bits of bfloat16 as integers
    DTYPES[torch.bfloat16] = 2e-2


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def check(function, plain, tensors, dtype, **rest):
    """Value and gradients of `function` on `tensors` against `plain` in float64."""
    rounded = [None if t is None else t.to(DEVICE, dtype) for t in tensors]
    mine = [None if t is None else t.clone().requires_grad_() for t in rounded]
    exact = [None if t is None else t.double().requires_grad_() for t in rounded]
    y, wanted = function(*mine, **rest), plain(*exact, **rest)
    assert y.dtype == dtype
    assert relative(y, wanted) < DTYPES[dtype]
    dy = torch.randn(wanted.shape, device=DEVICE, dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, [t for t in mine if t is not None], dy)
    true = torch.autograd.grad(wanted, [t for t in exact if t is not None], dy.double())
    for name, a, b in zip("abcdef", got, true):
        assert relative(a, b) < 3 * DTYPES[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "latent"), [((3, 37), 96, 21), ((1,), 40, 5), ((2, 5, 7), 130, 64), ((70,), 72, 150)]
)
def test_norm_linear(rows, channels, latent, dtype):
    torch.manual_seed(0)
    x = torch.randn(*rows, channels) * 2 + 3  # far from zero: the mean must not eat the digits
    tensors = [x, 1 + torch.randn(channels) / 4, torch.randn(channels), torch.randn(latent, channels) / channels**0.5]
    tensors.append(torch.randn(latent))

    def fused(x, gain, shift, weight, bias):
        return NormLinear.apply(x, gain, shift, weight, bias, 1e-6)[0]

    check(fused, lambda *t: norm_linear.plain(*t, 1e-6), tensors, dtype)
    rounded = [t.to(DEVICE, dtype) for t in tensors]
    assert torch.equal(norm_linear.forward(*rounded, 1e-6)[0], fused(*rounded))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_linear_residual(norm, scaled, dtype):
    torch.manual_seed(0)
    channels, latent = 130, 84
    tensors = [torch.randn(3, 19, channels), torch.randn(3, 19, latent), torch.rand(latent) + 0.5 if norm else None]
    tensors += [torch.randn(channels, latent) / latent**0.5, torch.randn(channels), torch.rand(channels)]
    tensors[-1] = tensors[-1] if scaled else None

    def fused(residual, y, gain, weight, bias, scale):
        return LinearResidual.apply(residual, y, gain, weight, bias, scale, 1e-6)

    check(fused, lambda *t: linear_residual.plain(*t, 1e-6), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_flows_back_past_the_norm_joins_its_gradient(dtype):
    torch.manual_seed(0)
    channels, latent = 96, 21
    tensors = [torch.randn(3, 37, channels) + 1, 1 + torch.randn(channels) / 4, torch.randn(channels)]
    tensors += [torch.randn(latent, channels) / channels**0.5, torch.randn(latent)]
    mixing = torch.randn(latent, channels).to(DEVICE, dtype)

    def fused(*t):
        out, x = NormLinear.apply(*t, 1e-6)
        return x + out @ mixing

    def plain(*t):
        return t[0] + norm_linear.plain(*t, 1e-6) @ mixing.double()

    check(fused, plain, tensors, dtype)
    x = tensors[0].to(DEVICE, dtype).requires_grad_()
    _, same = NormLinear.apply(x, *[t.to(DEVICE, dtype) for t in tensors[1:]], 1e-6)
    (alone,) = torch.autograd.grad(same, x, torch.ones_like(same))
    assert torch.equal(alone, torch.ones_like(x))


# few rows: channels are parted and the norm is a launch of its own; many, as on a GPU that is easily filled: one launch
@pytest.mark.parametrize(("rows", "parts"), [((3, 19), 264), ((3, 19), 1), ((2, 75), 1)])
@pytest.mark.parametrize("channels", [130, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_residual_norm(dtype, channels, rows, parts, monkeypatch):
    monkeypatch.setattr(linear_residual, "PARTS", parts)
    torch.manual_seed(0)
    latent = 84
    shapes = [(*rows, channels), (*rows, latent), (latent,), (channels, latent), *[(channels,)] * 5]
    t = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    t[0] += 5  # far from zero: the mean must not eat the digits
    ours = linear_residual.forward_norm(*t[:6], 1e-6, (t[6], t[7], 1e-5), t[8])
    exact = linear_residual.plain(*[x.double() for x in t[:6]], 1e-6)
    normal = torch.nn.functional.layer_norm(exact, (channels,), t[6].double(), t[7].double(), 1e-5)
    for a, b in zip(ours, (normal, exact + t[8].double())):
        assert a.dtype == dtype
        assert relative(a, b) < DTYPES[dtype]
    assert relative(linear_residual.forward(*t[:6], 1e-6), exact) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "side"), [((5, 37), 3), ((1, 6), 3), ((7, 1), 5)])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_local_norm(grid, side, norm, masked, dtype):
    torch.manual_seed(0)
    channels = 21
    mask = (torch.rand(2, *grid) > 0.3).to(DEVICE) if masked else None
    tensors = [torch.randn(2, *grid, channels), torch.randn(channels, 1, side, side) / side, torch.randn(channels)]
    tensors.append(torch.rand(channels) + 0.5 if norm else None)

    def fused(x, kernel, bias, gain):
        return LocalNorm.apply(x, kernel, bias, gain, 1e-6, mask)

    check(fused, lambda *t: local_norm.plain(*t, 1e-6, mask), tensors, dtype)


def test_gradients_of_gradients_go_through_the_definitions():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, 24, device=DEVICE), torch.randn(2, 3, 4, 5, device=DEVICE)
    vectors = [torch.randn(n, device=DEVICE) for n in (24, 24, 5, 24)]
    down, up, kernel = (torch.randn(s, device=DEVICE) for s in ((5, 24), (24, 5), (5, 1, 3, 3)))
    gain, shift, small, wide = vectors
    pairs = [
        (lambda t: NormLinear.apply(t, gain, shift, down, small, 1e-6)[0], norm_linear.plain, x),
        (lambda t: LinearResidual.apply(x, t, small, up, wide, gain, 1e-6), linear_residual.plain, y),
        (lambda t: LocalNorm.apply(t, kernel, small, small, 1e-6, None), local_norm.plain, y),
    ]
    arguments = [(gain, shift, down, small, 1e-6), (small, up, wide, gain, 1e-6), (kernel, small, small, 1e-6, None)]
    for (mine, plain, at), rest in zip(pairs, arguments, strict=True):
        before = (x,) if plain is linear_residual.plain else ()
        found = []
        for function in (mine, lambda t, plain=plain, before=before, rest=rest: plain(*before, t, *rest)):
            leaf = at.clone().requires_grad_()
            (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        assert relative(*found) < 1e-4


def test_no_rows_at_all():
    x, y = torch.randn(0, 24, device=DEVICE), torch.randn(0, 5, device=DEVICE)
    gain, small, weight = (torch.randn(s, device=DEVICE) for s in ((24,), (5,), (5, 24)))
    leaves = [x.requires_grad_(), gain.requires_grad_(), weight.requires_grad_()]
    out = NormLinear.apply(x, gain, gain, weight, small, 1e-6)[0]
    assert [g.abs().sum() for g in torch.autograd.grad(out.sum(), leaves)] == [0, 0, 0]
    assert LinearResidual.apply(x, y, small, weight.T, gain, None, 1e-6).shape == x.shape
