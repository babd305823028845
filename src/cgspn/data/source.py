"""Open the images that a command names: a folder or shards."""

import os
from pathlib import Path

from .locate import cache_folder, is_url, tars_in
from .samples import SampleSource, open_folder
from .shards import index_shards, open_shards

EMBEDDED = "embedded"


def open_samples(source: str, *, cache: Path | None = None, max_skipped: float = 0.1) -> SampleSource:
    """Open a source whose images are read during training.

    source: a folder of images or of shards, or shards: a path, a pattern or a URL (`open_shards`). cache: folder for
    downloaded shards and indices; None for the user's cache folder. max_skipped: as in `open_shards`.

    Raises FileNotFoundError, NotADirectoryError or ValueError like `open_shards` and `list_folder`.
    """
    path = os.path.expanduser(source)  # unlike Path's, these functions have no errors, and "" is no folder
    if is_url(source) or not os.path.isdir(path):
        return open_shards(source, cache_folder(cache), max_skipped)
    if tars := tars_in(Path(path)):
        return index_shards(source, tars, cache_folder(cache), max_skipped)
    return open_folder(Path(path))
