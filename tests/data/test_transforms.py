"""Transforms against torch's own antialiased interpolation of the piece that was cut out."""

import pytest
import torch
from torch.nn.functional import interpolate

from cgspn.data.transforms import (
    EvalTransform,
    TrainTransform,
    boxes_from,
    center_crop,
    normalize,
    resample,
    resize,
    to_float,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(24, 17), (60, 80), (40, 53), 7])
def test_resample_is_crop_then_antialiased_resize(size):
    x = torch.rand(5, 3, 40, 53, generator=generator(), dtype=torch.float64)
    boxes = torch.tensor([[3, 5, 20, 31], [0, 0, 40, 53], [10, 20, 30, 7], [7, 7, 1, 1], [39, 0, 1, 53]])
    flip = torch.tensor([False, True, False, True, True])
    got = resample(x, boxes, size, flip)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        piece = x[i : i + 1, :, top : top + h, left : left + w]
        pair = (size, size) if isinstance(size, int) else size
        expected = interpolate(piece, pair, mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(got[i], expected.flip(2) if flip[i] else expected, atol=1e-12, rtol=0)


def test_resize_keeps_the_mean_and_any_aspect():
    x = torch.rand(2, 1, 64, 64, generator=generator())
    small = resize(x, (16, 8))
    assert small.shape == (2, 1, 16, 8)
    assert abs(float(small.mean() - x.mean())) < 0.01
    # A plain (aliasing) read of every fourth pixel would keep the variance of white noise.
    assert small.var() < 0.15 * x.var()


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 80, 20), (80, 40, (20, 30)), (31, 47, (16, 16)), (9, 9, 28)]
)
def test_center_crop_takes_the_middle(height, width, size):
    # A picture of its own coordinates: what comes out must be centred and at one common scale.
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width) * height
    columns = torch.linspace(-1, 1, width).expand(height, width) * width
    out = center_crop(torch.stack([rows, columns])[None], size)[0]
    h, w = (size, size) if isinstance(size, int) else size
    assert out.shape == (2, h, w)
    scale = min(height / h, width / w)
    assert abs(float(out.mean((1, 2)).abs().max())) < 2 * scale + 0.2  # half a pixel off at most, in units of 2
    slope_rows = float(out[0, h // 2 + 1, 0] - out[0, h // 2 - 1, 0])
    slope_columns = float(out[1, 0, w // 2 + 1] - out[1, 0, w // 2 - 1])
    assert slope_rows == pytest.approx(slope_columns, rel=0.15)


def test_boxes_lie_inside_and_cover_their_ranges():
    boxes = boxes_from(torch.rand(4, 4000, generator=generator()), 30, 50, (0.2, 0.5), (0.5, 2.0)).float()
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 30).all()
    assert (left + w <= 50).all()
    area = h * w / 1500
    assert area.max() < 0.53
    assert area.median() == pytest.approx(0.35, abs=0.03)
    assert (top + h == 30).any()
    assert (top == 0).any()


def test_random_crops_follow_its_generator_and_flips_half():
    x = torch.rand(6, 3, 28, 28, generator=generator())
    crop = TrainTransform(32)
    first = crop(x, generator(5))
    assert torch.equal(first, crop(x, generator(5)))
    assert not torch.equal(first, crop(x, generator(6)))
    # The whole image as the box: every output is the image or its mirror.
    many = x[:1].expand(400, -1, -1, -1)
    out = TrainTransform(28, (1, 1), (1, 1), mean=(0,) * 3, std=(1,) * 3)(many, generator())
    plain = (out - many).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (out - many.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (plain | mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_transforms_return_three_normalised_channels():
    grey = torch.randint(0, 256, (3, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    out = EvalTransform(28)(grey)
    torch.testing.assert_close(out, (grey.float() / 127.5 - 1).expand(-1, 3, -1, -1))
    whole = TrainTransform(28, scale=(1, 1), ratio=(1, 1), flip=0.0, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    expected = torch.stack([(grey[:, 0] / 255 - m) / s for m, s in zip((0.1, 0.2, 0.3), (1, 2, 4))], 1)
    torch.testing.assert_close(whole(grey, generator()), expected)
    tall = torch.randint(0, 256, (1, 3, 40, 20), generator=generator(), dtype=torch.uint8)
    assert not torch.equal(EvalTransform(16)(tall), EvalTransform(16, crop=False)(tall))
    torch.testing.assert_close(
        EvalTransform((10, 20), crop=False)(tall), normalize(resize(to_float(tall), (10, 20))), atol=1e-5, rtol=0
    )


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"size is \(3, 0\)"):
        resize(torch.zeros(1, 1, 4, 4), (3, 0))
    with pytest.raises(ValueError, match=r"images has shape \(1, 4, 2, 2\)"):
        to_float(torch.zeros(1, 4, 2, 2))
