"""A reader of tar headers with bounded time and memory.

Python's tarfile reads headers of any length and follows negative sizes backwards without end (CVE-2025-8194,
CVE-2024-6232), so the headers of ustar, GNU and PAX archives are read here.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes of a long name or of PAX records
LONGEST_NAME = 4096  # bytes, the limit of Linux for a path

_LINKS = {b"1": "a hard link", b"2": "a symbolic link"}
_WITHOUT_CONTENT = b"123456"  # links, devices, folders and FIFOs have no content, whatever their size field says


class TarDamage(ValueError):
    """Raised if the rest of a tar cannot be read. The message says why."""


class Member(NamedTuple):
    """A file in a tar: its name, the place of its content, and the reason if that cannot be used ("" if it can)."""

    name: bytes
    offset: int
    size: int
    odd: str = ""


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the files and links of a tar of `size` bytes in order. Folders and devices are left out.

    Raises TarDamage at the first damaged or missing header, and OSError if the file cannot be read.
    """
    at, records = 0, dict[bytes, bytes]()
    while True:
        if at + BLOCK > size:
            raise TarDamage(f"cut off after {size} bytes" if size else "empty file")
        file.seek(at)
        block = file.read(BLOCK)
        if not any(block):
            return
        if not _is_header(block):
            raise TarDamage(f"no valid header at byte {at}")
        kind, length, start = block[156:157], _number(block[124:136], at), at + BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):  # they extend the next header, or all headers
            if length > LONGEST_HEADER:
                raise TarDamage(f"the header at byte {at} claims {length} bytes; accepted: {LONGEST_HEADER}")
            content = file.read(length)
            if kind in (b"x", b"X"):
                records |= _pax_records(content, at)
            elif kind == b"L":
                records[b"path"] = content.rstrip(b"\0")
            at = start + _padded(length)
            continue
        if (digits := records.get(b"size")) is not None:
            if not digits.isdigit() or len(digits) > 18:
                raise TarDamage(f"no valid size in the PAX records before byte {at}")
            length = int(digits)
        name = records.get(b"path") or _name(block)
        more = kind == b"S" and block[482]
        while more:  # the map of a GNU sparse file continues after the header
            block, start = file.read(BLOCK), start + BLOCK
            more = len(block) == BLOCK and block[504]
        if kind not in _WITHOUT_CONTENT:
            at = start + _padded(length)
        else:
            at, length = start, 0
        sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in records)
        records = {}
        if kind in _LINKS or sparse:
            yield Member(name, start, length, _LINKS.get(kind, "a sparse file"))
        elif kind in (b"\0", b"0", b"7") and not name.endswith(b"/"):
            yield Member(name, start, length)


def _is_header(block: bytes) -> bool:
    """Whether the checksum is correct: a sum of unsigned bytes, or of signed ones as some old programs compute it."""
    try:
        stated = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(rest)
    return stated in (total, total - 256 * sum(byte > 127 for byte in rest))


def _number(field: bytes, at: int) -> int:
    """A number in octal digits, or in base 256 if its first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False) & ~(0x80 << 8 * (len(field) - 1))
        if field[0] != 0x80 or value >> 63:
            raise TarDamage(f"the header at byte {at} claims a size below zero or beyond any file's")
        return value
    digits = field.split(b"\0")[0].strip() or b"0"
    if not all(48 <= digit < 56 for digit in digits):
        raise TarDamage(f"no valid size in the header at byte {at}")
    return int(digits, 8)


def _pax_records(content: bytes, at: int) -> dict[bytes, bytes]:
    """The relevant PAX records, from lines "LENGTH KEY=VALUE\\n"."""
    found, position = dict[bytes, bytes](), 0
    while position < len(content) and content[position]:
        space = content.find(b" ", position, position + 20)
        digits = content[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not digits.isdigit() or not space < end <= len(content) or not equals:
            raise TarDamage(f"no valid PAX record in the header at byte {at}")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            found[key] = value
        position = end
    return found


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
