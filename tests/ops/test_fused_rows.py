"""LayerNorm with the sum before it, and the gradients of RMSNorm and GELU with their sums, against float64.

The kernels run on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

import os

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, rms_norm

from cgspn.ops.fused import rows

triton = pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3}  # a rounding or two of 24, 11 and 8 bits
if GPU:  # the interpreter multiplies the bits of bfloat16 as integers
    DTYPES[torch.bfloat16] = 1e-2
SHAPES = [(3, 37, 96), (1, 40), (5, 7, 130), (2, 1152), (3, 1024), (70, 16), (4, 1)]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm(shape, added, dtype):
    torch.manual_seed(0)
    c = shape[-1]
    x, branch = (torch.randn(shape) + 2).to(DEVICE, dtype), torch.randn(shape).to(DEVICE, dtype)
    branch = branch if added else None
    gain, shift = (1 + torch.randn(c) / 4).to(DEVICE), torch.randn(c).to(DEVICE)
    mine = [None if t is None else t.clone().requires_grad_() for t in (x, branch, gain, shift)]
    normal, total = rows.AddNorm.apply(*mine, 1e-6)
    # what is normalised is the sum as it is stored
    stored = (x + branch if added else x).double().requires_grad_()
    exact_gain, exact_shift = (t.double().requires_grad_() for t in (gain, shift))
    wanted = layer_norm(stored, (c,), exact_gain, exact_shift, 1e-6)
    assert relative(total, stored) == 0
    if c > 1:
        assert relative(normal, wanted) < DTYPES[dtype]
    dn, dt = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    true = torch.autograd.grad(wanted, (stored, exact_gain, exact_shift), dn.double(), retain_graph=True)
    got = torch.autograd.grad((normal, total), [t for t in mine if t is not None], (dn, dt), retain_graph=True)
    assert [t.dtype for t in got] == [t.dtype for t in mine if t is not None]
    for gradient in got[: 1 + added]:
        # of one channel the gradient is 0, and what rounding leaves of its deviation is divided by the root of eps
        assert relative(gradient, true[0] + dt.double()) < DTYPES[dtype] * (1 if c > 1 else 10)
    if c > 1:
        assert relative(got[-2], true[1]) < DTYPES[dtype]
    assert relative(got[-1], true[2]) < DTYPES[dtype]
    # one of the two outputs may go unused
    (alone,) = torch.autograd.grad(normal, mine[0], dn, retain_graph=True)
    if c > 1:
        assert relative(alone, true[0]) < DTYPES[dtype]
    (passed,) = torch.autograd.grad(total, mine[0], dt, retain_graph=True)
    assert torch.equal(passed, dt)


def test_what_is_added_after_the_sum_is_not_normalised():
    torch.manual_seed(0)
    x, branch, after = torch.randn(9, 72), torch.randn(9, 72), torch.randn(72)
    gain, shift = torch.randn(72), torch.randn(72)
    normal, total, _ = rows.forward(*(t.to(DEVICE) for t in (x, branch, gain, shift)), 1e-6, after.to(DEVICE))
    assert relative(total.cpu(), x + branch + after) < 1e-6
    assert relative(normal.cpu(), layer_norm(x + branch, (72,), gain, shift)) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    c = shape[-1]
    x, gain = (torch.randn(shape) + 2).to(DEVICE, dtype), (1 + torch.randn(c) / 4).to(DEVICE)
    mine = [t.clone().requires_grad_() for t in (x, gain)]
    exact = [t.double().requires_grad_() for t in (x, gain.to(dtype))]
    normal, wanted = rows.RmsNorm.apply(*mine, 1e-6), rms_norm(exact[0], (c,), exact[1], 1e-6)
    assert normal.dtype == dtype
    assert relative(normal, wanted) < DTYPES[dtype]
    dn = torch.randn(shape).to(DEVICE, dtype)
    got, true = torch.autograd.grad(normal, mine, dn), torch.autograd.grad(wanted, exact, dn.double())
    assert [t.dtype for t in got] == [dtype, torch.float32]
    # of one channel the gradient is 0 but for eps
    assert relative(got[0], true[0]) < DTYPES[dtype] or c == 1
    assert relative(got[1], true[1]) < DTYPES[dtype]


def test_gradients_of_gradients_go_through_the_plain_norm():
    torch.manual_seed(0)
    x, gain, shift = (t.to(DEVICE).requires_grad_() for t in (torch.randn(5, 24), torch.randn(24), torch.randn(24)))

    def second(function):
        (d,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(d.square().sum(), (x, gain))

    mine = second(lambda x: rows.AddNorm.apply(x, None, gain, shift, 1e-6)[0])
    plain = second(lambda x: layer_norm(x, (24,), gain, shift, 1e-6))
    assert all(relative(a, b) < 1e-4 for a, b in zip(mine, plain))
    mine = second(lambda x: rows.RmsNorm.apply(x, gain, 1e-6))
    plain = second(lambda x: rms_norm(x, (24,), gain, 1e-6))
    assert all(relative(a, b) < 1e-4 for a, b in zip(mine, plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["none", "tanh", None])
@pytest.mark.parametrize("shape", [(37, 96), (1, 5), (130, 200), (600, 16), (70, 1152)])
def test_column_sums_and_the_gradient_of_a_gelu(shape, mode, dtype):
    torch.manual_seed(0)
    hidden, d = (3 * torch.randn(shape)).to(DEVICE, dtype), torch.randn(shape).to(DEVICE, dtype)
    mine = d.clone()
    if mode is None:
        assert relative(rows.column_sums(mine), d.double().sum(0)) < 2e-6
        return
    sums = rows.column_sums(mine, hidden, mode)
    exact = hidden.double().requires_grad_()
    (wanted,) = torch.autograd.grad(gelu(exact, approximate=mode), exact, d.double())
    assert relative(mine, wanted) < DTYPES[dtype]
    assert relative(sums, mine.double().sum(0)) < 2e-6


def test_extreme_values_stay_finite():
    hidden = torch.tensor([[-1e4, -60.0, -9.0, 0.0, 9.0, 60.0, 1e4, 3e38]] * 3, device=DEVICE)
    for mode in ("none", "tanh"):
        d = torch.ones_like(hidden)
        rows.column_sums(d, hidden, mode)
        assert torch.equal(d[0].cpu().round(), torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))
