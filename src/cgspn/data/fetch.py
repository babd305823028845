"""Downloads into a cache: atomic, once for all processes, and aborted if a server is too slow."""

import hashlib
import http.client
import os
import queue
import re
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
TIMEOUT = 8.0  # seconds without a byte; after two timeouts a download is aborted
WINDOW, SLOWEST = 10.0, 1024  # seconds, and bytes/s below which a download is aborted
POLL = 0.05  # seconds between checks of a download
MOST_BYTES = 1 << 37  # of one file, in case a server sends data forever
AT_ONCE = 8  # concurrent downloads


class _SlowServer(OSError):
    """Raised if a server is so slow that another attempt is useless."""


def fetch_all(urls: Sequence[str], folder: Path, most_failures: int) -> Iterator[tuple[Path, str]]:
    """The local path of each URL in order, with the reason why it is missing, or "".

    After more than `most_failures` failures the other URLs are not tried. The threads do not block Ctrl-C.
    """
    stop, failed = threading.Event(), [0]

    def one(url: str) -> tuple[Path, str]:
        path = folder / f"{hashlib.blake2b(os.fsencode(url), digest_size=8).hexdigest()}-{_base(url)}"
        try:
            if failed[0] > most_failures:
                raise OSError("not tried, because too many others failed")
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
    name = Path(re.split("[?#]", url.partition("://")[2])[0]).name.encode(errors="replace")[-100:]
    return name.decode(errors="ignore") or "shard.tar"


def fetch(url: str, path: Path, stop: threading.Event | None = None) -> None:
    """Download `url` to `path` unless it exists, atomically and once for all processes of this machine.

    The standard library reads http, https and file; fsspec and its plugins read other schemes. The next download
    overwrites the remains of an interrupted one. Setting `stop` ends a download.

    Raises OSError if writing or three attempts to download fail (one attempt if the server says that the file does not
    exist, or sends less than a kilobyte/s), and ImportError or ValueError if fsspec does not support the scheme.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = 0
    with FileLock(path.with_name(f".{path.name}.lock")):
        for number in range(TRIES):
            if path.exists():  # another process has downloaded it
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
    """Download in a separate thread, which is abandoned if the server hangs, because no socket timeout covers headers,
    encodings and redirects."""
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
    """Copy a URL to a file. Raises OSError if it is incomplete or too large, and the errors of the scheme's reader."""
    with partial.open("wb", buffering=0) as file:
        if urllib.parse.urlsplit(url).scheme in ("http", "https", "file"):
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                if response.status not in (200, None):
                    raise OSError(f"the server answers {response.status}, not with a whole file")
                promised = response.headers.get("Content-Length")
                _copy_bytes(response.read1, file, unwanted)
            # a broken connection looks like the end of the file
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
