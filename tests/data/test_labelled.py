"""Labelled and captioned pictures in every layout, and what is said of wrong ones."""

import pytest

from cgspn.data import open_shards
from cgspn.data.captions import fill
from cgspn.data.labelled import open_captioned, open_labelled
from cgspn.data.prepare import open_picture
from cgspn.data.samples import open_folder
from layouts import clip_benchmark, encoded, picture, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of_classes(root):
    for i, name in enumerate(["bag", "dress", "bag", "coat"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(root / name / f"{i}.png")
    return root


def test_a_folder_with_a_sub_folder_for_each_class(tmp_path):
    found = open_labelled(folder_of_classes(tmp_path / "clothes"))
    assert found.class_names == ("bag", "coat", "dress")
    assert [found.class_names[k] for k in found.labels] == ["bag", "bag", "coat", "dress"]
    assert [p.name for p in found.pictures] == ["0.png", "2.png", "3.png", "1.png"]
    assert found.name == "clothes"


def test_names_that_are_not_utf8_are_texts_like_others(tmp_path):
    for name in ("a", "\udcfe"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "\udcff.png", "PNG")
    labelled = open_labelled(tmp_path)
    assert labelled.class_names == ("a", "\\udcfe")
    assert open_picture(labelled.pictures[1]).size == picture(0).size
    assert open_folder(tmp_path).read(1).class_name.encode() == b"\\udcfe"
    assert len(open_folder(tmp_path).digest()) == 16


@pytest.mark.parametrize("counted", [True, False])
def test_clip_benchmark(tmp_path, counted):
    labels = [2, 0, 1, 1, 2, 0, 0, 1, 2]
    pictures = [picture(i) for i in range(9)]
    root = clip_benchmark(tmp_path / "wds", pictures, labels, ["tench", "great white shark", "owl"])
    if not counted:
        (root / "test" / "nshards.txt").unlink()
    found = open_labelled(root)
    assert found.class_names == ("tench", "great white shark", "owl")
    assert found.templates == ("a photo of a {c}.",)
    assert list(found.labels) == labels
    for got, expected in zip(found.pictures, pictures):
        assert open_picture(got).tobytes() == expected.tobytes()
    # as CLIP-benchmark fills it, without regard to the vowel
    assert fill(found.templates[0], "owl") == "a photo of a owl."
    assert fill("a photo of a {}", "owl") == "a photo of an owl"


def test_a_benchmark_that_lacks_a_part_says_which(tmp_path):
    root = clip_benchmark(tmp_path / "wds", [picture(i) for i in range(9)], [0] * 9, ["a", "b"])
    (root / "test" / "1.tar").rename(root / "test" / "hidden")
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing.*1\.tar: no such file"):
        open_labelled(root)
    (root / "test" / "hidden").rename(root / "test" / "1.tar")
    (root / "classnames.txt").write_text("a\n\n")
    (root / "classnames.txt").rename(root / "names.txt")
    with pytest.raises(FileNotFoundError, match=r"classnames\.txt; expected the names of the classes"):
        open_labelled(root)
    (root / "test" / "nshards.txt").write_text("three")
    with pytest.raises(ValueError, match="holds 'three'; expected the number of tars"):
        open_labelled(root)


def test_wrong_labels_are_named(tmp_path):
    root = clip_benchmark(tmp_path / "wds", [picture(0), picture(1)], [0, 7], ["a", "b"])
    with pytest.raises(ValueError, match=r"0\.tar: s0000001 has class 7; accepted: 0 to 1"):
        open_labelled(root)
    write_tar(root / "test" / "0.tar", {"x.png": encoded(picture(0))})
    with pytest.raises(ValueError, match=r"x has no \.cls file"):
        open_labelled(root)
    write_tar(root / "test" / "0.tar", {"x.png": encoded(picture(0)), "x.cls": b"cat"})
    with pytest.raises(ValueError, match=r"its \.cls file holds b'cat'; expected a number"):
        open_labelled(root)


@pytest.mark.parametrize("number", [b"1_0", b"+1", b"9" * 5000, b"1" * (1 << 21)])
def test_numbers_of_other_kinds_are_refused(tmp_path, number):
    root = clip_benchmark(tmp_path / "wds", [picture(0)], [0], ["a", "b"])
    write_tar(root / "test" / "0.tar", {"x.png": encoded(picture(0)), "x.cls": number})
    with pytest.raises(ValueError, match=r"its \.cls file holds|has no \.cls file"):
        open_labelled(root)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("classnames.txt", b"caf\xe9\nb\n", "classnames.txt is not UTF-8"),
        ("classnames.txt", b"\n", "classnames.txt holds no lines; expected the names of the classes"),
        ("zeroshot_classification_templates.txt", b"", "holds no lines; expected templates"),
        ("zeroshot_classification_templates.txt", b"{0.__class__}", "expected exactly one"),
    ],
)
def test_texts_beside_the_tars_that_cannot_be_used(tmp_path, name, content, said):
    root = clip_benchmark(tmp_path / "wds", [picture(0)], [0], ["a", "b"])
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_labelled(root)


def test_captions_that_are_no_captions_are_left_out(tmp_path):
    text = {"a.txt": b"x" * (2 << 20), "b.json": b'{"caption": "\\ud800"}', "c.json": b"[" + b"[]," * 700_000 + b"1]"}
    pictures = {f"{name}.png": encoded(picture(0)) for name in "abc"}
    write_tar(tmp_path / "0.tar", pictures | text)
    shards = open_shards(str(tmp_path / "0.tar"), tmp_path / "cache")
    assert [shards.read(number).caption for number in range(3)] == ["", "?", ""]
    assert [(name[-5:], why) for name, why in shards.problems.files] == [
        ("a.txt", "2097152 bytes; accepted: 1048576"),
        (".json", "2100003 bytes; accepted: 1048576"),
    ]
    for name, content in (pictures | text).items():
        (tmp_path / name).write_bytes(content)
    folder = open_folder(tmp_path)
    assert folder.read(1).caption == "?"
    with pytest.raises(OSError, match="accepted: 1048576"):
        folder.read(0)


def test_other_layouts_are_refused_with_what_was_expected(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images of one class.*expected a sub-folder for each"):
        open_labelled(tmp_path)
    with pytest.raises(ValueError, match=r"names tars alone.*classnames.txt"):
        open_labelled(tmp_path / "x.tar")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_labelled(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"1 images without captions; expected a \.txt file beside each"):
        open_captioned(tmp_path)


def test_captions_are_the_lines_of_text_files(tmp_path):
    root = tmp_path / "flickr"
    (root / "deep").mkdir(parents=True)
    for i, text in enumerate(["a dog\n\n  two dogs \n", None, "", "ein Hund für dich"]):
        picture(i).save(root / "deep" / f"{i}.png")
        if text is not None:
            (root / "deep" / f"{i}.txt").write_text(text, encoding="utf-8")
    found = open_captioned(root)
    assert found.captions == [("a dog", "two dogs"), ("ein Hund für dich",)]
    assert [p.name for p in found.pictures] == ["0.png", "3.png"]


@pytest.mark.parametrize("layout", ["benchmark", "pattern"])
def test_captions_in_tars(tmp_path, layout):
    for shard in range(2):
        members = {f"{shard}{i}.png": encoded(picture(i)) for i in range(3)}
        members |= {f"{shard}{i}.txt": f"one {i}\ntwo {i}".encode() for i in range(3)}
        write_tar(tmp_path / "wds" / "test" / f"{shard}.tar", members)
    source = tmp_path / "wds" if layout == "benchmark" else f"{tmp_path}/wds/test/{{0..1}}.tar"
    found = open_captioned(source)
    assert found.captions == [(f"one {i}", f"two {i}") for _ in range(2) for i in range(3)]
    assert open_picture(found.pictures[4]).tobytes() == picture(1).tobytes()
