"""Images with class masks: ADE20K, COCO-Stuff, CamVid, and your own file pairs or webdataset tars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .clip_benchmark import read_lines
from .folder import SUFFIXES
from .labelled import images_of, is_tars, set_name
from .locate import cache_folder
from .prepare import Member, Picture, open_picture, open_raw, picture_name
from .shards import open_shards

IGNORE = -1  # in returned masks, whatever the number on disk
CAMVID = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign or symbol", "fence", "car", "pedestrian", "bicyclist"),
)
COCO_IDS, COCO_TRAIN_IDS = 182, 171

Pair = tuple[Picture, Picture]
"""An image and its mask."""


@dataclass(frozen=True, eq=False)
class SegmentationSet:
    """Images and their masks, which are PNG files with one channel of class ids.

    first: the id of class 0 in the files; class k has first + k. ignored: the id of ignored pixels.
    """

    name: str
    pairs: Sequence[Pair]
    class_names: tuple[str, ...]
    first: int = 0
    ignored: int = 255

    def __len__(self) -> int:
        return len(self.pairs)

    def picture_name(self, number: int) -> str:
        """The name of an image in messages."""
        return picture_name(self.pairs[number][0])

    def read(self, number: int) -> tuple[Image.Image, NDArray[np.int64]]:
        """An RGB image and its mask [H, W], 0 to K - 1 or IGNORE.

        Raises OSError or ValueError for files that are damaged or do not match, and Pillow's errors.
        """
        picture, mask = self.pairs[number]
        image, stored = open_picture(picture), read_ids(mask)
        if stored.shape != (image.height, image.width):
            raise ValueError(
                f"its mask has {stored.shape[1]} x {stored.shape[0]} pixels; "
                f"expected those of the image, {image.width} x {image.height}"
            )
        ids = np.where(stored == self.ignored, IGNORE, stored - self.first)
        wrong = (ids < IGNORE) | (ids >= len(self.class_names)) | ((ids == IGNORE) & (stored != self.ignored))
        if wrong.any():
            last = self.first + len(self.class_names) - 1
            raise ValueError(
                f"its mask holds {stored[wrong][0]}; accepted: {self.first} to {last}, and {self.ignored} for "
                "pixels that do not count"
            )
        return image, ids

    def limited(self, count: int | None) -> SegmentationSet:
        """`count` evenly spaced images, as consecutive ones are similar; None for all. Raises ValueError if too few."""
        if count is None:
            return self
        if not 1 <= count <= len(self):
            raise ValueError(f"{self.name} holds {len(self)} images, but {count} are requested; accepted: 1 or more")
        chosen = [i * len(self) // count for i in range(count)]
        return replace(self, pairs=[self.pairs[i] for i in chosen])


def read_ids(mask: Picture) -> NDArray[np.int64]:
    """The class ids of a mask, [H, W], or the indices of a palette image. Raises ValueError for a colour image."""
    image = open_raw(mask)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise ValueError(f"its mask is an image of mode {image.mode}; expected one channel of class ids")
    return np.asarray(image).astype(np.int64)


def open_segmentation(source: str | Path) -> tuple[SegmentationSet, SegmentationSet]:
    """The training and test split of a dataset, whose layout is detected.

    - ADE20K (SceneParsing): images/{training,validation} and annotations/{training,validation}; 0 is ignored.
    - COCO-Stuff: train2017 and val2017, or both in images/, and the same in stuffthingmaps/ or annotations/; 182 ids,
      or 171 if all masks end in _labelTrainIds.png; 255 is ignored.
    - CamVid: camvid-train.tar and camvid-test.tar with .jpg and .mask.png; 11 is ignored.

    Raises FileNotFoundError for any other layout, and OSError or ValueError for unreadable files or no pairs.
    """
    root = Path(source)
    for candidate in (root, root / "ADEChallengeData2016"):
        if (candidate / "annotations" / "training").is_dir():
            return _ade20k(candidate, "training"), _ade20k(candidate, "validation")
    both = (root / name for name in ("stuffthingmaps", "annotations"))
    if masks := next((masks for masks in both if (masks / "train2017").is_dir()), None):
        return _coco_stuff(root, masks, "train2017"), _coco_stuff(root, masks, "val2017")
    if (root / "camvid-train.tar").is_file():
        train, test = (open_pairs(root / f"camvid-{part}.tar", len(CAMVID), 11) for part in ("train", "test"))
        return replace(train, name="camvid", class_names=CAMVID), replace(test, name="camvid", class_names=CAMVID)
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}")
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) if root.is_dir() else "a file"
    raise FileNotFoundError(
        f"{root} is not a known dataset; expected annotations/training (ADE20K), stuffthingmaps/train2017 "
        f"(COCO-Stuff) or camvid-train.tar (CamVid); found: {found or 'nothing'}. Other sets: --train and --test"
    )


def open_pairs(source: str | Path, classes: int, ignored: int = 255) -> SegmentationSet:
    """Open pairs NAME.jpg, NAME.mask.png in a folder at any depth, or in tars (a path, pattern or URL ending in .tar).

    Ids are 0 to classes - 1, or `ignored`. Raises FileNotFoundError if there are no pairs, ValueError for fewer than
    two classes, and the errors of `open_shards`.
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected at least 2")
    if is_tars(source):
        shards = open_shards(str(source), cache_folder())
        numbers = [n for n in range(len(shards)) if shards.read_parts(n, ("mask",))["mask"] is not None]
        pictures = images_of(shards)
        pairs: list[Pair] = [(pictures[n], Member(shards, n, "mask")) for n in numbers]
    else:
        root = Path(source)
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.endswith(".mask.png"))
        pairs = [(p, p.with_suffix(".mask.png")) for p in files if p.with_suffix(".mask.png").is_file()]
    if not pairs:
        raise FileNotFoundError(f"{source} holds no pairs; expected images, each with a NAME.mask.png beside it")
    return SegmentationSet(set_name(source), pairs, _numbered(classes), ignored=ignored)


def _ade20k(root: Path, split: str) -> SegmentationSet:
    table = root / "objectInfo150.txt"  # the last column is the name; the first line is a header
    names = _numbered(150)
    if table.is_file():
        rows = [line.split("\t")[-1].strip() for line in read_lines(table, "names of classes")][1:]
        names = tuple(row.split(",")[0] for row in rows) if len(rows) == 150 else names
    pairs = _pairs(root / "images" / split, root / "annotations" / split, ".png")
    return SegmentationSet("ade20k", pairs, names, first=1, ignored=0)


def _coco_stuff(root: Path, masks: Path, split: str) -> SegmentationSet:
    images = root / "images" / split if (root / "images" / split).is_dir() else root / split
    endings = {path.name.removeprefix(path.name.split("_")[0]) for path in (masks / split).glob("*.png")}
    train_ids = endings == {"_labelTrainIds.png"}
    pairs = _pairs(images, masks / split, "_labelTrainIds.png" if train_ids else ".png")
    return SegmentationSet("coco-stuff", pairs, _numbered(COCO_TRAIN_IDS if train_ids else COCO_IDS))


def _pairs(images: Path, masks: Path, ending: str) -> list[Pair]:
    """Images and masks of the same name. Raises FileNotFoundError if there are none."""
    if not images.is_dir():
        raise FileNotFoundError(f"no such folder: {images}; expected the images of the masks in {masks}")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    pairs: list[Pair] = [(file, masks / f"{file.stem}{ending}") for file in files]
    # images without a mask are skipped and named when they are read
    if not any(isinstance(mask, Path) and mask.is_file() for _, mask in pairs):
        raise FileNotFoundError(f"{images} holds {len(files)} images, none of them with a mask NAME{ending} in {masks}")
    return pairs


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))
