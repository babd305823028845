"""The image files of a folder, and their classes if they lie in a sub-folder for each."""

from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings, in any case, of the files that are read; others are no images and are passed over in silence."""


def list_folder(root: Path, *, mixed: bool = False) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, image files and their labels, sorted by name, from sub-folders at any depth.

    A flat folder has one class, named after it. Hidden files and folders are ignored. mixed: allow images both in
    sub-folders and beside them; all images then have one class.

    Raises FileNotFoundError or NotADirectoryError for a folder that is missing or without images, ValueError for images
    both in sub-folders and beside them unless `mixed`.
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
