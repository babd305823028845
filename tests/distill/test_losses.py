"""Losses against the formulas written out."""

import math

import pytest
import torch

from cgspn.distill.adapters import Adapters
from cgspn.distill.losses import clip_loss, relative_mse, sigmoid_loss, tap_loss


def test_relative_error_is_one_for_zero_and_zero_for_equal():
    t = torch.randn(2, 5, 8)
    assert relative_mse(torch.zeros_like(t), t) == 1
    assert relative_mse(t, t) == 0
    assert relative_mse(1.5 * t, t).item() == pytest.approx(0.25)


def test_tap_loss_is_mse_plus_kl_of_the_student_against_the_teacher():
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 8) * 7, torch.randn(2, 5, 8) * 3
    scale = t.square().mean().sqrt()
    p, q = (s / scale).softmax(-1), (t / scale).softmax(-1)
    mse = ((s - t) / scale).square().mean()
    kl = (p * (p.log() - q.log())).sum(-1).mean()  # KL(student || teacher), the source's direction
    assert tap_loss(s, t, 0.0).item() == pytest.approx(mse.item(), rel=1e-5)
    assert tap_loss(s, t, 0.3).item() == pytest.approx((mse + 0.3 * kl).item(), rel=1e-5)
    assert tap_loss(1000 * s, 1000 * t, 0.3).item() == pytest.approx(tap_loss(s, t, 0.3).item(), rel=1e-4)


def test_contrastive_losses_against_loops():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    same = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    scale, bias = torch.tensor(math.log(7.0)), torch.tensor(-2.0)
    logits = 7 * image @ text.T
    rows = [-logits[i].log_softmax(0)[same[i]].mean() for i in range(4)]
    columns = [-logits[:, j].log_softmax(0)[same[:, j]].mean() for j in range(4)]
    expected = (sum(rows) / 4 + sum(columns) / 4) / 2
    assert clip_loss(image, text, same, scale).item() == pytest.approx(expected.item(), rel=1e-5)
    z = logits - 2
    pairs = [(z[i, j].item(), bool(same[i, j])) for i in range(4) for j in range(4)]
    positive = [math.log1p(math.exp(-v)) for v, yes in pairs if yes]
    negative = [math.log1p(math.exp(v)) for v, yes in pairs if not yes]
    expected = sum(positive) / len(positive) + sum(negative) / len(negative)
    assert sigmoid_loss(image, text, same, scale, bias).item() == pytest.approx(expected, rel=1e-5)
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert torch.isfinite(sigmoid_loss(image, text, everything, scale, bias))


def test_adapters_start_as_the_identity_and_the_output_has_none():
    adapters, x = Adapters(3, 8, sublayers=True, blocks=True), torch.randn(2, 5, 8)
    assert all(torch.equal(a(x), x) for a in [*adapters.sublayers, *adapters.blocks])
    assert [sum(p.numel() for p in a.parameters()) > 0 for a in adapters.blocks] == [True, True, False]
    assert not list(Adapters(3, 8, sublayers=False, blocks=False).parameters())
