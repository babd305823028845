"""Where the samples of a webdataset tar lie, found once, so that any of them can be read without the others.

A sample is the members that share a path up to the first dot of the file name: `0001.jpg`, `0001.txt`, `0001.json`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT = 2  # of the cached file; another number is read as no cache

PARTS = ("image", "txt", "json", "mask", "cls")
ENDINGS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    "txt": "txt",
    "json": "json",
    "mask.png": "mask",
    "cls": "cls",
}


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar, in the order of their first members.

    Attributes:
        keys: bytes [N], UTF-8: the path of each sample's members up to the first dot.
        spans: int64 [N, 5, 2], offset and size in bytes of the members `PARTS`; -1 where there is none.
        damage: what is wrong with the file, or ""; the samples before the damage are all there.
    """

    keys: NDArray[np.bytes_]
    spans: NDArray[np.int64]
    damage: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, number: int) -> str:
        """The name of a sample."""
        return bytes(self.keys[number]).decode(errors="replace")


def index_tar(path: Path) -> TarIndex:
    """Read the headers of a tar. Samples without an image are left out.

    Raises OSError if the file cannot be read at all. A file that is no plain tar comes back empty, with its damage.
    """
    size, damage, end = path.stat().st_size, "", 0
    spans: dict[str, list[tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and member.offset_data + member.size <= size:
                    _place(spans, member)
                end = tar.offset
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps an object for each member
    except tarfile.TarError as error:
        damage = str(error) if spans else f"no plain tar ({error})"
    if not damage:
        # tarfile takes both a missing end and a damaged header for the end.
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
        if end > size or not block:
            damage = f"cut off after {size} bytes"
        elif any(block):
            damage = f"no valid header at byte {end}"
    whole = {key: parts for key, parts in spans.items() if parts[0][0] >= 0}
    keys = np.array([key.encode() for key in whole], dtype=np.bytes_)
    return TarIndex(keys, np.array(list(whole.values()), dtype=np.int64).reshape(-1, len(PARTS), 2), damage)


def _place(spans: dict[str, list[tuple[int, int]]], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    key, _, ending = name.partition(".")
    part = ENDINGS.get(ending.lower())
    if part is None or not key:  # other files, and hidden ones such as the "._" twins that macOS leaves
        return
    where = f"{folder}/{key}" if folder else key
    spans.setdefault(where, [(-1, -1)] * len(PARTS))[PARTS.index(part)] = (member.offset_data, member.size)


def load_index(path: Path, cache: Path) -> TarIndex:
    """The index of a tar, from `cache` if the file has the size and time that it had when it was indexed.

    Of a file that is gone, or has lost samples to damage, the cached index is returned, so that the order of all
    other samples stays what it was. A cache that cannot be written is done without.

    Raises OSError if the file cannot be read and was never indexed.
    """
    kept = cache / "indices" / f"{path.stem}-{hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()}"
    kept = kept.with_name(f"{kept.name}.npz")
    cached = _read(kept)
    try:
        stat = path.stat()
    except FileNotFoundError:
        if cached is None:
            raise
        return cached[1]
    stamp = [FORMAT, stat.st_size, stat.st_mtime_ns]
    if cached is not None and cached[0] == stamp:
        return cached[1]
    index = index_tar(path)
    if index.damage and cached is not None and len(index) < len(cached[1]):
        return replace(cached[1], damage=index.damage)
    with suppress(OSError):  # a read-only or full disk costs time at the next start, nothing else
        _write(kept, stamp, index)
    return index


def _read(kept: Path) -> tuple[list[int], TarIndex] | None:
    try:
        with np.load(kept) as saved:
            stamp = saved["stamp"].tolist()
            return (
                (stamp, TarIndex(saved["keys"], saved["spans"], str(saved["damage"]))) if stamp[0] == FORMAT else None
            )
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile):
        return None


def _write(kept: Path, stamp: list[int], index: TarIndex) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=kept.parent, prefix=f".{kept.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, stamp=np.array(stamp), keys=index.keys, spans=index.spans, damage=np.array(index.damage))
        os.replace(temporary, kept)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
