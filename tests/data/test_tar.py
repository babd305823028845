"""Tars that are damaged or made to harm: each is its own damage, found in bounded time and memory."""

import io
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from shard_files import members, picture, write_shards, write_tar

from cgspn.data import open_shards
from cgspn.data import tar_index as tar_index_module
from cgspn.data.tar import LONGEST_HEADER
from cgspn.data.tar_index import index_tar, load_index


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def header(name, size=b"00000000000", kind=b"0"):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124 : 124 + len(size)], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes_is_found_where_tarfile_finds_it(tmp_path, kind):
    long = "folder/" * 12 + "n" * 60
    names = ["a.jpg", "b/c.png", "b/c.txt", "with space.webp", f"{long}.jpg"]
    names += ["café.jpg", "x" * 300 + ".jpg"] if kind != tarfile.USTAR_FORMAT else []
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        add(tar, "b", type=tarfile.DIRTYPE)
        for name in names:
            add(tar, name, name.encode(), mtime=1.5, pax_headers={"comment": "one"})
    index = index_tar(tmp_path / "x.tar")
    assert index.damage == ""
    with tarfile.open(tmp_path / "x.tar") as tar:
        wanted = [(m.offset_data, m.size) for m in tar if m.isreg() and not m.name.endswith(".txt")]
    assert [tuple(span[0]) for span in index.spans.tolist()] == wanted
    shards = open_shards(str(tmp_path / "x.tar"), tmp_path / "cache")
    assert [shards.name(i).split("x.tar: ")[1] for i in range(len(shards))] == [
        n.rsplit(".", 1)[0] for n in names if ".txt" not in n
    ] or (max(map(len, names)) > 200)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (header("neg.png", b"\xff" + (256**11 - 512).to_bytes(11, "big")), "below zero"),
        (header("huge.png", b"\x80" + b"\xff" * 11), "below zero or beyond"),
        (header("minus.png", b"-0000000512"), "no valid size"),
        (header("score.png", b"1_0        "), "no valid size"),
        (header("last.png", b"\x80\0\0\0" + (2**63 - 1).to_bytes(8, "big")), "cut off"),
        (header("././@PaxHeader", b"00000000015", b"x") + b"12 size=-512\n".ljust(512, b"\0"), "no valid PAX record"),
        (header("letters.png", b"0000000zz00"), "no valid size"),
        (header("././@PaxHeader", b"77777777777", b"x"), "claims 8589934591 bytes"),
        (header("././@LongLink", b"77777777777", b"L"), "claims 8589934591 bytes"),
        (header("././@PaxHeader", b"00000000020", b"x") + b"99 path=x\n".ljust(512, b"\0"), "no valid PAX record"),
        (
            header("././@PaxHeader", b"00000000020", b"x") + b"14 size=-512\n".ljust(512, b"\0") + header("a"),
            "no valid",
        ),
        (header("beyond.png", b"00077777777"), "cut off"),
        (b"\1" * 512, "no valid header"),
    ],
)
def test_headers_that_lie(tmp_path, block, reason):
    path = write_tar(tmp_path / "x.tar", members(range(3)))
    body = path.read_bytes().rstrip(b"\0")
    path.write_bytes(body + b"\0" * (-len(body) % 512) + block + b"\0" * 1024)
    index = index_tar(path)
    assert reason in index.damage
    assert len(index) == 3


def test_a_chain_of_extended_headers_is_read_without_recursion(tmp_path):
    record = header("././@PaxHeader", b"00000000013", b"x") + b"11 path=ab\n".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(record * 5000 + header("a.png") + b"\0" * 1024)
    assert index_tar(tmp_path / "x.tar").damage == ""


def test_one_long_name_costs_no_more_than_itself(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3000):
            add(tar, f"{i:06d}.png")
        add(tar, "L" * (LONGEST_HEADER - 1000) + ".png")
    tracemalloc.start()
    index = index_tar(tmp_path / "x.tar")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert len(index) == 3000
    assert "accepted: 4096" in index.left_out[0][1]


def test_names_that_are_not_utf8_are_samples_like_others(tmp_path):
    pattern = write_shards(tmp_path, 3)
    with tarfile.open(tmp_path / "shard-1.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "café.jpg", picture(1))
    shards = open_shards(pattern, tmp_path / "cache", 0)
    assert shards.name(10).endswith("shard-1.tar: caf\\xe9")
    assert shards.read(10).encoded == picture(1)


def test_every_sample_that_is_left_out_is_counted_with_its_reason(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("frame.01.jpg", "frame.02.jpg", "good.jpg", "good.depth.png", "good.jpg", "a.bmp", "b.GIF"):
            add(tar, name, name.encode())
        add(tar, "text.txt", b"alone")
        add(tar, "photo.avif", b"x")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(tar, "soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "nested.tar", b"x" * 512)
        add(tar, "._good.jpg", b"hidden")
        add(tar, "README", b"no sample")
    shards = open_shards(str(tmp_path / "x.tar"), tmp_path / "cache")
    assert [shards.name(i).split(": ")[1] for i in range(len(shards))] == ["good", "a", "b"]
    assert shards.read(0).encoded == b"good.jpg"
    reasons = {name.split(": ")[1]: reason for name, reason in shards.problems.files}
    assert reasons.keys() == {
        *("frame.01.jpg", "frame.02.jpg", "good.jpg", "text", "photo.avif", "hard.jpg", "soft.jpg", "nested.tar")
    }
    assert "more than one dot" in reasons["frame.01.jpg"]
    assert reasons["hard.jpg"] == "a hard link"
    assert reasons["soft.jpg"] == "a symbolic link"
    assert "no image" in reasons["photo.avif"]
    assert len(shards.problems) == 8
    # from the cache: the same
    assert open_shards(str(tmp_path / "x.tar"), tmp_path / "cache").problems == shards.problems


def test_sparse_and_endless_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.jpg", picture(1))
    with (tmp_path / "x.tar").open("r+b") as file:
        start = 512 + -(-len(picture(1)) // 512) * 512
        file.seek(start)
        file.write(header("hole.jpg", b"%011o" % (3 << 30)))
        file.truncate(start + 512 + (3 << 30) + 1024)
    index = index_tar(tmp_path / "x.tar")
    assert (len(index), index.damage) == (1, "")
    assert index.left_out == (("hole.jpg", f"{3 << 30} bytes; accepted: {1 << 28}"),)


def test_an_index_that_was_changed_is_made_again(tmp_path):
    path = write_tar(tmp_path / "x.tar", members(range(4)))
    good = load_index(path, tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "indices").iterdir()
    content = kept.read_bytes()
    for spans in (good.spans + 512, good.spans[:2], good.spans.astype(np.int32), good.spans.reshape(-1)):
        with np.load(io.BytesIO(content[32:])) as saved:
            arrays = {**saved, "spans": spans}
        np.savez(changed := io.BytesIO(), **arrays)
        kept.write_bytes(content[:32] + changed.getvalue())
        assert np.array_equal(load_index(path, tmp_path / "cache").spans, good.spans)
    for position in range(0, len(content), 97):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        kept.write_bytes(changed)
        assert np.array_equal(load_index(path, tmp_path / "cache").spans, good.spans)
    assert not list(kept.parent.glob(".*"))


def test_more_than_are_named_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index_module, "NAMED", 2)
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), *((f"{i}.avif", b"x") for i in range(5))])
    problems = open_shards(str(tmp_path / "x.tar"), tmp_path / "cache").problems
    assert (len(problems), len(problems.files), problems.total) == (5, 2, 7)


def test_a_fifo_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_shards(str(tmp_path / "x.tar"), tmp_path / "cache")
