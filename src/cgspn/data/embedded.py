"""The images included in the package: part of Fashion-MNIST (MIT licence, see fashion_mnist/LICENSE)."""

import hashlib
import json
from functools import cache
from importlib import resources
from typing import Literal, get_args

import torch

from .image_set import ImageSet

Split = Literal["train", "validation", "test"]

CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@cache
def load_embedded(split: Split) -> ImageSet:
    """Load the embedded set: grey images of clothes, 28x28, ten classes of the same size.

    19,200 training, 2,000 validation and 4,000 test images; test images come from the original test split. The classes
    are interleaved, so the first n images of a split are balanced too. The decoded set, images uint8 [N, 1, 28, 28], is
    cached: every call returns the same object, whose tensors must not be modified.

    Raises ValueError for an unknown split, and RuntimeError for damaged files or a Python without lzma.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017; subset by scripts/build_embedded.py.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; accepted: {', '.join(map(repr, get_args(Split)))}")
    try:
        import lzma
    except ImportError as error:
        raise RuntimeError("the embedded images need Python's lzma module, which is missing") from error

    folder = resources.files(__package__) / "fashion_mnist"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    try:
        raw = bytearray(lzma.decompress((folder / f"{split}.xz").read_bytes()))
    except lzma.LZMAError as error:
        raise RuntimeError(f"the embedded file {split}.xz is damaged ({error}); install the package again") from error
    if hashlib.sha256(raw).hexdigest() != manifest["splits"][split]["sha256"]:
        raise RuntimeError(f"the embedded file {split}.xz is damaged; reinstall the package")
    classes, h, w = manifest["classes"], manifest["height"], manifest["width"]
    # Stored as [class, n, column, row], which compresses best, and returned with interleaved classes.
    stored = torch.frombuffer(raw, dtype=torch.uint8).view(classes, -1, w, h)
    images = stored.permute(1, 0, 3, 2).reshape(-1, 1, h, w).contiguous()
    labels = torch.arange(classes).repeat(len(images) // classes)
    return ImageSet(images, labels, CLASS_NAMES)
