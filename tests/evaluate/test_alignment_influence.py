"""Likeness of features and maps of influence against direct computations."""

import math

import pytest
import torch

from cgspn.evaluate import align, cosine, influence_map, linear_cka, relative_mse
from cgspn.ops import propagate_2d


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


def test_cka_against_token_by_token_kernels():
    # The other form of the definition: HSIC of the two N x N kernels, centred.
    s, t = randn(30, 6), randn(30, 4, seed=1) + randn(30, 6)[:, :4]
    center = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = center @ s @ s.T @ center, center @ t @ t.T @ center
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert linear_cka(s, t) == pytest.approx(expected)
    assert linear_cka(s.view(5, 6, 6), t.view(5, 6, 4)) == pytest.approx(expected)


def test_cka_ignores_rotation_scale_and_shift_and_nothing_else():
    s = randn(4000, 6)
    rotation = torch.linalg.qr(randn(6, 6, seed=2))[0]
    assert linear_cka(s, 5 * s @ rotation + 2) == pytest.approx(1.0)
    assert linear_cka(s, randn(4000, 6, seed=3)) < 0.02
    assert linear_cka(s, torch.ones_like(s)) == 0.0


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


def attention(x):
    b, h, w, c = x.shape
    q = x.view(b, h * w, c)
    return (torch.softmax(q @ q.mT, -1) @ q).view(b, h, w, c)


def scan(x, directions):
    b, h, w, c = x.shape
    logits = randn(b, h, w, len(directions), 3, c, seed=5)
    gain = randn(b, h, w, len(directions), c, seed=6).sigmoid() + 0.5
    return propagate_2d(x, logits, gain, gain, directions=directions)


def perturbed(function, x, position, step=1e-5):
    """Norm of the Jacobian block by moving each input number up and down."""
    out = torch.zeros(x.shape[1:3], dtype=x.dtype)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for c in range(x.shape[3]):
                d = torch.zeros_like(x)
                d[0, i, j, c] = step
                slope = (function(x + d) - function(x - d))[0, *position] / (2 * step)
                out[i, j] += slope.square().sum()
    return out.sqrt()


@pytest.mark.parametrize(
    "function",
    [
        attention,
        lambda x: scan(x, ("down", "up", "right", "left")),
        lambda x: scan(x.tanh(), ("down",)).square(),
        lambda x: torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).exp(),
    ],
    ids=["attention", "scan", "gated-down", "pooling"],
)
def test_influence_against_perturbation(function):
    x = randn(1, 4, 6, 3)
    got = influence_map(function, x, (1, 2))
    torch.testing.assert_close(got, perturbed(function, x, (1, 2)), atol=1e-7, rtol=1e-5)


def test_influence_shows_the_cone_of_a_downward_scan():
    # Output (3, 4) sees row 3 at column 4 only, row 2 at columns 3..5, row 1 at 2..6, and nothing below.
    x = randn(1, 6, 9, 2)
    got = influence_map(lambda x: scan(x, ("down",)), x, (3, 4)) > 0
    expected = torch.tensor([[i <= 3 and abs(j - 4) <= 3 - i for j in range(9)] for i in range(6)])
    assert torch.equal(got, expected)


def test_random_probes_come_near_the_exact_map():
    x, mix = randn(1, 3, 5, 8), randn(8, 24, seed=3)
    exact = influence_map(lambda x: attention(x) @ mix, x, (0, 0))
    near = influence_map(lambda x: attention(x) @ mix, x, (0, 0), probes=100)
    assert ((near - exact).abs() / exact).max() < 0.45
    assert torch.equal(near, influence_map(lambda x: attention(x) @ mix, x, (0, 0), probes=100))


def test_influence_leaves_no_gradients_and_works_under_no_grad():
    layer = torch.nn.Linear(3, 3).double()
    x = randn(1, 2, 2, 3)
    with torch.no_grad():
        got = influence_map(layer, x, (-1, -1))
    assert layer.weight.grad is None
    assert x.grad is None
    assert got[1, 1] == pytest.approx(float(layer.weight.detach().norm()))
    assert got.sum() == got[1, 1]


def test_influence_names_wrong_arguments():
    x = randn(1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"position is \(2, 0\); expected a position of the output grid 2 x 2"):
        influence_map(attention, x, (2, 0))
    with pytest.raises(ValueError, match="carries no gradient"):
        influence_map(lambda x: x.detach(), x, (0, 0))
    with pytest.raises(ValueError, match="grid_input has shape"):
        influence_map(attention, x[0], (0, 0))
    with pytest.raises(ValueError, match="probes is 0"):
        influence_map(attention, x, (0, 0), probes=0)
