"""Load a folder of image files as an `ImageSet`. Unreadable files are skipped, counted and named."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..terminal import warn
from .decode import middle, read_box, whole
from .image_set import ImageSet
from .skipped import Skipped

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings, in any case, of the files that are read; others are no images and are passed over in silence."""


def load_folder(
    path: str | Path, size: int | tuple[int, int], *, crop: bool = True, max_skipped_fraction: float = 0.1
) -> tuple[ImageSet, Skipped]:
    """Read a folder of images, either with one sub-folder per class or flat (one class, named after the folder).

    Files are read in the order of their names, from sub-folders at any depth; hidden files and folders are ignored.
    `read_box` describes how images are decoded. If files are skipped, a report is printed once on standard error.

    Args:
        size: height and width of all images, or one number for both.
        crop: True keeps the aspect ratio and takes a centre crop; False resizes the whole image to `size`.
        max_skipped_fraction: largest tolerated fraction of unreadable files, 0 to 1.

    Returns the image set, with images uint8 [N, 3, h, w], and the skipped files.


    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or no image files in it.
        ValueError: `size` or the fraction out of range, images both in sub-folders and beside them, or too many
            unreadable files.
    """
    root = Path(path)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size is {size!r}; expected a positive int, or (height, width) of two")
    if not 0 <= max_skipped_fraction <= 1:
        raise ValueError(f"max_skipped_fraction is {max_skipped_fraction}; accepted: 0 to 1")
    names, files = list_folder(root)

    # Decode into place, because a list and a stack would need twice the memory.
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    labels: list[int] = []
    bad: list[tuple[str, str]] = []
    choose = middle((height, width)) if crop else whole
    for file, label in files:
        try:
            images[len(labels)] = torch.from_numpy(read_box(file, (height, width), choose)).permute(2, 0, 1)
            labels.append(label)
        # Decoders raise all kinds of errors on damaged files: OSError, SyntaxError, ValueError, struct.error, ...
        except Exception as error:
            bad.append((str(file), f"{type(error).__name__}: {error}"))
            if len(bad) > max_skipped_fraction * len(files):
                raise ValueError(
                    f"{root}: more than {max_skipped_fraction:.0%} of its {len(files)} image files cannot be read "
                    f"(max_skipped_fraction), among them {', '.join(b for b, _ in bad[:3])}"
                ) from error
    skipped = Skipped(tuple(bad), len(files), "image files")
    if skipped:
        warn(f"{root}: {skipped.summary()}")
    if not labels:
        raise ValueError(f"{root}: none of its {len(files)} image files can be read")
    kept = images[: len(labels)].clone() if skipped else images  # drops the unused rows of skipped files
    return ImageSet(kept, torch.tensor(labels, dtype=torch.int64), names), skipped


def list_folder(root: Path, *, mixed: bool = False) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, image files and their labels, sorted by name.

    mixed: allow images both in sub-folders and beside them; they then have one class, as in a flat folder.

    Raises FileNotFoundError, NotADirectoryError or ValueError like `load_folder`.
    """
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"not a folder: {root}")
    children = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    loose = [p for p in children if _is_image(p)]
    top = root.resolve()
    below = [p for p in children if p.is_dir() and not (p.is_symlink() and _leads_back(p, {top}))]
    folders = [(p.name, sorted(_walk(p, top))) for p in below]
    folders = [(name, files) for name, files in folders if files]
    if loose and folders and mixed:
        loose, folders = sorted(_walk(root, top)), []
    if loose and folders:
        raise ValueError(
            f"{root} holds images ({loose[0].name}, ...) beside sub-folders with images ({folders[0][0]}, ...); "
            "expected all of them in sub-folders, one for each class, or none"
        )
    if loose:
        folders = [(root.resolve().name, loose)]
    if not folders:
        raise FileNotFoundError(f"no image files in {root} (looked for {', '.join(sorted(SUFFIXES))})")
    # as valid text, since names may hold bytes that are not UTF-8
    names = tuple(name.encode(errors="backslashreplace").decode() for name, _ in folders)
    return names, [(f, k) for k, (_, files) in enumerate(folders) for f in files]


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    """The images below a folder. Links to folders outside of `root` are followed, each target once."""
    seen, todo = {root}, [folder]
    while todo:
        for path in todo.pop().iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                if _is_image(path):
                    yield path
            elif not (path.is_symlink() and _leads_back(path, seen)):
                todo.append(path)


def _leads_back(link: Path, seen: set[Path]) -> bool:
    """Whether a link's target is visited anyway: it is inside the root, or inside or above an earlier target."""
    target = link.resolve()
    if any(target == known or known in target.parents or target in known.parents for known in seen):
        return True
    seen.add(target)
    return False


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
