"""A folder of image files as an `ImageSet`; files that cannot be read are skipped, counted and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from .image_set import ImageSet

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings, in any case, of the files that are read; others are no images and are passed over in silence."""

SHOWN = 10  # names in a message; the report object has them all


@dataclass(frozen=True)
class Skipped:
    """What `load_folder` could not read.

    Attributes:
        files: path and reason of each, in the order of reading.
        total: image files that were tried.
    """

    files: tuple[tuple[Path, str], ...]
    total: int

    def __len__(self) -> int:
        return len(self.files)

    def summary(self) -> str:
        """A line for the count and one for each file, the first ten by name."""
        lines = [f"skipped {len(self)} of {self.total} image files that could not be read:"]
        lines += [f"  {path}: {reason}" for path, reason in self.files[:SHOWN]]
        if len(self) > SHOWN:
            lines.append(f"  and {len(self) - SHOWN} more")
        return "\n".join(lines)


def load_folder(
    path: str | Path,
    size: int | tuple[int, int],
    *,
    crop: bool = True,
    max_skipped_fraction: float = 0.1,
) -> tuple[ImageSet, Skipped]:
    """Read a folder of images: one sub-folder for each class, or flat (one class, named after the folder).

    Files are taken in the order of their names, from sub-folders at any depth; hidden files and folders are passed
    over. Photographs are turned as their Exif orientation says; transparent pixels become white; palettes, CMYK and
    16-bit grey are converted; of an animation the first frame is taken. If files were skipped, the report is printed
    once, on standard error.

    Args:
        path: the folder.
        size: height and width of all images, or one number for both.
        crop: True keeps the aspect ratio and cuts the middle, False squeezes the whole image into `size`.
        max_skipped_fraction: largest share of unreadable files that is put up with, 0 to 1.

    Returns:
        The set, images uint8 [N, 3, h, w], and the report of what was skipped (empty if nothing was).

    Raises:
        FileNotFoundError: no such folder, or no image files in it.
        NotADirectoryError: a file, not a folder.
        ValueError: `size` or the fraction out of range, images both in sub-folders and beside them, or too many
            unreadable files.
    """
    root = Path(path)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size is {size!r}; expected a positive int, or (height, width) of two")
    if not 0 <= max_skipped_fraction <= 1:
        raise ValueError(f"max_skipped_fraction is {max_skipped_fraction}; accepted: 0 to 1")
    names, files = _list(root)

    # Straight into place: a list of images and a stack would need the memory twice.
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    labels: list[int] = []
    bad: list[tuple[Path, str]] = []
    for file, label in files:
        try:
            images[len(labels)] = _read(file, height, width, crop)
            labels.append(label)
        # Decoders raise all kinds of errors on damaged files: OSError, SyntaxError, ValueError, struct.error, ...
        except Exception as error:
            bad.append((file, f"{type(error).__name__}: {error}"))
            if len(bad) > max_skipped_fraction * len(files):
                raise ValueError(
                    f"{root}: more than {max_skipped_fraction:.0%} of its {len(files)} image files cannot be read "
                    f"(max_skipped_fraction), among them {', '.join(str(b) for b, _ in bad[:3])}"
                ) from error
    skipped = Skipped(tuple(bad), len(files))
    if skipped:
        Console(stderr=True).print(f"{escape(str(root))}: {escape(skipped.summary())}", highlight=False, soft_wrap=True)
    if not labels:
        raise ValueError(f"{root}: none of its {len(files)} image files can be read")
    # The clone lets go of the rows that skipped files left over.
    kept = images if not skipped else images[: len(labels)].clone()
    return ImageSet(kept, torch.tensor(labels, dtype=torch.int64), names), skipped


def _list(root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and files with their labels."""
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"not a folder: {root}")
    children = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    loose = [p for p in children if _is_image(p)]
    folders = [(p.name, sorted(_walk(p))) for p in children if p.is_dir()]
    folders = [(name, files) for name, files in folders if files]
    if loose and folders:
        raise ValueError(
            f"{root} holds images ({loose[0].name}, ...) beside sub-folders with images ({folders[0][0]}, ...); "
            "expected all of them in sub-folders, one for each class, or none"
        )
    if loose:
        folders = [(root.resolve().name, loose)]
    if not folders:
        raise FileNotFoundError(f"no image files in {root} (looked for {', '.join(sorted(SUFFIXES))})")
    return tuple(name for name, _ in folders), [(f, k) for k, (_, files) in enumerate(folders) for f in files]


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif _is_image(path):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _read(file: Path, height: int, width: int, crop: bool) -> Tensor:
    """uint8 [3, height, width]."""
    with Image.open(file) as opened:
        # JPEG decoders can shrink by 2, 4 or 8 for free; twice the size wanted leaves the quality to the resize.
        opened.draft("RGB", (2 * max(height, width),) * 2)
        image = _to_rgb(ImageOps.exif_transpose(opened))
    if crop:
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow opens as "I;16" or "I" and would clip at 255 instead of scaling.
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values outside 0..65535")
        return Image.fromarray((grey.astype(np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey values, whose range is not known")
    if image.has_transparency_data:
        # Over white, as pages show it; dropping alpha would uncover whatever colour was saved under it.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
