"""What the pictures of a report show, checked on values whose look is known."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from cgspn.report.charts import loss_chart, smooth, thin
from cgspn.report.pca import fit_colours
from cgspn.report.pictures import png_uri, sheet, tile
from cgspn.report.show_data import reach


def test_colours_of_two_models_agree_where_their_features_are_a_rotation():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 8, 8, 16, generator=generator) * torch.linspace(3, 0.1, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    teacher = fit_colours([maps])
    student = fit_colours([maps @ rotation], like=(teacher, [maps]))
    assert min(student.agreement) > 0.999
    torch.testing.assert_close(student.colours(maps @ rotation), teacher.colours(maps), atol=2e-3, rtol=0)
    assert 0 <= float(teacher.colours(maps).min()) <= float(teacher.colours(maps).max()) <= 1


def test_a_picture_of_features_has_their_colours_and_no_edges_between_patches():
    maps = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    basis = fit_colours([maps])
    picture = basis.picture(maps, side=60)
    assert picture.shape == (40, 60, 3)
    middles = picture[5::10, 5::10]
    assert float((middles - basis.colours(maps)).abs().mean()) < 0.05
    steps = (picture[1:] - picture[:-1]).abs().max()
    assert float(steps) < 0.3 < float((basis.colours(maps)[1:] - basis.colours(maps)[:-1]).abs().max())


def test_constant_features_are_grey_and_broken_ones_refused():
    flat = fit_colours([torch.ones(4, 4, 5)])
    assert torch.equal(flat.colours(torch.ones(2, 5)), torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="finite"):
        fit_colours([torch.full((4, 4, 5), float("nan"))])


def test_a_png_holds_the_picture():
    picture = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))
    data = base64.b64decode(png_uri(picture).removeprefix("data:image/png;base64,"))
    read = Image.open(io.BytesIO(data))
    assert read.size == (7, 5)
    assert torch.equal(torch.tensor(list(read.tobytes())).view(5, 7, 3), (picture * 255).round().long())
    with pytest.raises(ValueError, match="not finite"):
        png_uri(picture * float("nan"))


def test_tiles_and_sheets_keep_their_order():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 3)
    assert tile(images, 2)[0, ::2, ::3].tolist() == [[0, 1], [2, 3]]
    rows = [[torch.full((2, 2, 3), v) for v in values] for values in ((0.0, 0.5), (1.0, 0.2))]
    out = torch.tensor(np.asarray(sheet(rows, ("one", "two"), (2, 2), gap=1)))
    band = len(out) - 6
    assert out[band + 1, :, 0].tolist() == [0, 0, 255, 128, 128]
    assert out[-1, :, 0].tolist() == [255, 255, 255, 51, 51]
    assert out[band:, 2, 3].tolist() == [0] * 6  # gaps are transparent
    big = [torch.zeros(60, 90, 3), torch.zeros(60, 90, 3)]
    titled = np.asarray(sheet([big], ("photograph", "student"), (60, 90), gap=6))
    assert titled[:14, :90, 3].any()  # each column has its title
    assert titled[:14, 96:, 3].any()


def test_reach_is_the_radius_that_holds_half():
    values = torch.zeros(9, 9)
    values[4, 4], values[4, 5], values[4, 8] = 5, 1, 3
    assert reach(values, (4, 4)) == 4
    values[4, 5] = 3
    assert reach(values, (4, 4)) == 1
    assert reach(torch.zeros(3, 3), (1, 1)) == 0


def test_smoothing_and_thinning_keep_level_and_length():
    assert smooth([2.0] * 10, 0.85) == pytest.approx([2.0] * 10)
    x, y = thin([float(i) for i in range(1000)], most=100)
    assert len(x) == len(y) == 100
    assert y[0] == pytest.approx(4.5)


def test_a_loss_chart_is_one_svg_with_its_label():
    svg = loss_chart({"C-GSPN": [3.0, 2.0, 1.0], "ViT": [3.0, 1.0, 0.5]}, label="total loss")
    assert svg.startswith("<svg")
    assert "total loss" in svg
    with pytest.raises(ValueError, match="curve"):
        loss_chart({}, label="nothing")
