"""A block's defaults: when the fused pieces and the products that write onto the residual stand for plain layers."""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cgspn.layers import AttentionConfig, AttentionMixer, Block, Grid, PropagationConfig, PropagationMixer
from cgspn.ops.fused import pieces

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GRID = Grid(5, 6)


def block_of(kind="propagation", act="gelu_tanh", scale=None):
    torch.manual_seed(0)
    mixer = (
        AttentionMixer(48, AttentionConfig(4)) if kind == "attention" else PropagationMixer(48, PropagationConfig(3))
    )
    block = Block(48, mixer, 96, act, 1e-6, scale)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.fixture
def suiting(monkeypatch):
    """As on a GPU that suits the kernels, which are then their definitions; notes which blocks ask for them."""
    asked = []
    monkeypatch.setattr("cgspn.ops.fused.suits", lambda x, latent: asked.append(latent) or True)
    monkeypatch.setattr(pieces, "_fused", lambda *_: False)
    return asked


@pytest.mark.parametrize("scale", [None, 0.5])
def test_by_default_the_pieces_run_where_they_suit(suiting, scale):
    block, tokens = block_of(scale=scale), torch.randn(2, 30, 48)
    fused = block(tokens, GRID)
    assert suiting == [64]
    block.mixer.pieces = "torch"
    assert torch.allclose(block(tokens, GRID), fused, atol=1e-5)
    assert suiting == [64]


def test_layers_with_hooks_or_in_other_dtypes_stay_plain(suiting):
    tokens = torch.randn(2, 30, 48)
    with torch.autocast("cpu", torch.bfloat16):  # float32 tokens would be kept in float32
        block_of()(tokens, GRID)
    for name in ("mixer", "mixer.down", "mixer.up", "norm1"):
        block, seen = block_of(), []
        block.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        block(tokens, GRID)
        assert seen == [1], name
    assert suiting == []
    block = block_of()
    block.scale1 = nn.Dropout(1.0)  # what is no LayerScale is not left out
    mixed = block.mixer.residual(tokens, block.norm1, block.scale1, GRID)
    assert torch.equal(mixed, tokens)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "propagation"])
def test_products_write_onto_the_residual_where_they_give_the_same(kind):
    tokens = torch.randn(2, 30, 48)
    block = block_of(kind)
    assert not block.in_place(tokens)  # on a processor nothing is gained
    block.epilogues = True
    assert block.in_place(tokens)
    with torch.enable_grad():
        assert not block.in_place(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert not block.in_place(tokens)
        assert block(tokens.bfloat16(), GRID).dtype == torch.bfloat16
        wide = block(tokens.bfloat16(), GRID).float()
    plain = block_of(kind)
    assert torch.allclose(wide, plain(tokens, GRID), atol=0.5, rtol=0.1)
    for other in (block_of(kind, act="gelu"), block_of(kind, scale=0.5)):
        other.epilogues = True
        assert not other.in_place(tokens)


@pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_of_kernels_has_the_gradients_of_a_plain_one(scale, recompute):
    pytest.importorskip("triton")
    block = block_of(scale=scale).to(DEVICE)
    tokens, dy = (torch.randn(2, 30, 48, device=DEVICE) for _ in range(2))
    found = []
    for way in ("torch", "triton"):
        block.mixer.pieces = way
        leaf = tokens.clone().requires_grad_()
        y = checkpoint(block, leaf, GRID, use_reentrant=False) if recompute else block(leaf, GRID)
        found.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], dy)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4
    with torch.no_grad():
        block.epilogues = True
        assert torch.allclose(block(tokens, GRID), found[0][0], atol=1e-3)


@pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["attention", "propagation"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_norms_and_sums_of_a_block_in_one_pass_change_nothing(kind, scale, monkeypatch):
    pytest.importorskip("triton")
    block = block_of(kind, scale=scale).to(DEVICE)
    if kind == "propagation":
        block.mixer.pieces = "torch"
    tokens, *upstream = (torch.randn(2, 30, 48, device=DEVICE) for _ in range(3))
    found, inferred, passes = [], [], []
    for served in (False, True):
        monkeypatch.setattr("cgspn.ops.fused.rows.serves", lambda *t, served=served: passes.append(served) or served)
        leaf = tokens.clone().requires_grad_()
        outputs = [*block.tapped(leaf, GRID), block(leaf, GRID)]
        wanted = [leaf, *block.parameters()]
        gradients = torch.autograd.grad(outputs[:2], wanted, upstream) + torch.autograd.grad(
            outputs[2], wanted, upstream[0]
        )
        found.append([*outputs, *gradients])
        with torch.no_grad():
            for epilogues in (False, True):
                block.epilogues = epilogues
                inferred.append([*block.tapped(tokens, GRID), block(tokens, GRID)])
    assert True in passes
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4
    for outputs in inferred:
        for a, b in zip(found[0], outputs, strict=False):
            assert float((a - b).norm() / a.norm()) < 1e-4
