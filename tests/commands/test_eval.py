"""`cgspn eval` as a user meets it: tables, JSON, and one line for what is wrong."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
from PIL import Image

from cgspn import cli
from cgspn.commands.eval_report import Evaluation, Report
from cgspn.console import console
from cgspn.data import load_embedded
from cgspn.data.labelled import open_labelled
from cgspn.evaluate import classify, similarity
from cgspn.evaluate.jobs import PER_CLASS, TOP1
from cgspn.models import Encoder, create_model
from cgspn.teachers import load_embedded_teacher, load_model
from layouts import ade20k, clip_benchmark, coco_stuff


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(console, "width", 200)  # COLUMNS counts only when the console is made
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    cli.run(["eval", *map(str, arguments)])


@pytest.fixture
def student():
    create_model("cgspn_mini_patch4_28").save_pretrained("student")
    teacher = load_embedded_teacher()
    teacher.with_image(create_model("cgspn_mini_patch4_28")).save_pretrained("dual")


def clothes(count):
    images = load_embedded("test")
    pictures = [Image.fromarray(image[0].numpy()) for image in images.images[:count]]
    return pictures, images.labels[:count].tolist(), images.class_names


def test_several_models_and_data_sets_in_one_table(tmp_path, student, capsys):
    pictures, labels, names = clothes(40)
    clip_benchmark(tmp_path / "wds", pictures, labels, names, per_shard=20)
    for i, (image, label) in enumerate(zip(pictures, labels)):
        folder = tmp_path / "photos" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    (tmp_path / "photos" / "bag" / "damaged.png").write_bytes(b"no image")
    run("zeroshot", "embedded", "dual", "--data", "wds", "photos", "--out", "results/zeroshot.json")
    shown = capsys.readouterr()
    assert "wds top-1 (%)" in shown.out
    assert "macro average (%)" in shown.out
    assert shown.err.count("skipped 1 of 41") == 1  # once, not for each model
    record = json.loads((tmp_path / "results" / "zeroshot.json").read_text())
    assert {"command", "torch", "torchmetrics", "python", "cgspn", "commit", "seeds"} <= record.keys()
    values = record["results"]["embedded"]
    assert values["photos"]["top1"] > 0.7
    assert values["wds"].keys() == {"top1", "top5", "per_class"}
    mean = (values["photos"]["top1"] + values["wds"]["top1"]) / 2
    assert record["table"]["averages"]["embedded"] == pytest.approx(mean)
    assert record["results"]["dual"]["wds"]["top1"] < 0.5  # untrained
    assert record["skipped"]["photos"]["total"] == 41
    # prompts of one's own: one that misleads
    (tmp_path / "prompts.txt").write_text("a bag\n")
    with pytest.raises(ValueError, match="template is 'a bag'"):
        run("zeroshot", "embedded", "--data", "photos", "--templates", "prompts.txt")


def test_one_model_is_in_memory_at_a_time(tmp_path, student, monkeypatch):
    pictures, labels, names = clothes(10)
    clip_benchmark(tmp_path / "wds", pictures, labels, names, per_shard=10)
    alive, loaded = weakref.WeakSet(), []

    def load(source):
        gc.collect()
        loaded.append((source, len(alive)))
        model = load_model(source)
        alive.add(model)
        return model

    monkeypatch.setattr("cgspn.commands.eval.load_model", load)
    run("zeroshot", "dual", "embedded", "--data", "wds")
    assert loaded == [("dual", 0), ("embedded", 0)] * 2  # once to check, once to measure
    loaded.clear()
    run("zeroshot", "dual", "--data", "wds")
    assert loaded == [("dual", 0)]


def test_retrieval_and_everything_that_a_folder_allows(tmp_path, student, capsys):
    pictures, labels, names = clothes(30)
    for i, (image, label) in enumerate(zip(pictures, labels)):
        folder = tmp_path / "photos" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    run("retrieval", "embedded", "--data", "photos", "--out", "classes.json")
    found = json.loads((tmp_path / "classes.json").read_text())["results"]["embedded"]["photos"]
    assert found.keys() == {"image_to_text@1", "text_to_image@1"}
    assert "image → text R@1 (%)" in capsys.readouterr().out
    run("all", "embedded", "dual", "--data", "photos", "--out", "both.json")
    shown = capsys.readouterr().out
    assert "top-1 (%)" in shown
    assert "text → image R@1 (%)" in shown
    assert "image → text R@1 (%)" not in shown  # by captions made of classes it is zero-shot by another name
    found = json.loads((tmp_path / "both.json").read_text())["results"]["embedded"]["photos"]
    assert {"top1", "per_class", "image_to_text@1"} <= found.keys()
    for i, label in enumerate(labels):
        (tmp_path / "photos" / names[label] / f"{i}.txt").write_text(f"a {names[label]}\nnumber {i}\n")
    run("all", "embedded", "--data", "photos", "--out", "all.json")
    found = json.loads((tmp_path / "all.json").read_text())["results"]["embedded"]["photos"]
    assert {"top1", "image_to_text@1", "image_to_text@5", "text_to_image@10"} <= found.keys()


@pytest.mark.parametrize(("per_class", "labels"), [(0.7500001, ["top-1"]), (0.7, ["top-1", "mean per class"])])
def test_a_column_that_repeats_another_is_in_json_alone(per_class, labels):
    report = Report("Zero-shot", Evaluation(), {}, several=False)
    report.add("model", "set", {TOP1: 0.75, PER_CLASS: per_class})
    assert [metric.label for metric in report.table().metrics] == labels
    assert report.measured["model"]["set"]["per_class"] == per_class


def test_segment(tmp_path, student, capsys):
    ade20k(tmp_path / "ade", (6, 3), classes=8)
    coco_stuff(tmp_path / "coco", (4, 2))
    run("segment", "student", "embedded", "--data", "ade", "coco", "--size", "24x32", "--out", "segment.json")
    shown = capsys.readouterr().out
    assert "ade20k mIoU (%)" in shown
    assert "coco-stuff pixel accuracy (%)" in shown
    record = json.loads((tmp_path / "segment.json").read_text())
    for model in ("student", "embedded"):
        ade = record["results"][model]["ade20k"]
        assert len(ade["class_iou"]) == 150
        known = [v for v in ade["class_iou"].values() if v is not None]
        assert ade["miou"] == pytest.approx(sum(known) / len(known))
        assert 0 < ade["pixel_accuracy"] <= 1


def test_sizes_make_a_row_each_and_a_plot_and_a_student_is_judged_at_its_own(tmp_path, capsys):
    """As of a curriculum to 56 px: its first size is not the one that it is best at."""
    teacher = load_embedded_teacher()
    own = replace(teacher.image.config, image_size=(56, 56), trained_sizes=(28, 56), position_table=(7, 7))
    student = Encoder(own)
    student.load_state_dict(teacher.image.state_dict())
    teacher.with_image(student).save_pretrained("grown")
    pictures, labels, names = clothes(40)
    clip_benchmark(tmp_path / "wds", pictures, labels, names)
    for what in ("zeroshot", "all"):
        run(what, "grown", "--data", "wds", "--size", "28", "56", "28x56", "--out", f"{what}.json")
        assert (tmp_path / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    assert "grown at 28x56 px" in capsys.readouterr().out
    record = json.loads((tmp_path / "zeroshot.json").read_text())
    assert record["sizes"]["grown at 56 px"] == {"model": "grown", "pixels": [56, 56]}
    run("zeroshot", "grown", "--data", "wds", "--out", "own.json")
    alone = json.loads((tmp_path / "own.json").read_text())
    assert alone["sizes"] == {"grown": {"model": "grown", "pixels": [56, 56]}}
    assert alone["results"]["grown"] == record["results"]["grown at 56 px"]
    assert alone["results"]["grown"] != record["results"]["grown at 28 px"]
    assert not (tmp_path / "own.png").exists()
    model = load_model("grown")
    for size, row in ((None, "grown at 56 px"), (28, "grown at 28 px")):
        found = classify(model, pictures, names, open_labelled("wds").templates, size=size)
        share = sum(a == names[b] for a, b in zip(found.labels, labels)) / 40
        assert share == pytest.approx(record["results"][row]["wds"]["top1"])
        seen = similarity(model, pictures[0], [f"a photo of a {name}" for name in names], size=size)
        assert seen.cosine.shape == (1, len(names))
    with pytest.raises(ValueError, match=r"size is \(28, 30\); accepted: multiples of the patch size 4"):
        similarity(model, pictures[0], "a bag", size=(28, 30))


def test_segment_at_several_sizes(tmp_path, student, capsys):
    ade20k(tmp_path / "ade", (4, 2), classes=4)
    run("segment", "student", "--data", "ade", "--size", "24", "36", "--plot", "scores.png", "--out", "segment.json")
    record = json.loads((tmp_path / "segment.json").read_text())
    assert record["sizes"] == {f"student at {n} px": {"model": "student", "pixels": [n]} for n in (24, 36)}
    assert (tmp_path / "scores.png").exists()


def test_segment_on_pairs_of_ones_own(tmp_path, student, capsys):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for i in range(4):
            colour = (255, 0, 0) if i % 2 else (0, 0, 255)
            Image.new("RGB", (32, 28), colour).save(tmp_path / part / f"{i}.jpg")
            Image.new("L", (32, 28), i % 2).save(tmp_path / part / f"{i}.mask.png")
    run("segment", "student", "--train", "train", "--test", "test", "--classes", "2")
    shown = capsys.readouterr().out
    assert "class 1" in shown
    assert "100.0" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zeroshot", "embedded", "--data", "missing"], "no such folder: missing"),
        (["zeroshot"], "models is empty"),
        (["zeroshot", "student", "--data", "missing"], "models names student, which is an image encoder without"),
        (["retrieval", "student"], "models names student, which is an image encoder without a text tower"),
        (["zeroshot", "embedded", "--batch-size", "0"], "batch_size is 0"),
        (["zeroshot", "embedded", "--max-skipped", "2"], r"max_skipped is 2\.0; accepted: 0 to 1"),
        (["segment", "embedded", "--data", "ade", "--max-skipped", "-1"], r"max_skipped is -1\.0; accepted: 0 to 1"),
        (["zeroshot", "embedded", "--out", "."], "out is ., a folder"),
        (["zeroshot", "embedded", "--device", "cuda"], "PyTorch finds no CUDA GPU"),
        (["segment", "student"], "data is empty"),
        (["segment", "student", "--data", "ade", "--size", "12,24"], "size holds '12,24'; accepted: a side in pixels"),
        (["zeroshot", "embedded", "--size", "1000000"], "size is 1000000 x 1000000 pixels; accepted: at most"),
        (["segment", "embedded", "--data", "ade", "--size", "1000000"], "size is 1000000 x 1000000 pixels; accepted:"),
        (["zeroshot", "embedded", "--size", "30"], "size is 30; accepted: multiples of the patch size 4"),
        (["zeroshot", "embedded", "--plot", "."], "plot is ., a folder"),
        (["segment", "student", "--train", "x"], "train and test go together"),
        (["segment", "student", "--train", "x", "--test", "y"], "classes is not given"),
        (["segment", "student", "--data", "ade", "--size", "25x24"], "expected multiples of the patch size, 4"),
        (["segment", "student", "--data", "ade", "--test-images", "9"], "ade20k holds 1 images, but 9"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, message, tmp_path, student):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    ade20k(tmp_path / "ade", (2, 1), classes=3)
    with pytest.raises((ValueError, OSError), match=message):
        run(*arguments)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["zeroshot", "embedded", "--size", "28", "30"],
        ["zeroshot", "embedded", "missing"],
        ["segment", "embedded", "--data", "ade", "--size", "28", "2"],
        ["segment", "embedded", "missing", "--data", "ade"],
    ],
)
def test_the_last_model_and_size_are_checked_before_the_first_is_measured(arguments, tmp_path, monkeypatch):
    for work in ("embed_pictures", "segmentation"):
        monkeypatch.setattr(f"cgspn.commands.eval.{work}", lambda *_, **__: pytest.fail("work began"))
    ade20k(tmp_path / "ade", (2, 1), classes=3)
    with pytest.raises((ValueError, OSError), match=r"size is|missing"):
        run(*arguments)


def test_help_shows_what_can_be_measured(capsys):
    for arguments, expected in (
        (["segment", "--help"], "--ignore-index"),
        (["zeroshot", "--help"], "cgspn eval zeroshot embedded runs/student --data photos/"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert expected in capsys.readouterr().out
