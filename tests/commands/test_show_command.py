"""`cgspn show` as a user meets it: one line for wrong input, damaged photographs named, one whole file."""

from pathlib import Path

import pytest
from PIL import Image

from cgspn.cli import main
from cgspn.commands.show import Show


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": "nowhere"}, "nowhere"),
        ({"size": 3}, r"size is 3; accepted: at least one patch, 4 pixels"),
        ({"size": 1 << 20}, r"size is 1048576 x 1048576 pixels; accepted: at most"),
        ({"limit": 0}, r"limit is 0; accepted: 1 or more"),
        ({"layers": (5,)}, r"layers is \[5\]; accepted: 1 to 4"),
        ({"out": Path()}, r"out is \., a folder; expected a file name"),
        ({"at": ((0.5, 2.0),)}, r"at is \[\(0.5, 2.0\)\]; accepted: pairs of fractions"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing_behind(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        Show(**{"student": "embedded", **arguments}).run()
    assert not list(tmp_path.iterdir())


def test_wrong_input_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cgspn", "show", "embedded", "--images", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "".join(capsys.readouterr()).strip() == "cgspn: error: images is nowhere: no such folder"


def test_a_folder_with_a_damaged_photograph_makes_a_page_and_a_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "photos" / "fine.png")
    monkeypatch.chdir(tmp_path)
    Show("embedded", images="photos", size=48, out=Path("new/page.html"), picture=Path("picture.png")).run()
    said = capsys.readouterr().out
    assert "skipped 1 of 2 image files" in said
    assert "photos/broken.jpg" in said
    page = (tmp_path / "new" / "page.html").read_text()
    assert "48 × 32 pixels, 12 × 8 patches" in page
    assert "photos/broken.jpg" in page
    assert Image.open(tmp_path / "picture.png").size == (582, 24 + 6 + 192)
