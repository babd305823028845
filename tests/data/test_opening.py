"""Pictures made to take memory or time: refused before they do."""

import io
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from cgspn.data.decode import read_box, to_rgb, whole
from cgspn.data.opening import open_image


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side, color=0, depth=8, extra=b"", pixels=None):
    row = bytes(1 + side * {0: 1, 2: 3, 6: 4}[color] * depth // 8)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0))
    return head + extra + chunk(b"IDAT", pixels or zlib.compress(row * side)) + chunk(b"IEND", b"")


def jpeg(extra=b""):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return out.getvalue()[:2] + extra + out.getvalue()[2:]


def progressive(scans):
    """A JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.new("L", (6000, 6000), 128).save(out, "JPEG", progressive=True)
    content = out.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * scans + content[-2:]


def tiff(side, tile):
    """A grey picture in one tile of another size."""
    content = zlib.compress(bytes(16))
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(content))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


GIF = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0xF7, 0, 0) + bytes(768)
BOMBS = {
    "pixels": png(1, pixels=b"").replace(struct.pack(">II", 1, 1), struct.pack(">II", 9000, 9000)),
    "far more pixels": b"P5 100000 100000 255\n",
    "scans": progressive(80),
    "a tile larger than the picture": tiff(16, 30000),
    "chunks": png(8, extra=chunk(b"abCd", b"") * 100_000),
    "empty parts of pixels": png(8)[:-12] + chunk(b"IDAT", b"") * 150_000,
    "segments": jpeg(b"\xff\xfe\0\2" * 500_000),
    "a comment in blocks": GIF + b"!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0",
    "a comment of one byte a read": b"P5 #" + b"a" * 100_000 + b"\n8 8 255\n" + bytes(64),
    "metadata": jpeg((b"\xff\xe1\xff\xfeExif\0\0" + bytes(65526)) * 300),
    "text that expands": png(8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
    "no image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_takes_much_is_refused_soon(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(BOMBS[kind])
    began = time.process_time()
    with pytest.raises((OSError, ValueError)):
        read_box(path, (8, 8), whole)
    assert time.process_time() - began < 5


def test_odd_metadata_is_not_warned_about(tmp_path, recwarn):
    claims = b"".join(struct.pack("<HHII", 1000 + i, 7, 1 << 20, 8) for i in range(2000))
    exif = b"II*\0" + struct.pack("<IH", 8, 2000) + claims
    (tmp_path / "x.png").write_bytes(png(8, extra=chunk(b"eXIf", exif)))
    assert read_box(tmp_path / "x.png", (8, 8), whole).shape == (8, 8, 3)
    assert not len(recwarn)


def test_usual_pictures_of_these_kinds_are_read(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "x.jpg", progressive=True, exif=bytes(10), comment=b"c" * 5000)
    Image.new("L", (50, 40), 7).save(tmp_path / "x.tif", tile=(256, 256))
    assert abs(read_box(tmp_path / "x.jpg", (2, 3), whole).astype(int) - [255, 0, 0]).max() < 5
    assert (read_box(tmp_path / "x.tif", (2, 3), whole) == 7).all()


def test_colours_are_converted_in_bands_as_they_are_at_once(monkeypatch):
    picture = Image.effect_noise((40, 30), 50).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((40, 30)))
    at_once = to_rgb(picture).tobytes()
    monkeypatch.setattr("cgspn.data.decode.BAND", 200)
    assert to_rgb(picture).tobytes() == at_once


def test_what_is_no_file_is_not_opened(tmp_path):
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("zero", "loop", "folder"):
        with pytest.raises(OSError, match=f"no such file: .*{name}"), open_image(Path(tmp_path / f"{name}.png")):
            pass
