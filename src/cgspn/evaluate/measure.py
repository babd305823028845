"""Zero-shot classification, retrieval and segmentation on datasets that are read image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.captions import class_captions
from ..data.labelled import CaptionedPictures, LabelledPictures, labels_of
from ..data.prepare import Picture, open_picture, picture_name, prepare_for, read_each
from ..data.segmentation_sets import IGNORE, SegmentationSet
from ..data.sizes import Size, check_pixels
from ..data.skipped import SkipCounter, Skipped
from ..models.config import EncoderConfig
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from .predict import embed_images, embed_texts, on_device
from .retrieval import Retrieval, retrieve, retrieve_captions
from .segmentation import Reader, Segmentation, fit_streamed, score_streamed
from .zeroshot import Accuracy, accuracy, class_embeddings

Watch = Callable[[int], None]
"""Called with the number of pictures that were dealt with since the last call."""

MAX_SKIPPED = 0.1  # largest tolerated fraction of unreadable images
GALLERY = 100  # images per retrieval with a class caption, since few captions over thousands of images say little


def embed_pictures(
    model: DualEncoder,
    pictures: Sequence[Picture],
    name: str,
    batch_size: int = 64,
    watch: Watch | None = None,
    max_skipped: float = MAX_SKIPPED,
    size: Size = None,
) -> tuple[Tensor, list[int], Skipped]:
    """Embed the readable images, at the encoder's native size or another.

    Returns:
        unit vectors float32 [n, D] on the CPU, the indices of the n images, and a report of skipped images.

    Raises ValueError if a larger fraction than `max_skipped` is unreadable, or for a size that is not a multiple of the
    patch size.
    """
    prepare = prepare_for(model.image.config, size)
    counter = SkipCounter(name, len(pictures), max_skipped)
    found = read_each(
        range(len(pictures)), lambda n: prepare(open_picture(pictures[n])), lambda n: picture_name(pictures[n]), counter
    )
    rows: list[Tensor] = []
    kept: list[int] = []

    def images() -> Iterator[Tensor]:
        for number, pixels in found:
            kept.append(number)
            yield pixels

    for part in embed_images(model, images(), batch_size):
        rows.append(part)
        if watch:
            watch(len(part))
    if watch:
        watch(len(pictures) - len(kept))  # skipped images count too
    if not kept:
        raise ValueError(f"{name}: none of its {len(pictures)} images can be read")
    return torch.cat(rows), kept, counter.report()


def zeroshot(model: DualEncoder, pictures: LabelledPictures, embeddings: Tensor, kept: Sequence[int]) -> Accuracy:
    """Zero-shot accuracy, from the result of `embed_pictures`."""
    classes = class_embeddings(lambda texts: embed_texts(model, texts), pictures.class_names, pictures.templates)
    return accuracy(embeddings, classes, labels_of(pictures, kept))


def caption_retrieval(
    model: DualEncoder, pictures: CaptionedPictures, embeddings: Tensor, kept: Sequence[int]
) -> Retrieval:
    """R@1, R@5 and R@10 in both directions, from the result of `embed_pictures`. Images may share a caption."""
    numbers: dict[str, int] = {}
    pairs = [
        (image, numbers.setdefault(text, len(numbers)))
        for image, number in enumerate(kept)
        for text in pictures.captions[number]
    ]
    return retrieve_captions(embeddings, embed_texts(model, list(numbers)), torch.tensor(pairs))


def class_retrieval(
    model: DualEncoder, embeddings: Tensor, labels: Tensor, class_names: Sequence[str]
) -> dict[str, float]:
    """R@1 in both directions with captions from class names. All images and captions of a class match.

    Captions are searched among about GALLERY random images, and recall is averaged over all such galleries.
    """
    captions = class_captions(labels, class_names)
    distinct = list(dict.fromkeys(captions))
    texts = embed_texts(model, distinct)
    # a caption matches all images of its class
    text_class = torch.stack([labels[captions.index(caption)] for caption in distinct])
    # random, since datasets are sorted by class or interleave classes
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    galleries = []
    for chosen in order.chunk(max(1, len(labels) // GALLERY)):
        present = torch.isin(text_class, labels[chosen])
        found = retrieve(embeddings[chosen], texts[present], labels[chosen], text_class[present])
        galleries.append(found.text_to_image[1])
    return {
        "image_to_text": retrieve(embeddings, texts, labels, text_class).image_to_text[1],
        "text_to_image": sum(galleries) / len(galleries),
    }


def segmentation(
    encoder: Encoder,
    train: SegmentationSet,
    test: SegmentationSet,
    *,
    size: tuple[int, ...] = (),
    scored: Sequence[int] = (),
    batch_size: int = 8,
    watch: Watch | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> tuple[Segmentation, list[Skipped]]:
    """Fit a linear probe on the final tokens of training images and evaluate it on test images.

    Only sums over tokens are stored, and masks are compared at full size. Images of one size share batches.

    Args:
        encoder: in eval mode, on any device.
        train, test: datasets of the same classes.
        size: image size in pixels: (height, width), (shorter side,), or () for the encoder's native shorter side. If
            the aspect ratio is kept, both sides are rounded to multiples of the patch.
        scored: classes whose IoU is averaged; all if empty. The probe learns all classes.
        batch_size: images per batch.
        watch: progress callback, called once for each image of both sets.
        max_skipped: largest tolerated fraction of unreadable images in each set.

    Returns the result, and the skipped images of each set.

    Raises ValueError for a size that is not a multiple of the patch, or if too many images cannot be read.
    """
    check_size(encoder.config, size)
    classes = len(train.class_names)
    counters = [
        SkipCounter(f"{part.name} ({what})", len(part), max_skipped)
        for what, part in (("train", train), ("test", test))
    ]
    read_train, read_test = (
        _reader(encoder, part, size, batch_size, counter, watch) for part, counter in zip((train, test), counters)
    )
    probe = fit_streamed(read_train, len(train), classes, ignore_index=IGNORE, scored=scored)
    result = score_streamed(probe, read_test, len(test), classes, ignore_index=IGNORE, scored=scored)
    return result, [counter.report() for counter in counters]


def check_size(config: EncoderConfig, size: tuple[int, ...]) -> None:
    """Raise ValueError for a size that `segmentation` does not accept."""
    if len(size) > 2 or any(side < config.patch_size for side in size):
        raise ValueError(
            f"size is {size}; expected a shorter side, or height and width, of {config.patch_size} or more"
        )
    if len(size) == 2 and any(side % config.patch_size for side in size):
        raise ValueError(f"size is {size}; expected multiples of the patch size, {config.patch_size}")
    if size:
        check_pixels(size[0], size[-1])


def size_for(config: EncoderConfig, height: int, width: int, size: tuple[int, ...]) -> tuple[int, int]:
    """The size, in multiples of the patch, to which an image of height x width is resized."""
    if len(size) == 2:
        return size[0], size[1]
    scale = (size[0] if size else min(config.image_size)) / min(height, width)
    patch = config.patch_size
    found = max(1, round(height * scale / patch)) * patch, max(1, round(width * scale / patch)) * patch
    check_pixels(*found)  # the image may be a strip
    return found


def _reader(
    encoder: Encoder,
    pictures: SegmentationSet,
    size: tuple[int, ...],
    batch_size: int,
    counter: SkipCounter,
    watch: Watch | None,
) -> Reader:
    config = encoder.config
    prepare = replace(prepare_for(config), size=None, crop=False, crop_pct=1.0)

    def read_one(number: int) -> tuple[Tensor, Tensor]:
        image, mask = pictures.read(number)
        resized = prepare.resized(image, *size_for(config, image.height, image.width, size))
        return prepare(resized), torch.from_numpy(mask)

    def read(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        found, done = read_each(numbers, read_one, pictures.picture_name, counter), 0
        for images, masks in _by_shape((pair for _, pair in found), batch_size):
            with torch.inference_mode():
                tokens = encoder(on_device(encoder, images)).tokens.float()
            yield tokens, masks.to(tokens.device)
            done += len(masks)
            if watch:
                watch(len(masks))
        if watch:
            watch(len(numbers) - done)  # skipped images count too

    return read


def _by_shape(pairs: Iterable[tuple[Tensor, Tensor]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and masks of equal size, out of order. The number of waiting images is bounded."""
    waiting: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    count = 0
    for image, mask in pairs:
        waiting.setdefault((image.shape, mask.shape), []).append((image, mask))
        count += 1
        fullest = max(waiting, key=lambda shape: len(waiting[shape]))
        if len(waiting[fullest]) >= batch_size or count >= 4 * batch_size:
            group = waiting.pop(fullest)
            count -= len(group)
            yield torch.stack([image for image, _ in group]), torch.stack([mask for _, mask in group])
    for group in waiting.values():
        yield torch.stack([image for image, _ in group]), torch.stack([mask for _, mask in group])
