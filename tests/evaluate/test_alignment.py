"""Likeness of features against direct computations."""

import math

import pytest
import torch

from cgspn.evaluate import align, cosine, relative_mse


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_cosine_and_relative_error_against_a_loop():
    s, t = randn(2, 5, 4), randn(2, 5, 4, seed=1)
    cosines, error, energy = [], 0.0, 0.0
    for a, b in zip(s.view(-1, 4).tolist(), t.view(-1, 4).tolist()):
        dot = sum(x * y for x, y in zip(a, b))
        cosines.append(dot / math.hypot(*a) / math.hypot(*b))
        error += sum((x - y) ** 2 for x, y in zip(a, b))
        energy += sum(y * y for y in b)
    assert cosine(s, t) == pytest.approx(sum(cosines) / 10)
    assert relative_mse(s, t) == pytest.approx(error / energy)
    assert relative_mse(torch.zeros_like(t), t) == 1.0
    assert cosine(-3 * t, t) == pytest.approx(-1.0)


def test_align_gives_each_block_its_own():
    t = [randn(3, 4, 5, seed=i) for i in range(3)]
    s = [t[0], t[1] + 0.1 * randn(3, 4, 5, seed=9), torch.zeros_like(t[2])]
    blocks = align(s, t)
    assert blocks[0].cosine == pytest.approx(1.0)
    assert blocks[0].relative_mse == 0.0
    assert 0 < blocks[1].relative_mse < 0.05
    assert blocks[2].relative_mse == 1.0
    with pytest.raises(ValueError, match=r"block 2: student has shape \(3, 4, 4\)|block 2: student has C = 4"):
        align([*s[:2], s[2][..., :4]], t)
    with pytest.raises(ValueError, match="students holds 2 blocks, teachers 3"):
        align(s[:2], t)
    with pytest.raises(ValueError, match="teacher is zero everywhere"):
        relative_mse(t[0], 0 * t[0])
