"""The quality study on a tiny teacher and tiny tars: files, resumption, what a row changes."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
import tyro
from benchmarks.quality import ROWS, QualityConfig, plot, run, run_row, summary
from PIL import Image

import cgspn
from benchmarks import quality

CPU = torch.device("cpu")
SMALL = {"size": 28, "probe_size": (28, 40), "held_out": 3, "stage1_steps": 2, "stage2_steps": 3, "batch_size": 4}


def encoded(array, kind):
    out = io.BytesIO()
    Image.fromarray(array.numpy()).save(out, kind)
    return out.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a teacher, photos.tar and scenes."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    cgspn.create_model("vit_mini_patch4_28", mixers=("attention",) * 2).save_pretrained(folder / "teacher")
    random = torch.Generator().manual_seed(0)

    def picture(h, w):
        return torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=random)

    tar(folder / "photos.tar", [(f"{i}.jpg", encoded(picture(40, 32), "JPEG")) for i in range(9)])
    for part, count in (("train", 4), ("test", 2)):
        masks = [torch.randint(12, (28, 40), dtype=torch.uint8, generator=random) for _ in range(count)]
        scenes = [
            (f"{i}.{kind}", content)
            for i, mask in enumerate(masks)
            for kind, content in (("jpg", encoded(picture(28, 40), "JPEG")), ("mask.png", encoded(mask, "PNG")))
        ]
        tar(folder / f"camvid-{part}.tar", scenes)
    return folder


def test_the_command_writes_its_files_and_goes_on(study, tmp_path, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments[0])
        return run_row(*arguments)

    monkeypatch.setattr(quality, "run_row", counted)
    options = ["--photos", f"{study}/photos.tar", "--camvid", str(study), "--out", str(tmp_path), "--commit", "abc"]
    options += ["--size", "28", "--probe-size", "28", "40", "--held-out", "3", "--batch-size", "4"]
    options += ["--stage1-steps", "2", "--stage2-steps", "3", "--rows", "ViT", "stage 2 rate / 3"]

    def command(*more):
        tyro.cli(quality.main, args=[f"{study}/teacher", *options, *more], config=(tyro.conf.OmitArgPrefixes,))

    command("--seeds", "0")
    assert calls == [ROWS["ViT"], ROWS["stage 2 rate / 3"]]
    command("--seeds", "0", "1")
    assert calls[2:] == calls[:2]
    saved = json.loads((tmp_path / "quality.json").read_text())
    assert saved["machine"]["commit"] == "abc"
    assert "stage2_rate 0.0002" in saved["machine"]["settings"]
    assert [(r["student"], r["run"]) for r in saved["runs"]] == [("teacher", 0)] + [
        (name, k) for name in ("ViT", "stage 2 rate / 3") for k in (0, 1)
    ]
    for row in saved["runs"][1:]:
        assert -1 <= row["cosine"] <= 1
        assert 0 <= row["mIoU"] <= 100
        assert row["stage 2 rise"] >= 1
    assert "± " in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="stage2_rate"):  # other settings do not mix with these
        command("--stage2-rate", "1e-4")
    assert len(calls) == 4


def test_what_is_wrong_is_named(study, tmp_path):
    def tried(**changes):
        return run(QualityConfig(study / "photos.tar", **(SMALL | changes)), f"{study}/teacher", tmp_path, CPU)

    with pytest.raises(ValueError, match="rows holds 'nothing'; accepted: 'ViT', 'C-GSPN'"):
        tried(rows=("nothing",))
    with pytest.raises(ValueError, match="size is 30; accepted: multiples of the patch size 4"):
        tried(size=30)
    with pytest.raises(ValueError, match=r"probe_size holds 30; accepted: multiples of the patch size 4"):
        tried(probe_size=(28, 30), camvid=study)
    with pytest.raises(ValueError, match="held_out is 9; accepted: 1 to 8, of 9 photographs"):
        tried(held_out=9)


def test_a_row_changes_the_stage_that_it_names(study, monkeypatch):
    teacher = cgspn.load_encoder(study / "teacher").eval()
    config = QualityConfig(study / "photos.tar", **SMALL)
    data = quality.load_study(config, teacher, CPU)
    assert data.scenes is None
    seen, weights = [], []

    def untrained(teacher, student, images, settings):
        seen.append((settings.stage1, settings.stage2))
        weights.append(settings.loss.output)
        return [SimpleNamespace(steps=[{"block 0": 0.5, "total": 2.0}], curve=lambda _: [2.0, 3.0])]

    monkeypatch.setattr(quality, "distill", untrained)
    for name in ("C-GSPN", "C-GSPN, AdamW", "stage 2 rate x 3", "inherited rate / 3", "- stage 1", "pooled x 20"):
        found = run_row(ROWS[name], teacher, data, config, 0)
        assert found["stage 2 rise"] == 1.5
        assert ("cosine after stage 1" in found) == (name != "- stage 1")
    first = [one for one, other in seen if not other.steps]
    second = [other for _, other in seen if other.steps]
    assert [(o.steps, o.learning_rate, o.optimizer, o.inherited_rate) for o in first] == [
        (2, 5e-3, "muon", 1), (2, 3e-3, "adamw", 1), (2, 5e-3, "muon", 1), (2, 5e-3, "muon", 1),
        (2, 5e-3, "muon", 1),
    ]  # fmt: skip
    assert [(o.steps, o.learning_rate, o.optimizer, o.inherited_rate) for o in second] == [
        (3, 2e-4, "muon", 1), (3, 1.5e-4, "adamw", 1), (3, pytest.approx(6e-4), "muon", 1), (3, 2e-4, "muon", 1 / 3),
        (5, 2e-4, "muon", 1), (3, 2e-4, "muon", 1),
    ]  # fmt: skip
    assert {o.embedding_rate for o in first + second} == {0}
    assert weights[-3:] == [0.05, 1, 1]


def test_the_summary_is_the_mean_and_half_the_range(tmp_path):
    found = {"C-GSPN": [{"cosine": 0.8, "seconds": 3.0}, {"cosine": 0.9, "seconds": 4.0}], "ViT": [{"cosine": 0.5}]}
    rows = summary(found)
    assert rows[0] == {"student": "C-GSPN", "seeds": 2, "cosine": "0.8500 ± 0.0500", "seconds": "3.5 ± 0.5"}
    assert rows[1] == {"student": "ViT", "seeds": 1, "cosine": "0.5000"}
    plot(found, tmp_path / "without_scenes.png")
    assert (tmp_path / "without_scenes.png").exists()
