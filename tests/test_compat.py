"""Private names of PyTorch: each helper gives what the public way gives, and names what is missing."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import gelu, linear

from cgspn import compat


def test_missing_name_says_which_versions_have_it():
    with pytest.raises(ImportError, match=r"torch\._no\.such does not exist in torch .*2\.9 to"):
        compat.private("_no.such")


def test_private_finds_what_exists():
    assert compat.private("_C._functorch.CInterpreter") is torch._C._functorch.CInterpreter
    assert callable(compat.private("_inductor.aoti_load_package"))


def test_in_functorch_inside_transforms_alone():
    seen = []

    def f(x):
        seen.append(compat.in_functorch())
        return x.sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [False, True, True]
    assert not compat.in_functorch()


def test_in_forward_ad_inside_a_level_alone():
    assert not compat.in_forward_ad()
    with forward_ad.dual_level():
        assert compat.in_forward_ad()
    assert not compat.in_forward_ad()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_has_hooks(kind):
    layers = nn.Linear(2, 2), nn.GELU()
    assert not compat.has_hooks(*layers)
    handle = getattr(layers[1], f"register_{kind}_hook")(lambda *args: None)
    assert compat.has_hooks(*layers)
    handle.remove()
    assert not compat.has_hooks(*layers)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gelu_linear(device):
    x, weight, bias = (
        torch.randn(5, 8, device=device),
        torch.randn(16, 8, device=device),
        torch.randn(16, device=device),
    )
    expected = gelu(linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(compat.gelu_linear(x, weight, bias), expected, rtol=1e-3, atol=1e-3)


def test_cpp_compiler_is_a_path_or_none():
    found = compat.cpp_compiler()
    assert found is None or found.startswith("/") or found[1] == ":"
