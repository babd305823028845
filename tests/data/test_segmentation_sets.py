"""Masks of ADE20K, COCO-Stuff, CamVid and pairs against the arrays they were written from."""

import numpy as np
import pytest
from PIL import Image

from cgspn.data.segmentation_sets import CAMVID, IGNORE, open_pairs, open_segmentation
from layouts import ade20k, coco_stuff, encoded, scene, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("above", [True, False])
def test_ade20k(tmp_path, above):
    root = ade20k(tmp_path / "ADEChallengeData2016")
    names = "\n".join(f"{k}\t0.1\t1\t1\tname {k}, other" for k in range(1, 151))
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}\n")
    train, test = open_segmentation(tmp_path if above else root)
    assert (len(train), len(test), len(train.class_names)) == (6, 4, 150)
    assert train.class_names[149] == "name 150"
    for split, seed in ((train, 0), (test, 100)):
        for i in range(len(split)):
            image, mask = split.read(i)
            expected = scene(seed + i, *((24, 36), (30, 24))[i % 2], 150)
            assert np.array_equal(np.asarray(image), expected[0])
            assert np.array_equal(mask, expected[1])
            assert (mask == IGNORE).any()


@pytest.mark.parametrize("suffix", ["", "_labelTrainIds"])
@pytest.mark.parametrize("in_images", [True, False])
def test_coco_stuff(tmp_path, suffix, in_images):
    highest = 170 if suffix else 181
    root = coco_stuff(tmp_path, suffix=suffix, highest=highest)
    if in_images:
        (root / "images").mkdir()
        for split in ("train2017", "val2017"):
            (root / split).rename(root / "images" / split)
        (root / "stuffthingmaps").rename(root / "annotations")
    train, test = open_segmentation(root)
    assert (len(train), len(test), len(train.class_names)) == (5, 3, highest + 1)
    image, mask = test.read(2)
    expected = scene(602, 24, 32, 4)[1]
    assert image.size == (32, 24)
    assert np.array_equal(mask, np.where(expected < 0, -1, np.array([0, 17, 100, highest])[expected.clip(0)]))


def members_of_pairs(count, classes, void, first=0):
    members = {}
    for i in range(first, first + count):
        image, mask = scene(i, 24, 32, classes)
        members[f"{i:04d}.png"] = encoded(Image.fromarray(image))
        members[f"{i:04d}.mask.png"] = encoded(Image.fromarray(np.where(mask < 0, void, mask).astype(np.uint8)))
    return members


def test_camvid_and_pairs(tmp_path):
    for part, first in (("train", 0), ("test", 50)):
        members = members_of_pairs(3, 4, 11, first)
        write_tar(tmp_path / f"camvid-{part}.tar", members | {"9.png": members[f"{first:04d}.png"]})
        (tmp_path / part).mkdir()
        for name, content in members.items():
            (tmp_path / part / name).write_bytes(content)
    train, test = open_segmentation(tmp_path)
    assert train.class_names == test.class_names == CAMVID
    assert len(train) == len(test) == 3  # the image without a mask is no pair
    folder = open_pairs(tmp_path / "test", 11, 11)
    for i in range(3):
        for found in (test, folder):
            image, mask = found.read(i)
            expected = scene(50 + i, 24, 32, 4)
            assert np.array_equal(mask, expected[1])
            assert np.array_equal(np.asarray(image), expected[0])


def test_a_part_is_spread_over_the_set(tmp_path):
    train, _ = open_segmentation(ade20k(tmp_path, (6, 1)))
    assert [p.stem[-1] for p, _ in train.limited(3).pairs] == ["0", "2", "4"]
    assert train.limited(None) is train
    with pytest.raises(ValueError, match="ade20k holds 6 images, but 7 are requested"):
        train.limited(7)


def test_masks_that_do_not_fit_say_so(tmp_path):
    root = ade20k(tmp_path, (4, 1))
    masks = root / "annotations" / "training"
    Image.new("L", (10, 10)).save(masks / "ADE_00000000.png")
    Image.new("RGB", (24, 30)).save(masks / "ADE_00000001.png")
    Image.new("L", (36, 24), 151).save(masks / "ADE_00000002.png")
    (masks / "ADE_00000003.png").unlink()
    train, _ = open_segmentation(root)
    for number, message in enumerate(
        (
            "its mask has 10 x 10 pixels; expected those of the image, 36 x 24",
            "its mask is an image of mode RGB; expected one channel of class ids",
            "its mask holds 151; accepted: 1 to 150, and 0 for pixels that do not count",
        )
    ):
        with pytest.raises(ValueError, match=message):
            train.read(number)
    with pytest.raises(FileNotFoundError):
        train.read(3)


def test_other_layouts_are_refused_with_what_was_expected(tmp_path):
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected annotations/training \(ADE20K\).*found: leftImg8bit"):
        open_segmentation(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_segmentation(tmp_path / "missing")
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*images/training; expected the images of the masks"):
        open_segmentation(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no pairs; expected images, each with a NAME\.mask\.png"):
        open_pairs(tmp_path, 3)
