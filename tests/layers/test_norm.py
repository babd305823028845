"""Norms under autocast: its dtype goes in and comes out, and the numbers are those of float32 rounded."""

import pytest
import torch

from cgspn.layers import LayerNorm, RMSNorm


@pytest.mark.parametrize("norm", [LayerNorm(24), RMSNorm(24, eps=1e-6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_stays_low(norm: torch.nn.Module, dtype: torch.dtype) -> None:
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x = (3 * torch.randn(5, 7, 24)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    want = norm(x.detach().float())
    assert (y.float() - want).norm() < 1e-2 * want.norm()
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_without_autocast_it_is_torchs() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(LayerNorm(8)(x), torch.nn.LayerNorm(8)(x))
