"""Downloads into a cache: whole or not at all, once for all processes, given up where a server keeps us waiting."""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

from filelock import FileLock

TRIES = 3
WAIT = 1.0  # seconds before the second try, doubled for the third
TIMEOUT = 8.0  # seconds without a byte; after two of them a server is given up
WINDOW, SLOWEST = 10.0, 1024  # seconds, and the bytes a second below which a server is given up
MOST_BYTES = 1 << 37  # of one file, for servers that never end
AT_ONCE = 8  # downloads


class _SlowServer(OSError):
    """A server that is not worth another try."""


def fetch_all(urls: Sequence[str], folder: Path, most_failures: int) -> Iterator[tuple[Path, str]]:
    """The local file of each URL in order, and why it is not there, or "".

    Once more than `most_failures` have failed, the others are not tried. The threads do not keep the program alive:
    Ctrl-C ends it at once.
    """
    stop, failed = threading.Event(), [0]

    def one(url: str) -> tuple[Path, str]:
        path = folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{_base(url)}"
        try:
            if failed[0] > most_failures:
                raise OSError("not tried, as too many others failed")
            fetch(url, path, stop)
        except (OSError, ValueError, ImportError) as error:
            failed[0] += 1
            return path, f"cannot be fetched: {error}"
        return path, ""

    with ThreadPool(AT_ONCE) as pool:
        try:
            yield from pool.imap(one, urls)
        finally:
            stop.set()


def _base(url: str) -> str:
    return Path(urllib.parse.urlsplit(url).path).name[-100:] or "shard.tar"


def fetch(url: str, path: Path, stop: threading.Event | None = None) -> None:
    """Download `url` to `path` unless it is there; whole or not at all, once for all processes of this machine.

    http, https and file are read by the standard library, other schemes by fsspec and the plugin that it names.
    What an interrupted download left is overwritten by the next. Setting `stop` ends it at the next byte.

    Raises:
        OSError: the file cannot be had after three tries (one, if the server says that there is none, or sends less
            than a kilobyte a second), or written.
        ImportError, ValueError: fsspec does not know the scheme.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = 0
    with FileLock(path.with_name(f".{path.name}.lock")):
        for number in range(TRIES):
            if path.exists():  # another process was faster
                return
            try:
                _download(url, path, stop or threading.Event())
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                gone = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
                waited += "timed out" in str(error)
                if gone or number == TRIES - 1 or waited == 2 or isinstance(error, _SlowServer):
                    raise OSError(str(error) or type(error).__name__) from error
                time.sleep(WAIT * 2**number)


def _download(url: str, path: Path, stop: threading.Event) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            if urllib.parse.urlsplit(url).scheme in ("http", "https", "file"):
                with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                    promised = response.headers.get("Content-Length")
                    _copy(response.read1, file, stop)
                # a connection that breaks looks like the end of the file
                if promised is not None and str(file.tell()) != promised.strip():
                    raise OSError(f"{url} ended after {file.tell()} of {promised} bytes")
            else:
                import fsspec  # type: ignore[import-untyped]

                with fsspec.open(url, "rb") as remote:
                    _copy(remote.read, file, stop)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _copy(read: Callable[[int], bytes], file: IO[bytes], stop: threading.Event) -> None:
    """Copy to the end. Raises OSError for a server that sends too slowly or too much, or if stopped."""
    began, before = time.monotonic(), 0
    while content := read(1 << 20):
        file.write(content)
        if stop.is_set():
            raise _SlowServer("stopped")
        if file.tell() > MOST_BYTES:
            raise _SlowServer(f"more than {MOST_BYTES} bytes")
        if (now := time.monotonic()) - began > WINDOW:
            if file.tell() - before < SLOWEST * WINDOW:
                raise _SlowServer(f"less than {SLOWEST} bytes a second for {WINDOW:.0f} s")
            began, before = now, file.tell()
