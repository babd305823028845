"""Shards: what the index finds, captions, and shards that are damaged, lost or empty."""

import json
import re

import pytest
from shard_files import members, picture, write_shards, write_tar

from cgspn.data import open_samples, open_shards


def test_samples_keep_the_order_of_shards_and_tars(tmp_path):
    shards = open_shards(write_shards(tmp_path), tmp_path / "cache")
    assert len(shards) == 30
    assert len(shards.problems) == 0
    for i in (0, 9, 10, 29):
        sample = shards.read(i)
        assert sample.encoded == picture(i)
        assert sample.caption == f"picture {i}"
        assert shards.name(i) == f"{tmp_path}/shard-{i // 10}.tar: {i:04d}"
    # from the cache, by a glob, from a folder: the same
    for source in (f"{tmp_path}/shard-*.tar", str(tmp_path)):
        again = open_samples(source, cache=tmp_path / "cache")
        assert again.digest() == shards.digest()
        assert again.read(17) == shards.read(17)
    assert len(list((tmp_path / "cache" / "indices").iterdir())) == 3


def test_members_of_a_sample_share_the_path_up_to_the_first_dot(tmp_path):
    names = [
        "b/1.jpg",
        "a/1.jpg",
        "a/1.txt",
        "._1.jpg",
        "2.txt",
        "3.mask.png",
        "4.JPG",
        "5.webp",
        "readme",
        "6.png.txt",
    ]
    write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    shards = open_shards(str(tmp_path / "x.tar"), tmp_path / "cache")
    assert [shards.name(i).split(": ")[1] for i in range(len(shards))] == ["b/1", "a/1", "4", "5"]
    assert [shards.read(i).caption for i in range(4)] == ["", "a/1.txt", "", ""]
    assert [shards.read(i).encoded for i in range(4)] == [b"b/1.jpg", b"a/1.jpg", b"4.JPG", b"5.webp"]


@pytest.mark.parametrize(
    ("extra", "caption"),
    [
        ({"txt": " one line \n"}, "one line"),
        ({"json": json.dumps({"caption": "from json"})}, "from json"),
        ({"json": json.dumps({"text": "other key"})}, "other key"),
        ({"txt": "text first", "json": json.dumps({"caption": "json"})}, "text first"),
        ({"txt": "  ", "json": json.dumps({"caption": "json"})}, "json"),
        ({"json": "{broken"}, ""),
        ({"json": json.dumps(["a list"])}, ""),
        ({"json": json.dumps({"caption": None, "text": 3})}, ""),
        ({"txt": "Ünï".encode("latin-1")}, "\ufffdn\ufffd"),
        ({}, ""),
    ],
)
def test_captions(tmp_path, extra, caption):
    encoded = {name: text if isinstance(text, bytes) else text.encode() for name, text in extra.items()}
    write_tar(tmp_path / "x.tar", [("1.jpg", picture(1)), *((f"1.{name}", text) for name, text in encoded.items())])
    assert open_shards(str(tmp_path / "x.tar"), tmp_path / "cache").read(0).caption == caption
    # the same files beside each other in a folder
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jpg").write_bytes(picture(1))
    for name, text in encoded.items():
        (tmp_path / "folder" / f"1.{name}").write_bytes(text)
    sample = open_samples(str(tmp_path / "folder")).read(0)
    assert (sample.caption, sample.encoded, sample.label) == (caption, picture(1), -1)


def test_a_folder_of_classes(tmp_path):
    for i, name in enumerate(["cat", "dog", "dog"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    folder = open_samples(str(tmp_path))
    assert [folder.read(i).label for i in range(3)] == [0, 1, 1]
    assert [folder.read(i).class_name for i in range(3)] == ["cat", "dog", "dog"]
    before = folder.digest()
    (tmp_path / "dog" / "3.png").write_bytes(picture(3, kind="PNG"))
    assert open_samples(str(tmp_path)).digest() != before
    (tmp_path / "loose.png").write_bytes(picture(4, kind="PNG"))
    mixed = open_samples(str(tmp_path))
    assert [mixed.name(i)[len(str(tmp_path)) + 1 :] for i in range(5)] == [
        "cat/0.png",
        "dog/1.png",
        "dog/2.png",
        "dog/3.png",
        "loose.png",
    ]
    assert {mixed.read(i).class_name for i in range(5)} == {""}


def test_a_shard_cut_off_in_the_middle_gives_what_is_before_the_damage(tmp_path):
    pattern = write_shards(tmp_path)
    path = tmp_path / "shard-1.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing or damaged, more than 10%.*-1\.tar: .*cut off"):
        open_shards(pattern, tmp_path / "cache")
    shards = open_shards(pattern, tmp_path / "cache", 0.5)
    assert 20 < len(shards) < 30
    assert [shards.read(i).encoded for i in range(len(shards))][:12] == [picture(i) for i in range(12)]
    assert shards.problems.summary().startswith("skipped 1 of 3 shards that could not be read:")
    assert str(path) in shards.problems.summary()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty file"), (b"\x1f\x8b" + b"x" * 2000, "no plain tar"), (b"<p>404</p>" * 100, "")]
)
def test_files_that_are_no_tar(tmp_path, content, reason):
    pattern = write_shards(tmp_path)
    (tmp_path / "shard-0.tar").write_bytes(content)
    shards = open_shards(pattern, tmp_path / "cache", 0.5)
    assert len(shards) == 20
    assert shards.problems.files[0][0] == f"{tmp_path}/shard-0.tar"
    assert reason in shards.problems.files[0][1]
    with pytest.raises(ValueError, match=r"shard-0\.tar"):
        open_shards(str(tmp_path / "shard-0.tar"), tmp_path / "cache")


def test_a_damaged_header_is_no_end(tmp_path):
    pattern = write_shards(tmp_path)
    path = tmp_path / "shard-2.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"0025.jpg")
    content[start : start + 400] = b"\xff" * 400
    path.write_bytes(content)
    shards = open_shards(pattern, tmp_path / "cache", 0.5)
    assert len(shards) == 25
    assert "no valid header at byte" in shards.problems.files[0][1]


def test_a_shard_that_is_lost_later_keeps_its_place(tmp_path):
    pattern = write_shards(tmp_path)
    before = open_shards(pattern, tmp_path / "cache")
    (tmp_path / "shard-1.tar").unlink()
    after = open_shards(pattern, tmp_path / "cache", 0.5)
    assert after.digest() == before.digest()
    assert after.problems.files == ((f"{tmp_path}/shard-1.tar", "no such file"),)
    assert after.read(25) == before.read(25)
    for shards in (before, after):
        with pytest.raises(FileNotFoundError):
            shards.read(12)
    # damage that loses samples does the same
    path = tmp_path / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:3000])
    damaged = open_shards(pattern, tmp_path / "cache", 1.0)
    assert damaged.digest() == before.digest()
    with pytest.raises(OSError, match="image: the shard ends before byte"):
        damaged.read(9)
    # without what was known of it, the others move up
    assert len(open_shards(pattern, tmp_path / "other", 1.0)) == 10 + 1


def test_a_changed_shard_is_indexed_again(tmp_path):
    pattern = write_shards(tmp_path, 1)
    assert len(open_shards(pattern, tmp_path / "cache")) == 10
    write_tar(tmp_path / "shard-0.tar", members(range(4)))
    assert len(open_shards(pattern, tmp_path / "cache")) == 4


def test_a_cache_that_cannot_be_written_or_read_is_done_without(tmp_path):
    pattern = write_shards(tmp_path, 1)
    (tmp_path / "file").write_text("in the way")
    assert len(open_shards(pattern, tmp_path / "file")) == 10
    open_shards(pattern, tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "indices").iterdir()
    for content in (b"", b"PK\x03\x04 no zip", kept.read_bytes()[:-200]):
        kept.write_bytes(content)
        assert len(open_shards(pattern, tmp_path / "cache")) == 10


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"away\.tar: no such file"):
        open_samples(str(tmp_path / "away.tar"), cache=tmp_path)
    away = (f"{tmp_path}/away/", f"{tmp_path}/away-{{3..3}}.tar", f"{tmp_path}/{'a' * 300}", "~nobody-here/x")
    for source in away:
        message = f"^{re.escape(source)}: no such file or folder; accepted: a folder"
        with pytest.raises(FileNotFoundError, match=message):
            open_samples(source, cache=tmp_path, max_skipped=1.0)
        with pytest.raises(FileNotFoundError, match=message):
            open_shards(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        open_samples("", cache=tmp_path)  # not the working directory
    with pytest.raises(FileNotFoundError, match=r"no file matches .*none-"):
        open_samples(str(tmp_path / "none-*.tar"), cache=tmp_path)
    write_tar(tmp_path / "empty.tar", [("1.txt", b"text alone")])
    with pytest.raises(ValueError, match=r"empty\.tar: holds no images"):
        open_samples(str(tmp_path / "empty.tar"), cache=tmp_path)
