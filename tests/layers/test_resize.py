"""Resizing by two matrices equals PyTorch's resize, where that is right, and the definition where it is not."""

import pytest
import torch
from torch.nn.functional import interpolate

from cgspn.layers import LearnedPositions
from cgspn.layers.resize import resize_matrix, resize_table


@pytest.mark.parametrize("resize", ["bicubic", "bicubic_antialias", "bilinear_antialias"])
@pytest.mark.parametrize("source", [(4, 7), (1, 1), (16, 16), (27, 2)])
@pytest.mark.parametrize("target", [(1, 1), (4, 7), (9, 3), (2, 40), (27, 54), (3, 5), (8, 1)])
def test_two_matrices_equal_interpolate(resize, source, target):
    torch.manual_seed(0)
    table = torch.randn(*source, 8)
    mode, _, antialias = resize.partition("_")
    wide = (target[0], max(2, target[1]))  # one column: computed as rows of one line, turned
    image = table.permute(2, 0, 1)[None]
    if target[1] == 1:
        image, wide = image.mT, (1, target[0])
    expected = interpolate(image.contiguous(), wide, mode=mode, align_corners=False, antialias=bool(antialias))[0]
    expected = (expected.mT if target[1] == 1 else expected).permute(1, 2, 0)
    rows, columns = (resize_matrix(torch.arange(1, n + 1), size, resize) for n, size in zip(target, source))
    got = resize_table(table, rows, columns)
    assert (got - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("resize", ["bicubic", "bicubic_antialias", "bilinear_antialias"])
def test_the_native_grid_is_the_table_itself(resize):
    positions = LearnedPositions((5, 3), 8, resize)
    assert torch.equal(positions.resized(5, 3), positions.table)
    assert positions(5, 3) is positions.table
