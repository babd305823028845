"""`cgspn show` as a user meets it: one line for wrong input, damaged photographs named, one whole file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cgspn.cli import main
from cgspn.commands.show import Show
from cgspn.data import open_samples
from cgspn.teachers import load_encoder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": "nowhere"}, "nowhere"),
        ({"size": 0}, r"size is 0; accepted: at least one patch, 4 pixels"),
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


def test_held_out_photographs_come_first_and_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(4):
        Image.linear_gradient("L").resize((16, 16)).save(f"photos/{number}.png")
    load_encoder("embedded").save_pretrained("run")
    record = {"data": "photos", "source": {"digest": open_samples("photos").digest()}}
    Path("run/distill.json").write_text(json.dumps(record | {"held_out": {"names": ["photos/2.png"]}}))
    Show("run", images="photos", size=16, limit=3, layers=(1,)).run()
    assert "1 of 3 photographs were held out of the student's training" in capsys.readouterr().out
    page = Path("page.html").read_text()
    assert page.index("2.png") < page.index("0.png") < page.index("1.png")
    assert "3.png" not in page
    assert "1 of 3 photographs" in page
