"""Opening of untrusted image files, with limits for Pillow."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Those that are read. Pillow knows others, of which PostScript starts a program on what the file holds."""
MOST_PIXELS = 1 << 26  # of an image: 256 MiB, since Pillow uses four bytes per RGB pixel
MOST_PHOTOGRAPHED = 1 << 27  # of a JPEG, which the decoder can shrink; more than any camera has
MOST_BYTES = 1 << 28  # of a file
MOST_TEXT = 1 << 20  # bytes of a caption or another text
MOST_METADATA = 1 << 24  # bytes that may be read before the image size is known
MOST_READS = (1 << 13, 1 << 18)  # reads of a file before its size is known, and in total
MOST_SCANNED = 1 << 31  # pixels in all scans of a progressive JPEG, which take some seconds
TILE = (0x0142, 0x0143)  # tags of a TIFF: width and height of its tiles


@contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image within the context, without decoding it.

    Raises OSError or ValueError for a damaged image, and OSError for other files, formats not in `FORMATS`, files and
    images that are too large, and files that would take too long (metadata in a million parts, endless scans).
    """
    if isinstance(file, Path):
        check_file(file)
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as content:
            counted = _Counted(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about size, which is limited here, and odd metadata
                image = Image.open(counted, formats=FORMATS)  # type: ignore[arg-type]
            _check_size(image, content)
            counted.reads, counted.room = MOST_READS[1], MOST_BYTES
            yield image
    except UnidentifiedImageError as error:  # its message would name a Python object
        name = f": {file}" if isinstance(file, Path) else ""
        raise OSError(f"not an image, or not one of the formats {', '.join(FORMATS)}{name}") from error
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # decoders raise all kinds of errors: SyntaxError, struct.error, assertions
        raise OSError(f"damaged: {type(error).__name__}: {error}") from error


def _check_size(image: Image.Image, file: IO[bytes]) -> None:
    """Raise OSError for an image that would need too much memory or time."""
    pixels, most = image.width * image.height, MOST_PHOTOGRAPHED if is_jpeg(image) else MOST_PIXELS
    if pixels > most:
        raise OSError(f"{image.width} x {image.height} pixels; accepted: {most} in all")
    width, height = (getattr(image, "tag_v2", {}).get(tag, 1) for tag in TILE)
    if width * height > max(pixels, 1 << 22):  # the decoder holds one tile
        raise OSError(f"tiles of {width} x {height} pixels for a picture of {image.width} x {image.height}")
    if image.info.get("progressive"):
        at = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(at)
        if scans * pixels > MOST_SCANNED:
            raise OSError(f"{scans} scans of {pixels} pixels; accepted: {MOST_SCANNED} in all")


def is_jpeg(image: Image.Image) -> bool:
    """Whether an image is a JPEG, also one of several in a file."""
    return image.format in ("JPEG", "MPO")


class _Counted:
    """A file that raises an error after too many reads, or after too many bytes of partial reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read, self.seek, self.tell = file.read, file.seek, file.tell
        self.reads, self.room = MOST_READS[0], MOST_METADATA

    def read(self, size: int = -1) -> bytes:
        content = self._read(size)
        self.reads -= 1
        self.room -= len(content) if size >= 0 else 0
        if self.reads < 0 or self.room < 0:
            raise OSError("it has too many metadata segments")
        return content


def check_file(path: Path, most: int = MOST_BYTES) -> None:
    """Raise OSError unless the path is a regular file of at most `most` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if (size := path.stat().st_size) > most:
        raise OSError(f"{path} has {size} bytes; accepted: {most}")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises OSError like `check_file`, or if it cannot be read."""
    check_file(path, most)
    return path.read_bytes()
