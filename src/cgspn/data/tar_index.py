"""An index of the samples in a webdataset tar, for random access.

A sample consists of the members with the same path up to the first dot of the file name: `0001.jpg`, `0001.txt`,
`0001.json`.
"""

import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.checkpoint import write_atomically
from .folder import SUFFIXES
from .opening import MOST_BYTES, MOST_TEXT
from .tar import LONGEST_NAME, Member, TarDamage, members

FORMAT = 5  # version of the cached file; other versions are ignored

PARTS = ("image", "txt", "json", "mask", "cls")
IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
ENDINGS = {**dict.fromkeys(IMAGES, "image"), "txt": "txt", "json": "json", "mask.png": "mask", "cls": "cls"}
NO_IMAGE = f"no image (looked for {', '.join(sorted(IMAGES))})"
DOTS = "its name has more than one dot; a sample's name ends at the first"
TAKEN = "another file has its name"
NAMED = 1000  # most left-out samples that are named; the others are only counted


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar, in the order of their first members.

    Attributes:
        names: uint8 [total], the concatenated sample names (paths up to the first dot).
        ends: int64 [N], where each name ends in `names`.
        spans: int64 [N, 5, 2], offset and size in bytes of the members `PARTS`; -1 if missing.
        damage: the damage of the file, or "". All samples before it are indexed.
        left_out: name and reason of the first `NAMED` unusable files and samples; there are `unnamed` more.
    """

    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    spans: NDArray[np.int64]
    damage: str = ""
    left_out: tuple[tuple[str, str], ...] = ()
    unnamed: int = 0

    def __len__(self) -> int:
        return len(self.spans)


def shown_name(name: bytes) -> str:
    """A name for messages, truncated if long."""
    text = name[:200].decode(errors="backslashreplace")
    return text if len(name) <= 200 else f"{text}... ({len(name)} bytes)"


def index_tar(path: Path) -> TarIndex:
    """Read the headers of a tar. Samples without an image are left out, and counted.

    Raises OSError if the file cannot be read. A file that is not a plain tar gives an empty index with its damage.
    """
    size, damage, found = path.stat().st_size, "", _Samples()
    with path.open("rb") as file:
        try:
            for member in members(file, size):
                if member.offset + member.size <= size:
                    found.place(member)
        except TarDamage as error:
            damage = str(error) if found.any else f"no plain tar ({error})"
    return found.index(damage)


class _Samples:
    """Collector of the members of samples."""

    def __init__(self) -> None:
        self.any = False
        self.spans: dict[bytes, list[tuple[int, int]]] = {}
        self.others: dict[bytes, list[tuple[str, str]]] = {}  # unusable files, with reasons
        self.left_out: list[tuple[str, str]] = []
        self.count = 0

    def place(self, member: Member) -> None:
        self.any = True
        folder, slash, name = member.name.rpartition(b"/")
        stem, _, ending = name.partition(b".")
        if not stem or not ending:  # hidden files, such as macOS's "._" files, and files like README
            return
        key, last = folder + slash + stem, ending.lower().decode("latin-1")
        if (part := ENDINGS.get(last)) is None:
            others, dots = self.others.setdefault(key, []), last.rpartition(".")[2] in IMAGES
            if dots or not others:
                others.append((shown_name(member.name), DOTS if dots else NO_IMAGE))
            return
        spans = self.spans.setdefault(key, [(-1, -1)] * len(PARTS))
        reason = _unusable(member, MOST_TEXT if part in ("txt", "json", "cls") else MOST_BYTES) or (
            TAKEN if spans[PARTS.index(part)][0] >= 0 else ""
        )
        if not reason:
            spans[PARTS.index(part)] = (member.offset, member.size)
        elif part == "image" or reason != TAKEN:
            self.leave_out(shown_name(member.name), reason)
            self.others.setdefault(key, [])

    def leave_out(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.left_out) < NAMED:
            self.left_out.append((name, reason))

    def index(self, damage: str) -> TarIndex:
        whole = {key: parts for key, parts in self.spans.items() if parts[0][0] >= 0}
        for key in self.spans:
            if key not in whole and key not in self.others:
                self.leave_out(shown_name(key), NO_IMAGE)
        for key, others in self.others.items():
            for name, reason in others if key not in whole else ():
                self.leave_out(name, reason)
        names = np.frombuffer(b"".join(whole), dtype=np.uint8)
        ends = np.cumsum([len(name) for name in whole], dtype=np.int64)
        spans = np.array(list(whole.values()), dtype=np.int64).reshape(-1, len(PARTS), 2)
        return TarIndex(names, ends, spans, damage, tuple(self.left_out), self.count - len(self.left_out))


def _unusable(member: Member, most: int) -> str:
    if len(member.name) > LONGEST_NAME:
        return f"a name of {len(member.name)} bytes; accepted: {LONGEST_NAME}"
    if member.size > most:
        return f"{member.size} bytes; accepted: {most}"
    return member.odd


def load_index(path: Path, cache: Path) -> TarIndex:
    """The index of a tar, from `cache` if the file has the same size and time as when it was indexed.

    For a file that is now missing or damaged, the cached index is returned, so that the order of all other samples does
    not change. A damaged or unwritable cache is ignored.

    Raises OSError if the file cannot be read and was never indexed.
    """
    place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    kept = cache / "indices" / f"{path.stem}-{place}.index"
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
    with suppress(OSError):  # without a cache the next start indexes again
        _write(kept, stamp, index)
    return index


def _read(kept: Path) -> tuple[list[int], TarIndex] | None:
    try:
        whole = kept.read_bytes()
        digest, content = whole[:32], whole[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            damage, left_out, unnamed = json.loads(saved["words"].tobytes())
            texts = damage, tuple(map(tuple, left_out)), unnamed
            stamp, index = saved["stamp"].tolist(), TarIndex(saved["names"], saved["ends"], saved["spans"], *texts)
        return (stamp, index) if stamp[0] == FORMAT else None
    # for a missing or damaged file, NumPy and zipfile raise a dozen kinds of errors
    except Exception:
        return None


def _write(kept: Path, stamp: list[int], index: TarIndex) -> None:
    words = np.frombuffer(json.dumps([index.damage, index.left_out, index.unnamed]).encode(), dtype=np.uint8)
    held = io.BytesIO()
    np.savez(held, stamp=stamp, names=index.names, ends=index.ends, spans=index.spans, words=words)
    write_atomically(kept, hashlib.sha256(held.getvalue()).digest() + held.getvalue())
