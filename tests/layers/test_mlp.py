"""The MLP that keeps one hidden tensor: the gradients, dtypes and hooks of the plain layers."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from cgspn.layers import Mlp


def plain(mlp, x):
    return mlp.fc2(mlp.act(mlp.fc1(x)))


def gradients(run, mlp, x, dy):
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    wanted = [t for t in (leaf, *mlp.parameters()) if t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp(12, 20, "gelu_tanh", out=7)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_layers(act, dtype):
    torch.manual_seed(0)
    mlp = Mlp(12, 20, act, out=7).to(dtype)
    x, dy = torch.randn(2, 3, 12, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    got, true = (gradients(run, mlp, x, dy) for run in (mlp, lambda t: plain(mlp, t)))
    for a, b in zip(got, true, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("frozen", [["fc1"], ["fc2"], ["fc1", "fc2"]])
def test_frozen_layers_get_no_gradients(mlp, frozen):
    for name in frozen:
        getattr(mlp, name).requires_grad_(False)
    x, dy = torch.randn(5, 12), torch.randn(5, 7)
    for a, b in zip(gradients(mlp, mlp, x, dy), gradients(lambda t: plain(mlp, t), mlp, x, dy), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    if frozen == ["fc1"]:  # no gradient to x either
        mlp(x).sum().backward()
        assert mlp.fc2.weight.grad is not None


def test_double_backward_is_that_of_the_layers(mlp):
    mlp.double()
    assert torch.autograd.gradgradcheck(mlp, torch.randn(2, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtypes_it_gives_to_the_layers(mlp, kind):
    x, dy = torch.randn(5, 12, dtype=kind), torch.randn(5, 7)

    def under(run):
        def autocast(t):
            with torch.autocast("cpu", torch.bfloat16):
                return run(t)

        return autocast

    got, true = (gradients(under(run), mlp, x, dy) for run in (mlp, lambda t: plain(mlp, t)))
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, true, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), atol=3e-2, rtol=3e-2)


def test_it_works_in_checkpoints_and_in_compiled_programs(mlp):
    x, dy = torch.randn(5, 12), torch.randn(5, 7)
    true = gradients(lambda t: plain(mlp, t), mlp, x, dy)
    kept = gradients(lambda t: checkpoint(mlp, t, use_reentrant=False), mlp, x, dy)
    compiled = gradients(torch.compile(mlp, backend="eager", fullgraph=True), mlp, x, dy)
    for a, b, c in zip(kept, compiled, true, strict=True):
        assert torch.allclose(a, c, atol=1e-6)
        assert torch.allclose(b, c, atol=1e-6)


def test_one_hidden_tensor_is_kept(mlp):
    shapes = []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        mlp(torch.randn(50, 12))
    assert shapes.count((50, 20)) == 1


def test_hooks_and_replaced_layers_are_honoured(mlp):
    seen = []
    handle = mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    mlp(torch.randn(5, 12))
    handle.remove()
    assert seen == ["fc1"]
    mlp.act = nn.ReLU()
    x = torch.randn(5, 12)
    assert torch.equal(mlp(x), plain(mlp, x))


def added(mlp, x, tokens):
    out = tokens.clone(memory_format=torch.contiguous_format)
    mlp.adder(x)(out.view(-1, out.shape[-1]))
    return out


@torch.no_grad()
def test_writing_onto_tokens_takes_any_strides_and_autocast(mlp):
    torch.manual_seed(0)
    mlp = Mlp(12, 20, "gelu_tanh")
    nn.init.normal_(mlp.fc2.bias)
    x, tokens = torch.randn(4, 3, 12), torch.randn(3, 4, 12).transpose(0, 1)
    wanted = tokens + mlp(x) - mlp.fc2.bias
    assert torch.allclose(added(mlp, x, tokens), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(added(mlp, x.bfloat16(), tokens.bfloat16()).float(), wanted, atol=0.1)
