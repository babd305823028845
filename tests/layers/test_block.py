"""How a block runs: what is fused when, that it gives what the layers give, and that nobody's hooks are skipped."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cgspn.layers import AttentionConfig, AttentionMixer, Block, Grid, PropagationConfig, PropagationMixer, executor
from cgspn.layers.executor import NOTHING, Fusion, fusion_of
from cgspn.ops.fused import linear_residual, local_norm, norm_linear, rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GRID = Grid(5, 6)
needs_kernels = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


def block_of(kind="propagation", act="gelu_tanh", scale=None, config=None):
    torch.manual_seed(0)
    config = config or PropagationConfig(3)
    mixer = AttentionMixer(48, AttentionConfig(4)) if kind == "attention" else PropagationMixer(48, config)
    block = Block(48, mixer, 96, act, 1e-6, scale)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    block.fusion_backend = "triton"
    return block


def add_norm(x, branch, gain, shift, eps, after=None):
    total = x if branch is None else x + branch
    return layer_norm(total, gain.shape, gain, shift, eps), total if after is None else total + after


@pytest.fixture
def defined(monkeypatch):
    """Every kernel is its definition: what is tested is the way through the block. Notes what was called."""
    called = []

    def note(name, function):
        return lambda *t: called.append(name) or function(*t)

    monkeypatch.setattr(executor, "unsupported_reason", lambda *_: None)
    for module, name in ((norm_linear, "NormLinear"), (linear_residual, "LinearResidual"), (local_norm, "LocalNorm")):
        plain, linear = module.plain, module is norm_linear
        trained = (lambda *t, f=plain: (f(*t), t[0])) if linear else plain
        inferred = (lambda *t, f=plain: (f(*t), None)) if linear else plain
        if module is local_norm:
            inferred = lambda x, kernel, bias, gain, eps, mask: local_norm.plain(x, kernel, bias, gain, eps, mask)  # noqa: E731
        monkeypatch.setattr(module, name, SimpleNamespace(apply=note(name, trained)))
        monkeypatch.setattr(module, "forward", note(name, inferred))

    def forward_norm(*t):
        mixed = linear_residual.plain(*t[:7])
        normal, total = add_norm(mixed, None, *t[7], t[8])
        return normal, total

    monkeypatch.setattr(linear_residual, "forward_norm", note("LinearResidual", forward_norm))
    monkeypatch.setattr(rows, "AddNorm", SimpleNamespace(apply=note("AddNorm", add_norm)))
    monkeypatch.setattr(rows, "forward", note("AddNorm", lambda *t: (*add_norm(*t), None)))
    return called


CONFIGS = [
    PropagationConfig(3),
    PropagationConfig(3, merge="sum", merge_norm=False),
    PropagationConfig(3, local_kernel=0),
    PropagationConfig(6, value_expansion=3, channels_per_group=2, forget_gate=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(4))
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("trained", [False, True])
def test_a_fused_block_gives_what_its_layers_give(defined, config, scale, trained):
    block = block_of(scale=scale, config=config)
    tokens, grid = torch.randn(2, 30, 48), Grid(5, 6, mask=torch.rand(2, 5, 6) > 0.2)
    before, found = tokens.clone(), []
    with torch.set_grad_enabled(trained):
        for block.fusion_backend in ("torch", "triton"):
            found.append([block(tokens, grid), *block.tapped(tokens, grid), block.mixing_half(tokens, grid)])
            found[-1].append(block.sublayer(tokens, grid))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-4)
    assert {"NormLinear", "LinearResidual"} <= set(defined)
    assert ("LocalNorm" in defined) == (config.local_kernel > 0)
    assert torch.equal(tokens, before)  # what goes in is not what is written to


@pytest.mark.parametrize("trained", [False, True])
def test_norms_and_mlp_of_an_attention_block_are_fused(defined, trained):
    block, tokens, found = block_of("attention"), torch.randn(2, 30, 48), []
    with torch.set_grad_enabled(trained):
        for block.fusion_backend in ("torch", "triton"):
            found.append([block(tokens, GRID), *block.tapped(tokens, GRID)])
        assert fusion_of(block, tokens) == Fusion(norm1=True, norm2=True, mlp=not trained)
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-4)
    assert defined == ["AddNorm"] * 4


def test_the_state_that_forbids_fusion(defined):
    block, tokens = block_of(), torch.randn(2, 30, 48)
    assert fusion_of(block, tokens) == Fusion(True, True, True, False)
    with torch.no_grad():
        assert fusion_of(block, tokens) == Fusion(True, True, True, True)
        assert not fusion_of(block_of(act="gelu"), tokens).mlp
        assert not fusion_of(block_of(scale=0.5), tokens).mlp
    with torch.autocast("cpu", torch.bfloat16):  # float32 tokens would be kept in float32
        assert fusion_of(block, tokens) == NOTHING
        assert fusion_of(block, tokens.bfloat16()).mixer
    with FlopCounterMode(display=False):
        assert fusion_of(block, tokens) == NOTHING
    assert torch.func.vmap(lambda t: torch.tensor(fusion_of(block, t) == NOTHING))(tokens[None]).all()
    assert fusion_of(block, tokens[:0]) == NOTHING
    assert fusion_of(block, tokens.double()) == NOTHING
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert fusion_of(block, tokens) == NOTHING
    block.fusion_backend = "auto"  # on a processor nothing is gained
    assert fusion_of(block, tokens) == NOTHING


def test_a_backend_that_cannot_run_says_so():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("it can")
    with pytest.raises(RuntimeError, match="fusion_backend is 'triton', which cannot run here"):
        block_of()(torch.randn(1, 30, 48), GRID)


PARTS = [
    "norm1",
    "mixer.down",
    "mixer.local",
    "mixer.norm",
    "mixer.param_proj",
    "mixer.merge_norm",
    "mixer.up",
    "norm2",
]
PARTS += ["mixer", "scale1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "scale2"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("trained", [False, True])
def test_hooks_of_every_part_run(defined, name, trained):
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        block, seen = block_of(scale=0.5 if "scale" in name else None), []
        getattr(block.get_submodule(name), register)(lambda *_, seen=seen: seen.append(1))
        with torch.set_grad_enabled(trained):
            block(torch.randn(1, 30, 48), GRID)
        assert seen == [1], register


@pytest.mark.parametrize("name", PARTS)
def test_backward_hooks_of_every_part_run(defined, name):
    block, seen = block_of(scale=0.5 if "scale" in name else None), []
    block.get_submodule(name).register_full_backward_hook(lambda *_: seen.append(1))
    block(torch.randn(1, 30, 48, requires_grad=True), GRID).sum().backward()
    assert seen == [1]


@needs_kernels
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_of_kernels_has_the_gradients_of_a_plain_one(scale, recompute):
    pytest.importorskip("triton")
    block = block_of(scale=scale).to(DEVICE)
    tokens, dy = (torch.randn(2, 30, 48, device=DEVICE) for _ in range(2))
    found = []
    for block.fusion_backend in ("torch", "triton"):
        leaf = tokens.clone().requires_grad_()
        y = checkpoint(block, leaf, GRID, use_reentrant=False) if recompute else block(leaf, GRID)
        found.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], dy)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4
    with torch.no_grad():
        assert torch.allclose(block(tokens, GRID), found[0][0], atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("kind", ["attention", "propagation"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_taps_of_a_fused_block_have_the_gradients_of_a_plain_one(kind, scale):
    pytest.importorskip("triton")
    block = block_of(kind, scale=scale).to(DEVICE)
    tokens, *upstream = (torch.randn(2, 30, 48, device=DEVICE) for _ in range(3))
    found, inferred = [], []
    for block.fusion_backend in ("torch", "triton"):
        leaf = tokens.clone().requires_grad_()
        outputs = block.tapped(leaf, GRID)
        found.append([*outputs, *torch.autograd.grad(outputs, [leaf, *block.parameters()], upstream)])
        with torch.no_grad():
            inferred.append(block.tapped(tokens, GRID))
    for outputs in (found[1], *inferred):
        for a, b in zip(found[0], outputs, strict=False):
            assert float((a - b).norm() / a.norm()) < 1e-4
