"""Pictures as the original libraries prepare them; reading ahead."""

import numpy as np
import pytest
import torch
from PIL import Image

from cgspn.data.locate import cache_folder
from cgspn.data.prepare import Member, Prepare, open_picture, read_each
from cgspn.data.shards import open_shards
from cgspn.data.skipped import SkipCounter
from layouts import picture, write_tar

SIZES = [(40, 60), (61, 33), (56, 56), (300, 77), (20, 90)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip bilinear"])
def test_pixels_equal_those_of_the_original_processors(kind, size):
    transformers = pytest.importorskip("transformers")
    image = picture(1, *size)
    if kind == "clip":
        theirs = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        )
        ours = Prepare((56, 56), True, "bicubic", theirs.image_mean, theirs.image_std)
    else:
        resample = 3 if kind == "siglip" else 2
        theirs = transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil(
            size={"height": 56, "width": 56}, resample=resample
        )
        ours = Prepare((56, 56), False, "bicubic" if resample == 3 else "bilinear")
    expected = torch.as_tensor(np.asarray(theirs(images=image, return_tensors="np")["pixel_values"]))[0]
    torch.testing.assert_close(ours(image), expected, atol=1e-6, rtol=0)


def test_any_source_of_a_picture_gives_the_same_upright_rgb(tmp_path):
    image = picture(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    write_tar(tmp_path / "a.tar", {"a.png": (tmp_path / "a.png").read_bytes()})
    shards = open_shards(str(tmp_path / "a.tar"), cache_folder(tmp_path / "cache"))
    for source in (image, tmp_path / "a.png", str(tmp_path / "a.png"), Member(shards, 0, "image")):
        assert np.array_equal(np.asarray(open_picture(source)), np.asarray(image))
    with pytest.raises(OSError, match="no cls file"):
        Member(shards, 0, "cls").read()


def test_grey_encoders_get_one_channel():
    pixels = Prepare((28, 28), channels=1)(picture(3))
    grey = np.asarray(picture(3).convert("L").resize((42, 28), Image.Resampling.BILINEAR))[:, 7:35]
    assert torch.equal(pixels[0], (torch.from_numpy(grey.copy()).float() / 255 - 0.5) / 0.5)


def test_reading_ahead_keeps_the_order_and_leaves_out_what_fails():
    def read(number):
        if number in (3, 40):
            raise SyntaxError("broken PNG")
        return number * number

    counter = SkipCounter("set", 100, 0.1)
    got = list(read_each(range(100), read, lambda n: f"picture {n}", counter))
    assert got == [(n, n * n) for n in range(100) if n not in (3, 40)]
    assert counter.report().files == (
        ("picture 3", "SyntaxError: broken PNG"),
        ("picture 40", "SyntaxError: broken PNG"),
    )
    with pytest.raises(ValueError, match=r"2 of the .* cannot be used"):
        list(read_each(range(100), read, str, SkipCounter("set", 100, 0.01)))


@pytest.mark.parametrize("size", SIZES)
def test_a_crop_smaller_than_the_edge(size):
    transformers = pytest.importorskip("transformers")
    image = picture(1, *size)
    theirs = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=1
    )
    ours = Prepare((56, 56), True, "lanczos", theirs.image_mean, theirs.image_std, crop_pct=56 / 64)
    expected = torch.as_tensor(np.asarray(theirs(images=image, return_tensors="np")["pixel_values"]))[0]
    torch.testing.assert_close(ours(image), expected, atol=1e-6, rtol=0)


def test_arrays_and_tensors_are_the_picture_that_they_came_from():
    image = picture(4, 20, 30)
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        array / 255,
        torch.from_numpy(array / 255).half(),
        array.astype(np.uint16) * 257,
        array.astype(np.int64),
    ):
        assert np.array_equal(np.asarray(open_picture(same)), array)
    grey = np.linspace(0, 65535, 64).astype("uint16").reshape(2, 32)
    for same in (grey, grey.astype(">u2"), grey[..., None], Image.fromarray(grey)):
        assert np.array_equal(np.asarray(open_picture(same))[..., 0], (grey / 257).round())
    assert np.asarray(open_picture(np.ones((3, 4), bool))).min() == 255
    clear = np.zeros((5, 6, 4), np.uint8)
    assert np.asarray(open_picture(clear)).min() == 255  # over white, as files are


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((5, 5, 2)), r"shape \(5, 5, 2\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.full((4, 4), 300), "runs from 300 to 300; accepted: 0 to 255"),
        (torch.full((3, 4, 4), -0.5), "runs from -0.5"),
        (np.full((4, 4), np.nan), "runs from nan"),
        (np.ones((4, 4), complex), "dtype complex128; accepted: bool, integers, floats"),
        (np.array([["a"]]), "dtype <U1"),
    ],
)
def test_pixels_of_unknown_meaning_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        open_picture(wrong)
    with pytest.raises(TypeError, match="a picture is of type bytes; accepted: a path, PIL image, array or tensor"):
        open_picture(b"")


def test_strips_and_pictures_without_pixels():
    for height, width in ((1, 50), (2, 1), (1, 30_000)):
        pixels = Prepare((28, 28), mean=(0.0,) * 3, std=(1.0,) * 3)(Image.new("RGB", (width, height), (255, 0, 0)))
        assert torch.equal(pixels.amax((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="0 x 0 pixels"):
        Prepare((28, 28))(Image.new("RGB", (0, 0)))
