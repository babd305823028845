"""What is said of a run before it begins, and of its progress where there is no terminal."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cgspn import console
from cgspn.commands.header import cpu_rate, header, warnings
from cgspn.data import load_embedded
from cgspn.distill import DistillConfig, HighResConfig, ImageSetFeed, OptimConfig, SizeRange, World
from cgspn.distill.flops import training_flops
from cgspn.distill.presets import PRESETS
from cgspn.models import create_model
from cgspn.teachers import convert


def test_a_header_counts_steps_images_epochs_and_costs(monkeypatch):
    monkeypatch.setattr("cgspn.commands.header.cpu_rate", lambda student, precision: 1e9)
    torch.manual_seed(0)
    teacher = create_model("vit_mini_patch4_28", channels=1, mixers=("attention",) * 2)
    student = convert(teacher, compression=4)
    optim = OptimConfig(steps=30, batch_size=20)
    config = DistillConfig(stage1=optim, stage2=optim, highres=HighResConfig(sizes=(56,), optim=optim))
    feed = ImageSetFeed(load_embedded("test").subset(torch.arange(300)))
    device, *stages, costs = header(teacher, student, feed, 300, config, World())
    assert device.startswith("CPU")
    assert [line.partition(":")[0] for line in stages] == ["student, stage 1", "student, stage 2", "student, 56 px"]
    assert "30 steps of 20 images at 28 x 28 px; 600 images in all, 2 epochs" in stages[1]
    assert costs.startswith("roughly")
    mixed = replace(config, sizes=SizeRange(16, 48, count=2))
    line = list(header(teacher, student, feed, 300, mixed, World()))[2]
    assert "28 x 28 px, or as many tokens in more or fewer images at 2 sizes, 16 x 16 to 48 x 48 px (height" in line
    assert "x width); 1,020 images in all" in line
    assert line.endswith("3.4 epochs")
    (*_, shorter) = header(teacher, student, feed, 300, replace(config, highres=HighResConfig()), World())
    assert re.match(r"roughly [0-9.]+ (s|minutes) and ", shorter)
    (*_, longer) = header(teacher, student, feed, 300, replace(config, stage2=replace(optim, steps=10**8)), World())
    assert "hours" in longer


def test_durations_are_in_the_unit_that_people_would_use():
    said = {2e-5: "less than 0.1 s", 0.26: "0.3 s", 3.44: "3.4 s", 59: "59 s", 90: "1.5 minutes", 1500: "25 minutes"}
    said |= {3600: "1.0 hours", 36e3: "10 hours", 36e5: "1,000 hours"}
    assert {seconds: console.duration_text(seconds) for seconds in said} == said


def test_a_cpu_is_measured_by_a_step_of_the_students_first_block(monkeypatch):
    monkeypatch.setattr("timeit.repeat", lambda step, **_: [step() or 4.0, 2.0])
    student = create_model("cgspn_mini_patch4_28", mixers=("propagation",) * 2)
    block = training_flops(replace(student.config, mixers=("propagation",)), (28, 28))
    for precision in ("float32", "bfloat16"):
        assert cpu_rate(student, precision) == (8192 // 49) * block / 2.0


FASTER = {"stage1": replace(PRESETS["embedded"].stage1, steps=9)}
OTHER = {"keep_positions": True, "compute": replace(PRESETS["embedded"].compute, save_every=3)}


@pytest.mark.parametrize(
    ("teacher", "preset", "changed", "device", "student", "count"),
    [
        ("embedded", "embedded", {}, "cpu", None, 0),
        ("embedded", "embedded", {}, "cpu", Path("start"), 0),
        ("org/so400m", "embedded", {}, "cuda", None, 1),
        ("org/so400m", "embedded", {}, "cpu", None, 2),
        ("org/so400m", "embedded", OTHER, "cpu", None, 2),
        ("org/so400m", "embedded", FASTER, "cpu", None, 1),
        ("org/so400m", "so400m-378", {}, "cuda", None, 0),
        ("org/so400m", "so400m-378", {}, "cuda", Path("start"), 1),
    ],
)
def test_a_likely_mistake_is_warned_of(teacher, preset, changed, device, student, count):
    config = replace(PRESETS[preset], **changed)
    assert len(list(warnings(teacher, preset, config, torch.device(device), student, None))) == count
    few = list(warnings(teacher, preset, config, torch.device(device), student, 99))
    assert len(few) == count + 1
    assert any("99 images are few" in line for line in few)


def test_a_trial_on_a_cpu_is_advised_for_the_stages_that_run():
    done = replace(PRESETS["so400m-highres"].stage1, steps=0)
    later = replace(PRESETS["so400m-highres"], stage1=done, stage2=done)
    for config, names in (
        (PRESETS["vit-s14-study"], "--config.stage1.steps, --config.stage2.steps and"),
        (later, "--config.highres.optim.steps and"),
    ):
        (line,) = warnings("org/so400m", "so400m-highres", config, torch.device("cpu"), None, None)
        assert f"lower {names}" in line


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console.console, "_force_terminal", False)
    with console.progress_watcher() as watcher:
        watch = watcher("stage 1", 100)
        for step in range(100):
            watch({"step": step, "total": 0.5})
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("stage 1: 1/100, loss 0.5000")
    assert last.startswith("stage 1: 100/100")
