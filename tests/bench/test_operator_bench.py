"""What `cgspn bench operator` counts; it times on a GPU alone."""

import torch

from cgspn.bench.operator import flop_of


def test_flop_grow_with_directions() -> None:
    x, u = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 4, 8)
    logits = torch.randn(2, 3, 4, 4, 3, 8)
    four = flop_of([x, logits, u, u], [0, 1, 2, 3], "torch")
    assert four > 0
    assert four == 4 * flop_of([x, logits[:, :, :, :1], u[:, :, :, :1], u[:, :, :, :1]], [2], "torch")
