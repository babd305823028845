"""Downloads into a cache: whole or not at all, once for all processes, given up where a server keeps us waiting."""

import hashlib
import http.client
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

from filelock import FileLock

TRIES = 3
WAIT = 1.0  # seconds before the second try, doubled for the third
TIMEOUT = 8.0  # seconds without a byte; after two of them a server is given up
WINDOW, SLOWEST = 10.0, 1024  # seconds, and the bytes a second below which a server is given up
POLL = 0.05  # seconds between looks at a download
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
        path = folder / f"{hashlib.blake2b(os.fsencode(url), digest_size=8).hexdigest()}-{_base(url)}"
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
    name = Path(urllib.parse.urlsplit(url).path).name.encode(errors="replace")[-100:]
    return name.decode(errors="ignore") or "shard.tar"


def fetch(url: str, path: Path, stop: threading.Event | None = None) -> None:
    """Download `url` to `path` unless it is there; whole or not at all, once for all processes of this machine.

    http, https and file are read by the standard library, other schemes by fsspec and the plugin that it names.
    What an interrupted download left is overwritten by the next. Setting `stop` ends it at once.

    Raises OSError if the file cannot be had after three tries (one, if the server says that there is none, or sends
    less than a kilobyte a second), or written; ImportError or ValueError if fsspec does not know the scheme.
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
                _download(url, path, stop)
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                gone = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
                waited += "timed out" in str(error)
                if gone or number == TRIES - 1 or waited == 2 or isinstance(error, _SlowServer):
                    raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
                time.sleep(WAIT * 2**number)


def _download(url: str, path: Path, stop: threading.Event | None) -> None:
    """Download in a thread of its own, which is left alone where a server keeps it: no call on sockets has an end that
    includes headers, encodings and redirections."""
    partial, unwanted = path.with_name(f".{path.name}.part"), threading.Event()
    ended = queue.SimpleQueue[BaseException | None]()

    def work() -> None:
        failure = None
        try:
            _copy(url, partial, unwanted)
        except BaseException as error:
            failure = error
        ended.put(failure)

    threading.Thread(target=work, daemon=True).start()
    try:
        began, before = time.monotonic(), 0
        while True:
            with suppress(queue.Empty):
                if error := ended.get(timeout=POLL):
                    raise error
                break
            if stop is not None and stop.is_set():
                raise _SlowServer("stopped")
            if (now := time.monotonic()) - began > WINDOW:
                size = partial.stat().st_size if partial.exists() else 0
                if size - before < SLOWEST * WINDOW:
                    raise _SlowServer(f"less than {SLOWEST} bytes a second for {WINDOW:.0f} s")
                began, before = now, size
        os.replace(partial, path)
    finally:
        unwanted.set()
        partial.unlink(missing_ok=True)


def _copy(url: str, partial: Path, unwanted: threading.Event) -> None:
    """Raises OSError for a file that is not whole, or too large, and what the scheme's reader raises."""
    with partial.open("wb", buffering=0) as file:
        if urllib.parse.urlsplit(url).scheme in ("http", "https", "file"):
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                if response.status not in (200, None):
                    raise OSError(f"the server answers {response.status}, not with a whole file")
                promised = response.headers.get("Content-Length")
                _copy_bytes(response.read1, file, unwanted)
            # a connection that breaks looks like the end of the file
            if promised is not None and str(file.tell()) != promised.strip():
                raise OSError(f"{url} ended after {file.tell()} of {promised} bytes")
        else:
            import fsspec  # type: ignore[import-untyped]

            with fsspec.open(url, "rb") as remote:
                _copy_bytes(remote.read, file, unwanted)


def _copy_bytes(read: Callable[[int], bytes], file: IO[bytes], unwanted: threading.Event) -> None:
    while (content := read(1 << 20)) and not unwanted.is_set():
        file.write(content)
        if file.tell() > MOST_BYTES:
            raise _SlowServer(f"more than {MOST_BYTES} bytes")
