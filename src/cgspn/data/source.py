"""Open the images that a command names: the embedded images, a folder or shards."""

from pathlib import Path

import torch

from .embedded import Split, load_embedded
from .folder import load_folder
from .image_set import ImageSet
from .locate import cache_folder, is_url, tars_in
from .samples import SampleSource, open_folder
from .shards import index_shards, open_shards
from .transforms import LUMA

EMBEDDED = "embedded"


def load_images(source: str | Path, size: tuple[int, int], channels: int, split: Split) -> ImageSet:
    """Load images for an encoder with `channels` input channels, 1 or 3, to which they are converted if necessary.

    Args:
        source: "embedded", or a folder of images, directly or in one sub-folder per class.
        size: height and width to which the images of a folder are resized; the embedded images keep their size.
        split: split of the embedded images; not used for a folder.


    Raises the errors of `load_folder`, and ValueError for another number of channels. Unreadable files are skipped,
    counted and reported on standard error.
    """
    if channels not in (1, 3):
        raise ValueError(f"the encoder takes {channels} channels; accepted: 1 or 3")
    images = load_embedded(split) if str(source) == EMBEDDED else load_folder(source, size)[0]
    given = images.images.shape[1]
    if given == channels:
        return images
    if channels == 3:
        return ImageSet(images.images.expand(-1, 3, -1, -1), images.labels, images.class_names)
    grey = torch.stack([_grey(image) for image in images.images])  # one by one: a float copy of all is large
    return ImageSet(grey, images.labels, images.class_names)


def open_samples(source: str, *, cache: Path | None = None, max_skipped: float = 0.1) -> SampleSource:
    """Open a source whose images are read during training.

    source: a folder of images or of shards, or shards: a path, a pattern or a URL (`open_shards`). cache: folder for
    downloaded shards and indices; None for the user's cache folder. max_skipped: as in `open_shards`.

    Raises FileNotFoundError, NotADirectoryError or ValueError like `open_shards` and `load_folder`.
    """
    path = Path(source).expanduser()
    if is_url(source) or not path.is_dir():
        return open_shards(source, cache_folder(cache), max_skipped)
    if tars := tars_in(path):
        return index_shards(source, tars, cache_folder(cache), max_skipped)
    return open_folder(path)


def _grey(image: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMA)[:, None, None]
    return (image * weights).sum(0, keepdim=True).round().to(torch.uint8)
