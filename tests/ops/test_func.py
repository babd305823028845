"""torch.func and forward-mode AD: derivatives that agree with the reference's, not silent zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import cgspn
from cgspn.ops import line_scan, propagate_2d, propagate_2d_projected
from cgspn.ops.reference import line_scan_reference, propagate_2d_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


LOGITS, LAM, U = drawn(2, 3, 4, 4, 3, 5), drawn(2, 3, 4, 4, 5), drawn(2, 3, 4, 4, 5) / 2
WEIGHT, BIAS = drawn(100, 5) / 4, drawn(100)
THIRDS = torch.full((2, 3, 4, 3, 5), 1 / 3, device=DEVICE)


def projected(x):
    packed = torch.nn.functional.linear(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype)).unflatten(-1, (4, 5, 5))
    return propagate_2d_reference(x, packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :])


CASES = {
    "propagate_2d": (lambda x: propagate_2d(x, LOGITS, LAM, U), lambda x: propagate_2d_reference(x, LOGITS, LAM, U)),
    "line_scan": (
        lambda x: line_scan(x, THIRDS, LAM[:, :, :, 0], "left", 2),
        lambda x: line_scan_reference(x, THIRDS, LAM[:, :, :, 0], "left", 2),
    ),
    "projected": (lambda x: propagate_2d_projected(x, WEIGHT, BIAS), projected),
}


@pytest.mark.parametrize("name", CASES)
def test_transforms_see_derivatives(name):
    mine, wanted = CASES[name]
    x, tangent = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5) + 1
    exact = jvp(wanted, (x.double(),), (tangent.double(),))[1]
    for found in (jvp(mine, (x,), (tangent,))[1], by_forward_ad(mine, x, tangent)):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    total = grad(lambda x: mine(x).square().sum())(x)
    leaf = x.double().requires_grad_()
    wanted(leaf).square().sum().backward()
    torch.testing.assert_close(total.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    many = vmap(mine)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1].double(), wanted(2 * x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_product_with_the_hessian_is_no_silent_zero(name):
    """autograd.functional.hvp differentiates second derivatives once more, to what they were multiplied with."""
    mine, wanted = CASES[name]
    x, tangent = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5) + 1
    exact = torch.autograd.functional.hvp(lambda x: wanted(x).square().sum(), x.double(), tangent.double())[1]
    found = torch.autograd.functional.hvp(lambda x: mine(x).square().sum(), x, tangent)[1]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def by_forward_ad(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("name", CASES)
def test_compiled_transforms_see_derivatives(name):
    mine, x, tangent = CASES[name][0], drawn(2, 3, 4, 5), drawn(2, 3, 4, 5) + 1

    def along(x, tangent):
        return jvp(mine, (x,), (tangent,))[1]

    def slope(x):
        return grad(lambda x: mine(x).square().sum())(x)

    for function, arguments in ((along, (x, tangent)), (slope, (x,))):
        torch._dynamo.reset()
        whole = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(*arguments), function(*arguments))
    torch._dynamo.reset()
    inner = torch.compile(mine, backend="aot_eager", fullgraph=True)
    inner(x)  # what was compiled outside of a level is not for one
    torch.testing.assert_close(by_forward_ad(inner, x, tangent), by_forward_ad(mine, x, tangent))


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_program_without_transforms_keeps_its_op(name):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    torch.compile(CASES[name][0], backend=keep, fullgraph=True)(drawn(2, 3, 4, 5))
    assert len(graphs) == 1
    assert "ops.cgspn." in graphs[0]


@pytest.mark.parametrize("op", ["propagate_2d", "propagate_2d_saving", "line_scan", "propagate_2d_projected"])
def test_ops_of_a_program_refuse_forward_mode(op):
    x = drawn(2, 3, 4, 5)
    rest = {
        "line_scan": (THIRDS, LAM[:, :, :, 0], 0, None, "auto"),
        "propagate_2d_projected": (WEIGHT, BIAS, None, [0, 1, 2, 3], True, "auto", "auto"),
    }.get(op, (LOGITS, LAM, U, None, None, [0, 1, 2, 3], True, "auto"))
    with pytest.raises(RuntimeError, match=f"{op.removesuffix('_saving')} has no forward-mode derivative"):
        by_forward_ad(lambda x: getattr(torch.ops.cgspn, op)(x, *rest), x, x)


def test_a_backend_that_cannot_be_transformed_says_so():
    x = drawn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: under torch"):
        jvp(lambda x: propagate_2d(x, LOGITS, LAM, U, backend="triton"), (x,), (x,))


def test_an_encoder_can_be_transformed():
    model = cgspn.create_model("cgspn_mini_patch4_28").to(DEVICE).eval()
    images = drawn(2, model.config.channels, 28, 28)
    weights = dict(model.named_parameters())

    def loss(weights, images):
        with sdpa_kernel(SDPBackend.MATH):  # of the pooling; no other has forward-mode derivatives
            return functional_call(model, weights, (images,)).tokens.square().mean()

    loss(weights, images).backward()
    for name, found in grad(loss)({k: v.detach() for k, v in weights.items()}, images).items():
        torch.testing.assert_close(found, torch.zeros_like(found) if weights[name].grad is None else weights[name].grad)
    _, along = jvp(lambda images: loss(weights, images), (images,), (images,))
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (loss(weights, images * (1 + sign * step)) for sign in (1, -1))
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), rtol=1e-2, atol=1e-3)
