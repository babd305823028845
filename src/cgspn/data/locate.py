"""From what a user calls a source (path, glob, brace pattern, URL) to local files; URLs are fetched once."""

from __future__ import annotations

import glob
import hashlib
import http.client
import itertools
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")

TRIES = 3
WAIT = 1.0  # seconds before the second try, doubled for the third
TIMEOUT = 60.0  # seconds without a byte
AT_ONCE = 8  # downloads


@dataclass(frozen=True)
class Shard:
    """A tar file to be read.

    Attributes:
        name: as the user wrote it, patterns expanded: a path or a URL.
        path: the local file, which may be missing.
        problem: why it is missing, or "".
    """

    name: str
    path: Path
    problem: str = ""


def cache_folder(given: str | Path | None = None) -> Path:
    """Where fetched shards and indices are kept: `given`, else $XDG_CACHE_HOME/cgspn/data or ~/.cache/cgspn/data."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cgspn" / "data"


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` to a-08.tar, a-09.tar, a-10.tar and `{x,y}.tar` to x.tar, y.tar; more than one may occur.

    Raises ValueError for a range that runs backwards or braces that hold neither.
    """
    pieces: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        inner = text[1:-1]
        if not text.startswith("{"):
            pieces.append([text])
        elif found := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
            first, last = found.groups()
            if int(last) < int(first):
                raise ValueError(f"{pattern!r}: the range {text} runs backwards")
            width = len(first) if (len(first) > 1 and first[0] == "0") or len(first) == len(last) else 0
            pieces.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        elif "," in inner:
            pieces.append(inner.split(","))
        else:
            raise ValueError(f"{pattern!r}: {text} is neither a range {{000..009}} nor a list {{a,b}}")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def is_url(source: str) -> bool:
    """Whether a source is a URL; a Windows drive letter is none."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source) is not None


def locate(source: str, cache: Path) -> list[Shard]:
    """The shards of a source, in order; URLs are fetched into `cache` unless they are there.

    A shard that a path, brace pattern or URL names and that cannot be had comes back with its `problem`. A glob names
    only what exists, so that it cannot notice a loss.

    Raises ValueError for a wrong brace pattern, FileNotFoundError for a glob that matches nothing.
    """
    names = expand_braces(source)
    if is_url(source):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            fetched = pool.map(lambda url: _fetched(url, cache), names)
            return list(shown(fetched, "fetching shards", len(names)))
    shards = []
    for name in names:
        path = Path(name).expanduser()
        if path.exists() or not glob.has_magic(name):
            shards.append(Shard(name, path, "" if path.is_file() else "no such file"))
            continue
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"no file matches {name}")
        shards += [Shard(match, Path(match)) for match in found]
    return shards


def shown(work: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Pass items on under a progress bar, on standard error and gone at the end."""
    console = Console(stderr=True)
    yield from track(work, title, total, console=console, transient=True, disable=not console.is_terminal)


def _fetched(url: str, cache: Path) -> Shard:
    base = Path(urllib.parse.urlsplit(url).path).name or "shard.tar"
    path = cache / "shards" / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{base}"
    try:
        fetch(url, path)
    except (OSError, ValueError, ImportError) as error:
        return Shard(url, path, f"cannot be fetched: {error}")
    return Shard(url, path)


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path` unless it is there; whole or not at all, once for all processes of this machine.

    http, https and file are read by the standard library, other schemes by fsspec and the plugin that it names.

    Raises:
        OSError: the file cannot be had after three tries (one, if the server says that there is none), or written.
        ImportError, ValueError: fsspec does not know the scheme.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        for number in range(TRIES):
            if path.exists():  # another process was faster
                return
            try:
                _download(url, path)
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                gone = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
                if gone or number == TRIES - 1:
                    raise OSError(str(error) or type(error).__name__) from error
                time.sleep(WAIT * 2**number)


def _download(url: str, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if urllib.parse.urlsplit(url).scheme in ("http", "https", "file"):
                with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                    shutil.copyfileobj(response, file, 1 << 20)
                    promised = response.headers.get("Content-Length")
                # a connection that breaks looks like the end of the file
                if promised is not None and file.tell() != int(promised):
                    raise OSError(f"{url} ended after {file.tell()} of {promised} bytes")
            else:
                import fsspec  # type: ignore[import-untyped]

                with fsspec.open(url, "rb") as remote:
                    shutil.copyfileobj(remote, file, 1 << 20)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
