"""What the files beside a foreign encoder say about its pictures."""

import pytest

from cgspn.teachers.formats.preprocessing import HALF, normalisation
from cgspn.teachers.source import Source

CLIP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}


def fields(squeeze=False, **configs):
    names = {"processor": "processor_config.json", "preprocessor": "preprocessor_config.json"}
    names |= {"clip": "open_clip_config.json", "timm": "config.json"}
    source = Source("x", {}, {names[key]: value for key, value in configs.items()})
    return normalisation(source, HALF, HALF, squeeze=squeeze)


def test_nothing_stated_leaves_the_familys_own():
    assert fields() == {"image_mean": HALF, "image_std": HALF, "image_crop": True, "image_resample": "bicubic"}
    assert fields(squeeze=True)["image_crop"] is False


@pytest.mark.parametrize("place", ["processor", "preprocessor"])
def test_a_processor_of_transformers(place):
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 1, **CLIP}
    found = fields(squeeze=True, **{place: {"image_processor": stated} if place == "processor" else stated})
    assert found["image_mean"] == (0.1, 0.2, 0.3)
    assert found["image_std"] == (0.4, 0.5, 0.6)
    assert (found["image_crop"], found["image_crop_pct"], found["image_resample"]) == (True, 0.875, "lanczos")


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),  # pixels from 0 to 1
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),  # from 0 to 255
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.25),  # from 0 to 2
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, 0.5, 0.5),
    ],
)
def test_mean_and_std_are_those_of_pixels_from_0_to_1(stated, mean, std):
    found = fields(preprocessor=stated)
    assert found["image_mean"] == pytest.approx((mean,) * 3)
    assert found["image_std"] == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    ("stated", "crop"),
    [
        ({"size": {"height": 224, "width": 224}}, False),
        ({"size": {"shortest_edge": 224}}, True),
        ({"size": 224}, False),  # as feature extractors of ViT wrote it
        ({"size": 224, "do_center_crop": True, "crop_size": 224}, True),  # and those of CLIP
        ({"do_center_crop": False}, False),
    ],
)
def test_the_size_tells_squeezing_from_cropping(stated, crop):
    assert fields(preprocessor=stated)["image_crop"] is crop


def test_timm_and_openclip():
    timm = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"}
    found = fields(timm={"pretrained_cfg": timm})
    assert (found["image_std"], found["image_resample"]) == ((0.25,) * 3, "bilinear")
    assert (found["image_crop"], found["image_crop_pct"]) == (False, 0.9)
    clip = {"preprocess_cfg": {"resize_mode": "squash", "interpolation": "bicubic", "mean": [0.1] * 3}}
    found = fields(clip=clip, preprocessor=CLIP)  # the first that states anything is believed as a whole
    assert (found["image_crop"], found["image_mean"], "image_crop_pct" in found) == (False, (0.1,) * 3, False)
    with pytest.warns(UserWarning, match="crop_mode 'border'"):
        fields(timm={"pretrained_cfg": {"crop_mode": "border"}})
    with pytest.raises(ValueError, match="filter 'sinc'"):
        fields(timm={"pretrained_cfg": {"interpolation": "sinc"}})


def test_one_number_stands_for_every_channel():
    found = fields(preprocessor={"image_mean": 0.25, "image_std": [0.5]})
    assert (found["image_mean"], found["image_std"]) == ((0.25,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("kind", "mean", "resample", "crop"),
    [("CLIPImageProcessor", 0.48145466, "bicubic", True), ("ViTImageProcessorFast", 0.5, "bilinear", False)],
)
def test_what_a_file_leaves_out_is_its_class_s_own(kind, mean, resample, crop):
    found = fields(preprocessor={"image_processor_type": kind, "size": 224})
    assert (found["image_mean"][0], found["image_resample"], found["image_crop"]) == (mean, resample, crop)


@pytest.mark.parametrize(
    "stated",
    [
        {"size": {"shortest_edge": 224}, "do_center_crop": False},
        {"size": {"longest_edge": 224}},
        {"do_resize": False},
        {"do_pad": True},
    ],
)
def test_pictures_that_would_keep_their_shape_are_warned_of(stated):
    with pytest.warns(UserWarning, match="keeps the shape of images or pads them"):
        fields(preprocessor=stated)


def test_the_share_that_convnext_crops():
    found = fields(preprocessor={"size": {"shortest_edge": 224}, "crop_pct": 0.875})
    assert (found["image_crop"], found["image_crop_pct"]) == (True, 0.875)
