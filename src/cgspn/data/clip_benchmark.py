"""The layout of CLIP-benchmark's webdatasets: classnames.txt beside test/0.tar, test/1.tar and so on.

Source: https://github.com/LAION-AI/CLIP_benchmark, its webdataset export.
"""

from __future__ import annotations

from pathlib import Path

from .locate import cache_folder
from .shards import ShardSet, open_shards

SPLIT = "test"
COUNT = "nshards.txt"


def is_clip_benchmark(root: Path) -> bool:
    """Whether a folder has the layout: tars in test/, or a file that says how many there are."""
    split = root / SPLIT
    return split.is_dir() and ((split / COUNT).is_file() or any(split.glob("*.tar")))


def open_benchmark_shards(root: Path) -> ShardSet:
    """The samples of the test split.

    Raises:
        ValueError: nshards.txt holds no number, or from `open_shards`, naming the shards that are lost.
        FileNotFoundError: no tar there.
    """
    count = root / SPLIT / COUNT
    if not count.is_file():
        return open_shards(str(root / SPLIT / "*.tar"), cache_folder())
    try:
        shards = int(count.read_text())
    except ValueError as error:
        raise ValueError(f"{count} holds {count.read_text()[:20]!r}; expected the number of tars") from error
    if shards < 1:
        raise ValueError(f"{count} says {shards} tars; expected at least 1")
    return open_shards(str(root / SPLIT / f"{{0..{shards - 1}}}.tar"), cache_folder())


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty. Raises FileNotFoundError saying `what` was expected there."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected {what}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return [line for line in lines if line]
