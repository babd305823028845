"""Likeness of features against direct computations."""

import math

import pytest
import torch

from cgspn.evaluate import cosine, relative_mse


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


def test_what_cannot_be_compared_is_refused():
    s, t = randn(3, 4, 5), randn(3, 4, 5, seed=1)
    for measure in (cosine, relative_mse):
        assert measure(t, t) == pytest.approx(1.0 if measure is cosine else 0.0)
        with pytest.raises(ValueError, match="student has C = 4; expected that of teacher, 5"):
            measure(s[..., :4], t)
        with pytest.raises(ValueError, match=r"student has shape \(2, 4, 5\), teacher \(3, 4, 5\)"):
            measure(s[:2], t)
        with pytest.raises(ValueError, match="student holds values that are not finite"):
            measure(s / 0, t)
    with pytest.raises(ValueError, match="teacher is zero everywhere"):
        relative_mse(t, 0 * t)
