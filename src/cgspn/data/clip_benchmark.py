"""The layout of CLIP-benchmark's webdatasets: classnames.txt beside test/0.tar, test/1.tar and so on.

Source: https://github.com/LAION-AI/CLIP_benchmark, its webdataset export.
"""

import os
from pathlib import Path

from .locate import MOST_NAMES, cache_folder, shard_of, tars_in
from .opening import read_bytes
from .shards import ShardSet, index_shards

SPLIT = "test"
COUNT = "nshards.txt"
MOST_BYTES = 1 << 24  # of a text file


def is_clip_benchmark(root: Path) -> bool:
    """Whether a folder has this layout: tars in test/, or a file there that says how many tars there are."""
    split = root / SPLIT
    return os.path.isdir(split) and ((split / COUNT).is_file() or any(split.glob("*.tar")))


def open_benchmark_shards(root: Path) -> ShardSet:
    """Open the samples of the test split.

    Raises ValueError if nshards.txt holds no number, and the errors of `open_shards`, which name missing shards.
    """
    split, count = root / SPLIT, root / SPLIT / COUNT
    if not count.is_file():
        return index_shards(str(split), tars_in(split), cache_folder())
    said = read_lines(count, "the number of tars")[0][:32]
    if not (said.isascii() and said.isdigit() and 1 <= int(said) <= MOST_NAMES):
        raise ValueError(f"{count} holds {said!r}; expected the number of tars, 1 to {MOST_NAMES}")
    return index_shards(str(split), [shard_of(split / f"{number}.tar") for number in range(int(said))], cache_folder())


def read_lines(path: Path, what: str) -> list[str]:
    """The non-empty lines of a text file.

    Raises FileNotFoundError or ValueError, saying that `what` was expected, if there are none, and OSError if the file
    is too large.
    """
    try:
        # some editors write a byte order mark, which is not part of the first line
        lines = read_bytes(path, MOST_BYTES).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; expected {what}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no lines; expected {what}")
    return found
