"""Tasks on frozen features at a size: linear probes for dense masks and classes, and the nearest neighbour."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from cgspn.data import open_shards, resize
from cgspn.data.locate import cache_folder
from cgspn.data.transforms import to_float
from cgspn.evaluate.segmentation import fit_streamed, score_streamed
from cgspn.models.encoder import Encoder

from .measure import features
from .photographs import pixels, read_tar, square

CAMVID_CLASSES, CAMVID_VOID = 11, 11
VOC_CLASSES, VOC_VOID, VOC_SCORED = 21, 255, (0, 8, 10, 12, 13, 15, 17)
CLASSES = 100


@dataclass(frozen=True)
class Masked:
    """Scenes and their masks. images: uint8 [3, H, W] each; masks: uint8 [H, W] each, on a device."""

    images: list[Tensor]
    masks: list[Tensor]


@dataclass(frozen=True)
class Labelled:
    """Pictures with classes. images: uint8 [N, 3, side, side]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor


def mask_of(image: Image.Image) -> Tensor:
    """uint8 [H, W]: class numbers, also of a palette picture."""
    plain = image if image.mode in ("L", "P") else image.convert("L")
    return torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def load_masked(tar: Path, device: torch.device) -> Masked:
    """Every pair of a shard."""
    images, masks = read_tar(tar, "image", pixels), read_tar(tar, "mask", mask_of)
    return Masked([i.to(device) for i in images], [m.to(device) for m in masks])


def load_labelled(tar: Path, device: torch.device, side: int = 256) -> Labelled:
    """Every picture of a shard whose .cls holds its class."""
    shards = open_shards(str(tar), cache_folder())
    labels = [int(shards.read_parts(i, ("cls",))["cls"] or b"") for i in range(len(shards))]
    images = torch.stack(read_tar(tar, "image", lambda image: square(image, side)))
    return Labelled(images.to(device), torch.tensor(labels, device=device))


def shape_at(px: int, image: Tensor, patch: int) -> tuple[int, int]:
    """The size nearest to the picture's own shape with as many tokens as a square of px pixels has."""
    h, w = image.shape[-2:]
    rows = max(1, round(px / patch * (h / w) ** 0.5))
    return rows * patch, max(1, round((px // patch) ** 2 / rows)) * patch


Read = Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]


def reader(encoder: Encoder, data: Masked, px: int) -> Read:
    """Tokens [1, h, w, C] and mask [1, H, W] of each picture asked for; pictures of one shape go through together."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(data.images):
        by_shape.setdefault(shape_at(px, image, encoder.config.patch_size), []).append(i)
    found: dict[int, Tensor] = {}
    for shape, numbers in by_shape.items():
        images = torch.cat([resize(to_float(data.images[i][None]), shape) for i in numbers])
        found |= dict(zip(numbers, features(encoder, images, shape)))

    def read(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for i in numbers:
            yield found[i][None], data.masks[i][None]

    return read


def segmentation(
    encoder: Encoder, train: Masked, test: Masked, px: int, classes: int, void: int, scored: Sequence[int] = ()
) -> float:
    """mIoU in percent of a linear probe, over the classes scored, or those that occur."""
    seen, unseen = reader(encoder, train, px), reader(encoder, test, px)
    probe = fit_streamed(seen, len(train.images), classes, ignore_index=void, scored=scored)
    found = score_streamed(probe, unseen, len(test.images), classes, ignore_index=void, scored=scored)
    return 100 * found.mean_iou


def classification(encoder: Encoder, train: Labelled, test: Labelled, px: int, classes: int) -> tuple[float, float]:
    """Accuracies in percent of a linear probe on the mean of the tokens, and of the nearest neighbour by cosine."""

    def pooled(data: Labelled) -> Tensor:
        return torch.cat([features(encoder, part, px).mean((1, 2)) for part in data.images.split(64)])

    mine, theirs = pooled(train), pooled(test)

    def read(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = torch.tensor(list(numbers), device=mine.device)
        yield mine[chosen, None, None], train.labels[chosen, None, None]

    probe = fit_streamed(read, len(mine), classes)
    found = probe.logits(theirs[:, None, None].float())[:, 0, 0].argmax(-1)
    nearest = train.labels[(normalize(theirs, dim=-1) @ normalize(mine, dim=-1).T).argmax(-1)]
    return tuple(100 * float((guess == test.labels).float().mean()) for guess in (found, nearest))  # type: ignore[return-value]


class Tasks:
    """CamVid, VOC animals and Caltech-101, loaded once, and every score at a size."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """folder: with the six tar files. Raises OSError for those that are not there."""

        def masked(name: str) -> tuple[Masked, Masked]:
            train, test = (load_masked(folder / f"{name}-{part}.tar", device) for part in ("train", "test"))
            return train, test

        self.camvid, self.voc = masked("camvid"), masked("voc-animals")
        train, test = (load_labelled(folder / f"caltech101-{part}.tar", device) for part in ("train", "test"))
        self.caltech = train, test

    @torch.inference_mode()
    def scores(self, encoder: Encoder, px: int) -> dict[str, float]:
        """Percent each."""
        linear, nearest = classification(encoder, *self.caltech, px, CLASSES)
        return {
            "CamVid mIoU": segmentation(encoder, *self.camvid, px, CAMVID_CLASSES, CAMVID_VOID),
            "VOC animals mIoU": segmentation(encoder, *self.voc, px, VOC_CLASSES, VOC_VOID, VOC_SCORED),
            "Caltech linear": linear,
            "Caltech k-NN": nearest,
        }
