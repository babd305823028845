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
