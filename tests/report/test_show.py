"""What `cgspn show` finds: influence against the whole Jacobian, cosines against exact ones, any photograph."""

import base64
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_demo_report import Page

from cgspn.layers import AttentionConfig, AttentionMixer, Grid, PropagationConfig, PropagationMixer
from cgspn.models import Encoder, create_model
from cgspn.ops import propagate_2d_reference
from cgspn.report.descriptors import describe, unpacked
from cgspn.report.photographs import encoder_input, fitted, load_photographs
from cgspn.report.scans import attention_rows, scan_maps, scanned
from cgspn.report.show import look_at, show_picture
from cgspn.report.show_data import CELLS, at, fewer, matching_layer, packed
from cgspn.report.show_page import show_page
from cgspn.teachers import convert, load_embedded_teacher


def lively_mixer(seed=0, **settings):
    """A propagation mixer whose weights are large enough for every path to carry something."""
    torch.manual_seed(seed)
    mixer = PropagationMixer(12, PropagationConfig(**{"compression": 2, **settings})).double()
    torch.nn.init.normal_(mixer.param_proj.weight, std=0.8)
    return mixer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge": "sum", "directions": ("left", "up")},
        {"latent_norm": False},
        {"channels_per_group": 3},
        {"forget_gate": True},
        {"value_expansion": 2, "channels_per_group": 3, "forget_gate": True, "compression": 4},
    ],
)
def test_scan_maps_are_the_norms_of_the_whole_jacobian(settings):
    mixer, grid = lively_mixer(**settings), Grid(4, 5)
    entry = torch.randn(1, grid.tokens, 12, dtype=torch.float64)
    positions = [(2, 3), (0, 0)]
    maps = scan_maps(mixer, entry, grid, positions)
    latent, values = scanned(mixer, entry, grid)
    apart = mixer.config.value_expansion is not None
    x = torch.cat([latent, values], -1) if apart else latent
    total = torch.zeros(2, 4, 5, dtype=torch.float64)
    for d, name in enumerate(mixer.config.directions):

        def output(x, d=d, name=name):
            config, count = mixer.config, len(mixer.config.directions)
            maker, rest = x[..., : mixer.latent], x[..., mixer.latent :]
            own = rest.chunk(count, -1)[d] if apart else x
            weight, bias = (t.unflatten(0, (count, -1))[d] for t in mixer.param_proj.parameters())
            made = torch.nn.functional.linear(maker, weight, bias).unflatten(-1, (1, mixer.params_per_direction, -1))
            lam, u, l0, l1, l2, *keep = made.repeat_interleave(config.channels_per_group, -1).unbind(-2)
            gate = keep[0] if keep else None
            y = propagate_2d_reference(own, torch.stack([l0, l1, l2], -2), lam, u, keep=gate, directions=(name,))
            return torch.stack([y[0, r, c] for r, c in positions])

        jacobian = torch.autograd.functional.jacobian(output, x)[:, :, 0]  # [P, c, h, w, c']
        expected = jacobian.square().sum((1, 4)).sqrt()
        assert float((maps[name] - expected).norm() / expected.norm()) < 1e-9
        total += expected.square()
    torch.testing.assert_close(maps["together"], total.sqrt())
    assert set(maps) == {*mixer.config.directions, "together"}


def test_a_scan_reaches_a_patch_from_a_triangle_behind_it_and_from_nowhere_else():
    mixer, grid, (row, column) = lively_mixer(), Grid(7, 9), (4, 3)
    maps = scan_maps(mixer, torch.randn(1, grid.tokens, 12, dtype=torch.float64), grid, [(row, column)])
    rows, columns = torch.meshgrid(torch.arange(7) - row, torch.arange(9) - column, indexing="ij")
    behind = {"down": -rows, "up": rows, "right": -columns, "left": columns}
    across = {"down": columns, "up": columns, "right": rows, "left": rows}
    for name in behind:
        triangle = (behind[name] >= 0) & (across[name].abs() <= behind[name])
        assert torch.equal(maps[name][0] > 0, triangle), name


def test_rows_of_attention_are_those_of_the_whole_map():
    torch.manual_seed(0)
    mixer, grid = AttentionMixer(12, AttentionConfig(heads=3)), Grid(3, 4, prefix=2)
    entry = torch.randn(1, 14, 12)
    rows = attention_rows(mixer, entry, grid, [(0, 0), (2, 1)])
    whole = mixer.weights(entry, grid).mean(1)[0, 2:, 2:].view(3, 4, 3, 4)
    torch.testing.assert_close(rows, torch.stack([whole[0, 0], whole[2, 1]]))


def cosines(descriptors, position):
    """The cosines of one patch with all patches, as the page computes them: float64 [h, w]."""
    h, w = descriptors.codes.shape[:2]
    rows = unpacked(descriptors.codes, descriptors.steps)
    return (rows @ rows[position[0] * w + position[1]]).view(h, w)


def exact_cosines(features, position):
    units = torch.nn.functional.normalize(features.double(), dim=-1)
    return units @ units[position]


def few_directions():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 30, 20, generator=generator) @ torch.randn(20, 384, generator=generator) + 0.3


def a_real_map():
    photograph = load_photographs("embedded", 112, 4, 1)[0][0]
    encoder = load_embedded_teacher().image
    with torch.no_grad():
        return encoder(encoder_input(photograph, encoder.config)).tokens[0]


@pytest.mark.parametrize("features", [few_directions, a_real_map])
def test_cosines_of_the_descriptors_are_the_exact_ones_within_two_hundredths(features):
    features = features()
    descriptors = describe(features)
    assert descriptors.error < 0.02
    assert descriptors.kept > 0.99
    for position in ((0, 0), (7, 11), (19, 27)):
        found = cosines(descriptors, position)
        assert float((found - exact_cosines(features, position)).abs().max()) < 0.02
        assert float(found[position]) == pytest.approx(1)


def test_features_too_varied_for_a_descriptor_say_so():
    features = torch.randn(20, 30, 384, generator=torch.Generator().manual_seed(0))
    descriptors = describe(features)
    exact = torch.stack([exact_cosines(features, divmod(i, 30)).flatten() for i in range(0, 600, 10)])
    found = torch.stack([cosines(descriptors, divmod(i, 30)).flatten() for i in range(0, 600, 10)])
    assert descriptors.kept < 0.5
    assert descriptors.error == pytest.approx(float((found - exact).abs().max()), rel=1e-9)
    assert describe(torch.zeros(2, 3, 8)).error == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    ramp = Image.linear_gradient("L").resize((90, 60))
    ramp.convert("RGB").save(root / 'a <b> & "c".jpg')
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to see it upright
    ramp.convert("RGB").save(root / "deep" / "er" / "turned.jpg", exif=turned)
    ramp.convert("RGB").save(root / ".hidden" / "thumbnail.jpg")
    (root / "damaged.png").write_bytes(b"no image")
    (root / "notes.txt").write_text("no image either")
    return root


def test_photographs_keep_their_aspect_and_damaged_ones_are_named(folder):
    found, skipped = load_photographs(str(folder), 112, 14, 10)
    assert [p.name for p in found] == ['a <b> & "c".jpg', "deep/er/turned.jpg"]
    assert [tuple(p.pixels.shape) for p in found] == [(3, 70, 112), (3, 112, 70)]
    assert "damaged.png" in skipped.summary()
    assert (len(skipped), skipped.total) == (1, 3)
    top_down, turned = (p.pixels.float().mean(0) for p in found)
    assert top_down[0].mean() < 20 < 235 < top_down[-1].mean()
    assert turned[:, 0].mean() > 235 > 20 > turned[:, -1].mean()
    assert len(load_photographs(str(folder), 112, 14, 1)[0]) == 1
    with pytest.raises(ValueError, match="size is 13; accepted: at least one patch, 14 pixels"):
        load_photographs(str(folder), 13, 14, 1)
    with pytest.raises(ValueError, match="limit is 0"):
        load_photographs(str(folder), 28, 14, 0)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_photographs(str(folder / "nowhere"), 28, 14, 1)


def test_sizes_are_whole_patches_and_clickable_cells_are_few():
    assert fitted(2160, 3840, 4096, 14) == (2310, 4102)
    assert fitted(3, 5000, 224, 14) == (14, 224)
    for grid in ((1, 1), (74, 74), (165, 293), (294, 294), (1, 9000)):
        cells = fewer(grid)
        assert cells[0] * cells[1] <= max(CELLS, 1)
        assert cells == grid or grid[0] * grid[1] > CELLS
    assert at((1.0, 0.0), (5, 7)) == (4, 0)
    assert [matching_layer(layer, 3, 12) for layer in (1, 2, 3)] == [0, 6, 11]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    teacher = load_embedded_teacher().image.requires_grad_(False)
    return teacher, convert(teacher, compression=4, keep_attention=1).requires_grad_(False)


@pytest.fixture(scope="module")
def shown(models, folder):
    photographs = load_photographs(str(folder), 36, 4, 2)[0]
    return look_at(photographs, models[1], models[0], layers=[1, 2, 3, 4])


def test_what_a_page_carries_is_what_was_found(shown):
    view = shown.views[0]
    data = packed(view)
    raw = zlib.decompress(base64.b64decode(data["data"]))
    count, start = view.cells[0] * view.cells[1], 0
    for model, descriptors in zip(data["models"], view.descriptors.values()):
        size = count * len(model["steps"])
        codes = torch.frombuffer(bytearray(raw[start : start + size]), dtype=torch.int8)
        assert torch.equal(codes, descriptors.codes.flatten())
        start += size
    for layer, flows in zip(data["layers"], view.flows.values()):
        assert [f["key"] for f in layer["flows"]] == [f"{f.model}-{f.kind}" for f in flows]
        start += sum(f.shares.numel() for f in flows)
    assert start == len(raw)
    kinds = [{f.kind for f in flows if f.model == "student"} for flows in view.flows.values()]
    assert kinds.count({"attention"}) == 1
    assert kinds.count({"down", "up", "right", "left", "together"}) == 3


def test_an_encoder_next_to_itself_agrees_with_itself(models, folder):
    photographs = load_photographs(str(folder), 36, 4, 2)[0]
    same = look_at(photographs, models[0], models[0], layers=[2])
    assert same.views[0].agreement == pytest.approx(1, abs=1e-6)
    assert min(same.colours["student"].agreement) > 0.999
    picture = torch.tensor(np.asarray(show_picture(same, width=36))).int()[14:]  # below the titles
    assert (picture[:, 42:78] - picture[:, 84:120]).abs().max() <= 1


def test_the_page_is_one_whole_document_that_asks_nothing_of_the_network(shown):
    html = show_page(shown, {"student": "s", "teacher": "t"}, {"command": "<0>"})
    page = Page()
    page.feed(html)
    assert not page.open
    for tag, attributes in page.tags:
        for key in ("src", "href", "data", "action"):
            assert (attributes.get(key) or "#").startswith(("data:", "#")), (tag, key)
    assert not re.search(r"url\((?!['\"]?(#|data:))|@import|<script[^>]+src|https?://", html)
    assert "a &lt;b&gt; &amp; &quot;c&quot;" in html
    assert "<b>" not in html.replace("<body>", "")


def test_a_student_alone_and_one_of_grey_images(folder):
    torch.manual_seed(0)
    config = create_model("cgspn_mini_patch4_28", channels=1).config
    student = Encoder(config).eval().requires_grad_(False)
    photographs = load_photographs(str(folder), 28, 4, 1)[0]
    assert encoder_input(photographs[0], config).shape == (1, 1, 20, 28)
    html = show_page(look_at(photographs, student), {"student": "s"}, {})
    assert 'data-model="student"' in html
    assert 'data-model="teacher"' not in html
    assert 'data-choice="scale"' not in html


def test_what_does_not_fit_is_refused(models, folder):
    photographs = load_photographs(str(folder), 28, 4, 1)[0]
    with pytest.raises(ValueError, match=r"layers is \[5\]; accepted: 1 to 4"):
        look_at(photographs, models[1], layers=[5])
    with pytest.raises(ValueError, match="at is"):
        look_at(photographs, models[1], places=[(0.5, 1.5)])
    with pytest.raises(ValueError, match="teacher has patches of 7 pixels; expected the student's, 4"):
        look_at(photographs, models[1], create_model("vit_mini_patch4_28", patch_size=7))
