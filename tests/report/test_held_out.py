"""What is kept out of training, and what student and teacher are compared by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cgspn.data import load_embedded, open_samples
from cgspn.evaluate import cosine
from cgspn.report.held_out import Kept, compare, held_out_of
from cgspn.teachers import convert, load_embedded_teacher


@pytest.mark.parametrize(("count", "out"), [(30, 0), (100, 1), (250, 2), (1700, 16), (5000, 16)])
def test_one_in_a_hundred_is_kept_out_and_no_other_sample_is_lost(tmp_path, count, out):
    for number in range(count):
        (tmp_path / f"{number:05d}.png").touch()
    kept = Kept(open_samples(str(tmp_path)))
    trained = [kept.name(number)[-9:-4] for number in range(len(kept))]
    held = {kept.whole.name(number)[-9:-4] for number in kept.out}
    assert len(held) == out
    assert {name[-9:-4] for name in kept.held_out_names()} == held
    assert len(set(trained)) == len(trained) == count - out
    assert sorted({*trained, *held}) == [f"{number:05d}" for number in range(count)]


def test_pictures_of_a_folder_that_can_be_read(tmp_path):
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    assert len(list(Kept(open_samples(str(tmp_path))).pictures())) == 3


def test_a_run_tells_which_photographs_it_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/sub/3.png", "photos/4.png", "other/3.png", "elsewhere/photos/sub/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run").mkdir()
    assert held_out_of("run", "photos") is None  # no record
    source = {"digest": open_samples("photos").digest()}
    record = {"data": "photos/", "source": source, "held_out": {"names": ["photos/sub/3.png"]}}
    (tmp_path / "run/distill.json").write_text(json.dumps(record))
    assert held_out_of("run", "photos") == {"sub/3.png"}
    assert held_out_of("run", str(tmp_path / "photos")) == {"sub/3.png"}
    for other in ("other", "missing", "embedded", "a\0b"):
        assert held_out_of("run", other) is None
    assert held_out_of("embedded", "photos") is None
    monkeypatch.chdir(tmp_path / "elsewhere")  # its folder of this name holds other images
    assert held_out_of("../run", "photos") is None
    assert held_out_of("../run", "../photos") == {"sub/3.png"}
    changes = ({"data": "~nobody-here/x"}, {"data": 3}, {"held_out": None}, {"held_out": {"names": [1]}}, {"source": 1})
    for damaged in ([], *(record | change for change in changes)):
        (tmp_path / "run/distill.json").write_text(json.dumps(damaged))
        assert held_out_of("../run", "../photos") is None


def test_a_chain_of_runs_held_out_what_each_of_them_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(3):
        Path(f"photos/{number}.png").touch()
    source = {"digest": open_samples("photos").digest()}

    def write(run, student, names, **changes):
        Path(run).mkdir(exist_ok=True)
        held = {"names": [f"photos/{name}.png" for name in names]}
        record = {"data": "photos", "source": source, "student": student, "held_out": held}
        Path(run, "distill.json").write_text(json.dumps(record | changes))

    write("first", None, "12")
    write("second", "first", "01")
    assert held_out_of("second", "photos") == {"1.png"}
    write("second", "first", "", data="elsewhere", source={"digest": "other"})  # images of another folder
    assert held_out_of("second", "photos") == {"1.png", "2.png"}
    write("second", "first", "", data="embedded", source=None)
    assert held_out_of("second", "photos") == {"1.png", "2.png"}
    write("first", "second", "0")  # folders that have been moved do not lead around in a circle
    assert held_out_of("first", "photos") == {"0.png"}


def test_the_cosine_is_that_of_the_tokens():
    teacher = load_embedded_teacher().image
    torch.manual_seed(0)
    student = convert(teacher, compression=4).eval()
    images = load_embedded("validation").images[:3]
    found = compare(teacher, student, images)
    assert found["images"] == 3
    assert found["picture"].startswith("data:image/jpeg")
    assert compare(teacher, teacher, images)["cosine"] == pytest.approx(1)
    grey = images.float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.config.image_mean, teacher.config.image_std))
    with torch.no_grad():
        pixels = (grey - mean) / std
        assert found["cosine"] == pytest.approx(cosine(student(pixels).tokens, teacher(pixels).tokens), abs=1e-5)
    assert compare(teacher, student, []) == {}
