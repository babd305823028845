"""Resolve a source (path, glob, brace pattern or URL) to local files. URLs are downloaded once."""

import glob
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.progress import track

from ..terminal import PlainConsole
from .fetch import fetch_all

Item = TypeVar("Item")

ACCEPTED = "a folder of images or of tars, a tar, a pattern such as shard-{000..012}.tar, or a URL of one"
MOST_NAMES = 300_000  # most names in a brace pattern; the largest public datasets have some 230,000 shards


@dataclass(frozen=True)
class Shard:
    """A tar file: its name with patterns expanded, its local path, and the reason why it is missing, or ""."""

    name: str
    path: Path
    problem: str = ""


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder of downloaded shards and indices: `given`, else $XDG_CACHE_HOME/cgspn/data or ~/.cache/cgspn/data."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cgspn" / "data"


def expand_braces(pattern: str) -> list[str]:
    """Expand `a-{08..10}.tar` to a-08.tar, a-09.tar, a-10.tar and `{x,y}.tar` to x.tar, y.tar, also several in a name.

    Raises ValueError for a descending range, braces with neither form, or more than `MOST_NAMES` names.
    """
    count = 1
    choices: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        inner = text[1:-1]
        if not text.startswith("{"):
            choices.append([text])
        elif found := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            first, last = found.groups()
            if int(last) < int(first):
                raise ValueError(f"{pattern!r}: the range {text} runs backwards")
            width = len(first) if (len(first) > 1 and first[0] == "0") or len(first) == len(last) else 0
            count *= int(last) - int(first) + 1
            _check_count(count, pattern)
            choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        elif "," in inner:
            choices.append(inner.split(","))
        else:
            raise ValueError(f"{pattern!r}: {text} is neither a range {{000..009}} nor a list {{a,b}}")
    _check_count(math.prod(map(len, choices)), pattern)
    return ["".join(parts) for parts in itertools.product(*choices)]


def _check_count(count: int, pattern: str) -> None:
    if count > MOST_NAMES:
        raise ValueError(f"{pattern!r} names too many files; accepted: at most {MOST_NAMES}")


def is_url(source: str) -> bool:
    """Whether a source is a URL and not a path with a Windows drive letter."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source) is not None


def locate(source: str, cache: Path, max_skipped: float = 1.0) -> list[Shard]:
    """The shards of a source in order. URLs are downloaded to `cache` unless they are there.

    A missing shard of a URL, or of several in a brace pattern, is returned with its `problem`. A glob matches only
    existing files, so it cannot detect missing ones, and it does not follow links to folders. The longest existing part
    of a path is taken literally, including brackets and braces. max_skipped: largest fraction of URLs that may fail
    before the remaining ones are not tried.

    Raises ValueError for an invalid brace pattern, and FileNotFoundError for a missing path or a glob without matches.
    """
    if is_url(source):
        names = expand_braces(source)
        fetched = fetch_all(names, cache / "shards", int(max_skipped * len(names)))
        found = shown(fetched, "fetching shards", len(names))
        return [Shard(name, path, problem) for name, (path, problem) in zip(names, found)]
    base, pattern = _split(source)
    names = expand_braces(pattern)
    if len(names) == 1 and not (glob.has_magic(names[0]) or os.path.exists(base / names[0])):
        raise FileNotFoundError(f"{source}: no such file or folder; accepted: {ACCEPTED}")
    shards = []
    for name in names:
        if not glob.has_magic(name) or (base / name).exists():
            shards.append(shard_of(base / name))
            continue
        matches = sorted(path for path in base.glob(name) if not path.name.startswith(".") and path.is_file())
        if not matches:
            raise FileNotFoundError(f"no file matches {base / name}")
        shards += [shard_of(path) for path in matches]
    return shards


def _split(source: str) -> tuple[Path, str]:
    """Split a path into its longest leading part that exists, which is not a pattern, and the pattern after it."""
    path = Path(os.path.expanduser(source))
    base = next(folder for folder in (path, *path.parents) if os.path.exists(folder) or folder == folder.parent)
    return base, "" if base == path else str(path.relative_to(base))


def shard_of(path: Path) -> Shard:
    """A shard for a local file, with a `problem` if the file is missing."""
    return Shard(str(path), path, "" if path.is_file() else "no file" if path.exists() else "no such file")


def tars_in(folder: Path) -> list[Shard]:
    """The tars in a folder, sorted by name. The folder's own path is not treated as a pattern."""
    return [shard_of(path) for path in sorted(folder.glob("*.tar")) if not path.name.startswith(".")]


def shown(work: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield items with a progress bar on standard error, which is removed at the end."""
    console = PlainConsole(stderr=True)
    yield from track(work, title, total, console=console, transient=True, disable=not console.is_terminal)
