"""The fused pieces against their definitions in float64: values and every gradient, by relative error.

The kernels run on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

import os

import pytest
import torch

from cgspn.ops.fused import (
    definition,
    library,
    linear_residual,
    linear_residual_norm,
    local_norm,
    norm_linear,
    norm_linear_past,
)

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
        return norm_linear(x, gain, shift, weight, bias, 1e-6, backend="triton")

    check(fused, lambda *t: definition.norm_linear(*t, 1e-6), tensors, dtype)


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
        return linear_residual(residual, y, gain, weight, bias, scale, 1e-6, backend="triton")

    check(fused, lambda *t: definition.linear_residual(*t, 1e-6), tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_flows_back_past_the_norm_joins_its_gradient(dtype):
    torch.manual_seed(0)
    channels, latent = 96, 21
    tensors = [torch.randn(3, 37, channels) + 1, 1 + torch.randn(channels) / 4, torch.randn(channels)]
    tensors += [torch.randn(latent, channels) / channels**0.5, torch.randn(latent)]
    mixing = torch.randn(latent, channels).to(DEVICE, dtype)

    def fused(*t):
        out, x = norm_linear_past(*t, 1e-6, backend="triton")
        return x + out @ mixing

    def plain(*t):
        return t[0] + definition.norm_linear(*t, 1e-6) @ mixing.double()

    check(fused, plain, tensors, dtype)
    x = tensors[0].to(DEVICE, dtype).requires_grad_()
    _, same = norm_linear_past(x, *[t.to(DEVICE, dtype) for t in tensors[1:]], 1e-6, backend="triton")
    (alone,) = torch.autograd.grad(same, x, torch.ones_like(same))
    assert torch.equal(alone, torch.ones_like(x))


# few rows: channels are parted and the norm is a launch of its own; many, as on a GPU that is easily filled: one launch
@pytest.mark.parametrize(("rows", "parts"), [((3, 19), 264), ((3, 19), 1), ((2, 75), 1)])
@pytest.mark.parametrize("channels", [130, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_residual_norm(dtype, channels, rows, parts, monkeypatch):
    monkeypatch.setattr(library, "PARTS", parts)
    torch.manual_seed(0)
    latent = 84
    shapes = [(*rows, channels), (*rows, latent), (latent,), (channels, latent), *[(channels,)] * 5]
    t = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    t[0] += 5  # far from zero: the mean must not eat the digits
    ours = linear_residual_norm(*t[:6], 1e-6, (t[6], t[7], 1e-5), t[8], backend="triton")
    exact = linear_residual_norm(
        *[x.double() for x in t[:6]], 1e-6, (t[6].double(), t[7].double(), 1e-5), t[8].double()
    )
    for a, b in zip(ours, exact):
        assert a.dtype == dtype
        assert relative(a, b) < DTYPES[dtype]
    alone = linear_residual(*t[:6], 1e-6, backend="triton")
    assert relative(alone, exact[0] - t[8].double()) < DTYPES[dtype]


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
        return local_norm(x, kernel, bias, gain, 1e-6, mask, backend="triton")

    check(fused, lambda *t: definition.local_norm(*t, 1e-6, mask), tensors, dtype)


def test_an_unknown_backend_is_refused():
    x = torch.randn(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="backend is 'cutlass'"):
        norm_linear(x, x[0], x[0], x, x[:, 0], 1e-6, backend="cutlass")


def test_a_backend_that_cannot_run_says_why():
    x = torch.randn(2, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match="cannot run here: 600 channels; it takes at most 512"):
        norm_linear(
            x, x[0], x[0], torch.randn(600, 8, device=DEVICE), torch.zeros(600, device=DEVICE), 1e-6, backend="triton"
        )
    with pytest.raises(RuntimeError, match="float64 has no kernel"):
        norm_linear(x.double(), x[0], x[0], x, x[:, 0], 1e-6, backend="triton")
