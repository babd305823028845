"""The projected operator: equal to projection and scan, gradients included, and what it keeps for the backward."""

from __future__ import annotations

import pytest
import torch
from operator_cases import Backend, draw, every_backend
from torch import Tensor

from cgspn.ops import propagate_2d_projected, propagate_2d_reference


def separately(x: Tensor, weight: Tensor, bias: Tensor, **options) -> Tensor:
    d, c = len(options["directions"]), x.shape[-1]
    packed = (x @ weight.T + bias).unflatten(-1, (d, 5, c))
    return propagate_2d_reference(x, packed[..., 2:, :], packed[..., 0, :], packed[..., 1, :], **options)


@every_backend
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_equals_projection_and_scan(backend: Backend, merge: str, recompute: bool) -> None:
    directions = ("left", "down", "up")
    tensors = [draw(2, 5, 6, 8), draw(3 * 5 * 8, 8, seed=1) / 3, draw(3 * 5 * 8, seed=2)]
    mask = (draw(2, 5, 6, seed=3) > -1).to(backend.device)
    found = []
    for run, dtype in ((propagate_2d_projected, torch.float32), (separately, torch.float64)):
        leaves = [t.to(backend.device, dtype).requires_grad_() for t in tensors]
        options = {"directions": directions, "merge": merge, "mask": mask}
        if run is propagate_2d_projected:
            options |= {"backend": backend.name, "recompute": recompute}
        y = run(*leaves, **options)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_saves_a_tenth() -> None:
    leaves = [t.float().requires_grad_() for t in (draw(1, 8, 8, 16), draw(4 * 5 * 16, 16, seed=1) / 4)]
    saved = {}
    for recompute in (True, False):
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not any(t.data_ptr() == leaf.data_ptr() for leaf in leaves[1:]):  # weights are there anyway
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = propagate_2d_projected(*leaves, None, recompute=recompute, backend="torch")
        saved[recompute] = sum(kept.values())
        y.sum().backward()
    assert saved[True] <= saved[False] / 10


@pytest.mark.parametrize(("weight", "bias"), [((79, 4), 80), ((80, 5), 80), ((80, 4), 79)])
def test_wrong_shapes_are_named(weight: tuple[int, int], bias: int) -> None:
    with pytest.raises(ValueError, match=r"(weight|bias) has shape"):
        propagate_2d_projected(torch.zeros(1, 2, 2, 4), torch.zeros(weight), torch.zeros(bias))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "mean"}, "merge is 'mean'"),
        ({"backend": "none"}, "backend is 'none'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propagate_2d_projected(torch.zeros(1, 2, 2, 8), torch.zeros(160, 8), None, **options)


@pytest.mark.parametrize("recompute", [True, False])
def test_padding_may_hold_anything_and_the_bias_may_be_missing(recompute: bool) -> None:
    x, weight = draw(2, 5, 6, 8), draw(160, 8, seed=1) / 3
    mask = draw(2, 5, 6, seed=3) > -0.5
    found = []
    for hold in (0.0, 7.0):
        leaves = [x.where(mask[..., None], hold).requires_grad_(), weight.clone().requires_grad_()]
        y = propagate_2d_projected(*leaves, None, mask=mask, recompute=recompute)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recompute", [True, False])
def test_autocast_lowers_all_alike(recompute: bool) -> None:
    tensors = draw(1, 5, 6, 8), draw(160, 8, seed=1) / 3, draw(160, seed=2)
    leaves = [t.float().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = propagate_2d_projected(*leaves, recompute=recompute)
    lowered = [t.detach().bfloat16().requires_grad_() for t in leaves]
    want = propagate_2d_projected(*lowered, recompute=recompute)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), lowered), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_compiles_and_is_what_it_says_to_pytorch() -> None:
    tensors = [t.requires_grad_() for t in (draw(2, 5, 6, 8), draw(160, 8, seed=1) / 3, draw(160, seed=2))]
    run = torch.compile(propagate_2d_projected, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (run, propagate_2d_projected))):
        torch.testing.assert_close(a, b)
    arguments = (*tensors, None, [0, 1, 2, 3], True, "auto", "torch")
    torch.library.opcheck(torch.ops.cgspn.propagate_2d_projected.default, arguments)


def test_second_derivatives() -> None:
    tensors = [draw(1, 3, 4, 2).double(), draw(20, 2, seed=1).double() / 3, draw(20, seed=2).double()]
    run = lambda *t: propagate_2d_projected(*t, directions=("down", "left"))  # noqa: E731
    assert torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in tensors])


def test_an_exported_program_holds_the_projection_and_the_scan() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return propagate_2d_projected(x, weight, None)

    program = torch.export.export(Scan(), (draw(1, 3, 4, 2), draw(40, 2, seed=1).requires_grad_()))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in called
    assert not any("projected" in name for name in called)


def test_under_checkpointing_what_is_saved_is_unpacked_once() -> None:
    x, weight, bias = torch.randn(1, 3, 4, 8), torch.randn(160, 8) / 8, torch.randn(160)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    plain = torch.autograd.grad(propagate_2d_projected(*leaves).square().sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(propagate_2d_projected, *leaves, use_reentrant=False)
    for mine, want in zip(torch.autograd.grad(y.square().sum(), leaves), plain, strict=True):
        assert torch.equal(mine, want)
