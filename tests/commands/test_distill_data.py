"""`cgspn distill --data`: shards as a user meets them, interrupted, damaged and lost."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from cgspn.commands.distill import Distill
from cgspn.data import LoaderConfig, load_embedded
from cgspn.distill import ComputeConfig, LossConfig, OptimConfig, ParityError
from cgspn.distill.presets import EMBEDDED
from cgspn.distill.resume import progress_of

OPTIM = OptimConfig(batch_size=8)
CONFIG = replace(
    EMBEDDED,
    stage1=replace(OPTIM, steps=2),
    stage2=replace(OPTIM, steps=8),
    loss=LossConfig(contrastive=0.5),
    compute=ComputeConfig(save_every=2),
)
AS_OPTIONS = "--config.stage1.steps 2 --config.stage2.steps 8 --config.loss.contrastive 0.5 --loader.cache cache"
AS_OPTIONS += " --config.compute.save-every 2 --no-report"
for stage in ("stage1", "stage2"):
    AS_OPTIONS += f" --config.{stage}.batch-size 8 --config.{stage}.augment --config.{stage}.optimizer adamw"
    AS_OPTIONS += f" --config.{stage}.learning-rate 1e-3"


def distill(out, data, *, workers=0, max_skipped=0.1):
    loader = LoaderConfig(workers=workers, max_skipped=max_skipped, cache=Path("cache"))
    Distill("embedded", Path(out), data=data, config=CONFIG, loader=loader, report=False).run()
    return json.loads((Path(out) / "distill.json").read_text())


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = load_embedded("test")
    for k in range(3):
        with tarfile.open(tmp_path / f"photos-{k}.tar", "w") as tar:
            for i in range(10 * k, 10 * (k + 1)):
                content = io.BytesIO()
                Image.fromarray(images.images[i, 0].numpy()).save(content, "PNG")
                caption = f"a photo of a {images.class_names[int(images.labels[i])]}".encode()
                for name, data in ((f"{i}.png", content.getvalue() if i != 7 else b""), (f"{i}.txt", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return "photos-{0..2}.tar"


@pytest.mark.slow
def test_an_interrupted_run_on_shards_ends_as_an_uninterrupted_one(tmp_path, shards, capsys):
    whole = distill("whole", shards)
    said = capsys.readouterr().err
    assert "skipped 1 of 30 images" in said
    assert "photos-0.tar: 7: " in said
    assert whole["images"] == 30
    assert list(whole["skipped"]["images"]["files"]) == ["photos-0.tar: 7"]
    assert whole["skipped"]["shards"] == {"count": 0, "of": 3, "files": {}}
    for stage in whole["throughput"].values():
        assert 0 <= stage["data_wait_share"] <= 1
        assert stage["images_per_second"] > 0

    command = [sys.executable, "-m", "cgspn.cli", "distill", "embedded", "cut", "--data", shards]
    process = subprocess.Popen(
        [*command, "--loader.workers", "2", *AS_OPTIONS.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for _ in range(1200):
        if list(tmp_path.glob("cut/snapshots/1/0*[246]")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=30)
    assert not (tmp_path / "cut/distill.json").exists(), said
    assert list(tmp_path.glob("cut/stages/0/losses.json")), said
    assert distill("cut", shards, workers=1)["losses"] == whole["losses"]


@pytest.mark.slow
def test_a_run_refuses_to_go_on_with_other_images(tmp_path, shards, capsys):
    distill("run", shards)
    (tmp_path / "run" / "distill.json").unlink()  # as if it had stopped
    (tmp_path / "photos-1.tar").unlink()
    with pytest.raises(ValueError, match=r"^1 of 3 shards are missing or damaged, more than 10%.*-1\.tar: no such"):
        distill("run", shards)
    # known from before, the shard keeps its place, and the stages that are done are
    distill("run", shards, max_skipped=0.5)
    assert "skipped 1 of 3 shards" in capsys.readouterr().err
    (tmp_path / "run" / "distill.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(data, source.digest, source.images\)"):
        distill("run", "photos-{0,2}.tar")


@pytest.mark.slow
def test_a_run_without_captions_cannot_be_contrastive(tmp_path, shards):
    (tmp_path / "flat").mkdir()
    for i in range(20):
        Image.new("RGB", (30, 30)).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(ValueError, match=r"flat: none of the images read so far can be used: .*no caption \(look"):
        distill("run", "flat")
    assert not Path("run").exists()


def test_what_a_later_stage_cannot_do_is_refused_before_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(message, config, **more):
        with pytest.raises(ValueError, match=message):
            Distill("embedded", Path("new/run"), config=config, **more).run()
        assert not Path("new").exists()

    plain = replace(CONFIG, loss=LossConfig())
    refused(r"highres\.sizes has 30; accepted: multiples of the student's patch, 4", with_sizes(plain, 56, 30))
    refused("image_size has 30", replace(plain, image_size=30))
    cached = replace(plain, stage1=replace(OPTIM, steps=1, augment=False), compute=ComputeConfig(teacher_cache=1))
    refused("teacher_cache is on, but student, stage 2 crops", cached)
    refused("compute.capture is on, on device 'cpu'", replace(plain, compute=ComputeConfig(capture=True)))
    for name, least in (("mixup", 2), ("cutmix", 3)):
        alone = replace(plain, stage2=replace(OPTIM, steps=1, batch_size=least - 1, **{name: 0.5}))
        refused(f"{name} is 0.5, with {least - 1} images per process; expected {least} or more", alone)
    taken = replace(plain, compression=6)
    refused("config.compression is 6, and --student is already converted", taken, student=Path("student"))


def test_what_ends_before_the_first_step_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = replace(CONFIG, loss=LossConfig())
    for error in (ParityError("damaged"), KeyboardInterrupt()):
        monkeypatch.setattr("cgspn.commands.distill.distill", Mock(side_effect=error))
        with pytest.raises(type(error)):
            Distill("embedded", Path("new/run"), config=plain).run()
        assert not Path("new").exists()
    Path("old").mkdir()  # not ours to take away
    with pytest.raises(KeyboardInterrupt):
        Distill("embedded", Path("old"), config=plain).run()
    assert Path("old").exists()


@pytest.mark.slow
def test_a_finished_run_without_its_report_gets_it_from_the_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = replace(CONFIG, loss=LossConfig(), stage1=replace(OPTIM, steps=1), stage2=replace(OPTIM, steps=1))
    run = Distill("embedded", Path("run"), config=once)
    monkeypatch.setattr("cgspn.commands.distill.run_report", Mock(side_effect=OSError("no space is left")))
    with pytest.raises(OSError, match="no space"):
        run.run()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cgspn.commands.distill.distill", Mock(side_effect=AssertionError("it was trained again")))
    with pytest.raises(ValueError, match="holds a finished run"):  # of other settings
        replace(run, config=replace(once, compression=2)).run()
    record = Path("run/distill.json").read_text()
    run.run()
    assert Path("run/report.html").exists()
    assert Path("run/distill.json").read_text() == record
    with pytest.raises(ValueError, match="holds a finished run"):
        run.run()


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_are_refused_leave_no_folder_whichever_is_late(tmp_path, late):
    """What the slower one makes, or sees when it comes, does not keep the folder."""
    program = (
        "import os, time, cgspn.commands.distill as c, cgspn.cli;"
        f"slow = int(os.environ['RANK']) == {late}; make = c.writable_folder;"
        "c.writable_folder = lambda *a: (time.sleep(slow), make(*a))[1]; cgspn.cli.main()"
    )
    (tmp_path / "refused.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "refused.py"]
    command += ["distill", "embedded", "new/run", "--config.highres.sizes", "30"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert "highres.sizes has 30" in ended.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "report.html"])
def test_a_file_that_is_of_no_run_is_left_alone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old", name).write_text("precious")
    with pytest.raises(ValueError, match=f"out is old, which holds {name} of another model"):
        Distill("embedded", Path("old"), config=replace(CONFIG, loss=LossConfig())).run()
    assert Path("old", name).read_text() == "precious"
    assert [path.name for path in Path("old").iterdir()] == [name]


def with_sizes(config, *sizes):
    return replace(config, highres=replace(config.highres, sizes=sizes))


def test_a_step_that_waits_for_the_host_is_not_captured():
    with pytest.raises(ValueError, match="teacher_cache is -1; accepted: 0 or more GiB"):
        ComputeConfig(teacher_cache=-1)
    with pytest.raises(ValueError, match="capture and teacher_cache are both on"):
        ComputeConfig(capture=True, teacher_cache=1)
    with pytest.raises(ValueError, match=r"compute\.capture is on together with loss\.contrastive"):
        replace(CONFIG, compute=ComputeConfig(capture=True))


@pytest.mark.slow
def test_a_run_may_change_what_has_not_begun_and_writes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = replace(CONFIG, loss=LossConfig(), stage2=replace(OPTIM, steps=1))

    def again(config):
        (tmp_path / "run" / "distill.json").unlink(missing_ok=True)
        Distill("embedded", Path("run"), config=config).run()
        return json.loads((tmp_path / "run/distill.json").read_text())

    assert len(again(settings)["losses"]) == 2
    (tmp_path / "run/report.html").unlink()  # as if the run was killed before it
    higher = replace(settings.highres, sizes=(56,), optim=settings.stage2)
    more = again(replace(settings, highres=higher))
    assert list(more["losses"]) == ["student, stage 1", "student, stage 2", "student, 56 px"]
    assert more["config"]["highres"]["sizes"] == [56]
    assert (tmp_path / "run/report.html").exists()
    with pytest.raises(ValueError, match=r"other settings \(.*config\.highres\.sizes, config\.stage2\.steps\)"):
        again(replace(settings, stage2=replace(OPTIM, steps=3)))


def test_a_run_that_goes_on_says_from_where(tmp_path):
    assert progress_of(tmp_path) == ""
    (tmp_path / "stages/0").mkdir(parents=True)
    (tmp_path / "stages/0/losses.json").write_text("[]")
    (tmp_path / "snapshots/1/00000040").mkdir(parents=True)
    (tmp_path / "snapshots/1/00000044").mkdir()
    assert progress_of(tmp_path) == "1 stage done, stage 2 from step 44"
