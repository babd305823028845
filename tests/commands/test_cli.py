"""The program as a user meets it: exit codes, one clear line, whole files."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from cgspn.cli import COMMANDS, main, run
from cgspn.commands.command import Command, parsed, usual_settings
from cgspn.commands.distill import Distill
from cgspn.commands.errors import said_of
from cgspn.commands.export import Export
from cgspn.commands.pretrain import Pretrain
from cgspn.data import load_embedded
from cgspn.distill import SizeRange

SMALL = ["--config.distill.stage1.steps", "1", "--config.distill.stage2.steps", "1"]
SMALL += ["--config.distill.stage1.batch-size", "8", "--config.distill.stage2.batch-size", "8"]
SMALL += ["--config.test-images", "40", "--config.probe-images", "40"]


def test_help_shows_examples(capsys):
    run([])
    assert "eval zeroshot" in capsys.readouterr().out
    run(["eval"])
    assert "bench" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["demo", "--help"])
    assert "cgspn demo --out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "file"], "out is file, which is not writable"),
        (["demo", "--config.test-images", "0"], "test_images is 0; accepted: 1 to 4000"),
        (["demo", "--config.distill.compression", "97"], "compression is 97"),
        (["pretrain", "x", "--config.model", "vit_mni_patch4_28"], "did you mean"),
        (["pretrain", "x", "--config.optim.batch-size", "0"], "config.optim: batch_size is 0; accepted: more than 0"),
        (["nothing"], "'nothing' is not a command of cgspn; accepted: bench, convert, demo"),
        (["distil"], "'distil' is not a command of cgspn; did you mean distill?"),
        (["eval", "zeroshoot", "embedded"], "'zeroshoot' is not a command of cgspn eval; did you mean zeroshot?"),
        (["convert", "embeded", "new/student"], "embeded does not exist; did you mean embedded?"),
        (["show", "nobody/nothing"], "no connection and nothing cached (given as student)"),
        (["convert", "nowhere", "new/student"], "nowhere"),
        (["convert", "embedded", "new/student", "--compression", "0"], "compression is 0"),
        (["eval", "zeroshot", "nowhere", "--out", "new/table.json"], "nowhere"),
        (["eval", "zeroshot", "embedded", "--data"], "data is empty; expected one or more data sets"),
        (["export", "embedded", "new/x.onnx", "--device", "tpu"], "invalid choice 'tpu'"),
        (["distill", "embedded", "new/run", "--data", "photo/"], "photo/: no such file or folder; accepted: a folder"),
        (["distill", "embedded", "new/run", "--data", "photo/"], "(given as data)"),
        (["eval", "zeroshot", "embedded", "--data", "photo/"], "no such folder: photo (given as data)"),
        (["show", "embedded", "--images", "[red]", "--out", "new/page.html"], "images is [red]: no such folder"),
        (["bench", "table", "--contenders", "Mamba", "--out", "new/results"], "'Mamba' is not a contender"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["cgspn", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    output = "".join(capsys.readouterr())
    assert end.value.code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


STEPS = ["--config.stage1.steps", "1", "--config.stage2.steps", "1"]
STEPS += ["--config.stage1.batch-size", "4", "--config.stage2.batch-size", "4"]


def test_convert_distill_and_eval_on_a_folder_with_a_damaged_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = load_embedded("test")
    for i in range(20):
        name = images.class_names[int(images.labels[i])]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[i, 0].numpy()).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "bag" / "damaged.png").write_bytes(b"no image")

    run(["convert", "embedded", "student", "--compression", "4"])
    assert "4 layers propagate, no attention stays" in capsys.readouterr().out
    steps = [value if value != "4" else "21" for value in STEPS]  # one batch shows all images
    run(["distill", "embedded", "out", "--student", "student", "--data", "photos", *steps])
    said = capsys.readouterr().err
    assert "skipped 1 of 21 images" in said
    assert "damaged.png" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "distill.json",
        "model.safetensors",
        "report.html",
        "run.json",
        "stages",
    ]
    run(["eval", "all", "embedded", "out", "--data", "photos"])
    assert "embedded" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_demo_leaves_no_half_written_file_and_runs_again(tmp_path, monkeypatch):
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = subprocess.Popen(
        [sys.executable, "-m", "cgspn.cli", "demo"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has them, and so this, ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert "results will be in demo" in running.stdout.readline()  # just before the work starts
        time.sleep(2)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()  # where it did not end, it would go on for minutes beside the other tests
    # a shell shows both as 130: CPython ends by the signal itself if it came within an exec of a string, as in imports
    assert running.returncode in (130, -signal.SIGINT)
    assert "interrupted" in said
    assert not (tmp_path / "demo").exists()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time over its own output
        run(["demo", *SMALL])
    names = {p.relative_to(tmp_path / "demo").as_posix() for p in (tmp_path / "demo").rglob("*") if p.is_file()}
    assert {"report.html", "table.json", "c-gspn/config.json", "c-gspn/model.safetensors"} <= names
    assert not any(".tmp" in name or name.startswith(".") for name in names)


STEPS = ["--config.stage1.steps", "1", "--config.stage2.steps", "6", "--config.compute.save-every", "2"]
STEPS += ["--config.stage1.batch-size", "8", "--config.stage2.batch-size", "8"]


@pytest.mark.slow
def test_distill_goes_on_after_an_interruption_and_refuses_other_settings(tmp_path, monkeypatch):
    command = ["distill", "embedded", "run", *STEPS]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "cgspn.cli", *command],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for _ in range(1200):
        if list(tmp_path.glob("run/snapshots/1/0*[24]")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "run/distill.json").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(config\.compression\)"):
        run([*command, "--config.compression", "6"])
    (tmp_path / "run/snapshots/0").mkdir()  # as if the process was killed before it removed those of stage 1
    run(command)
    assert not (tmp_path / "run/snapshots").exists()
    losses = json.loads((tmp_path / "run/distill.json").read_text())["losses"]
    assert [step["step"] for step in losses["student, stage 2"]] == list(range(6))
    with pytest.raises(ValueError, match="out is run, which holds a finished run"):
        run(command)


def test_a_preset_is_where_the_other_settings_start_from(capsys):
    run(["distill", "a", "b", "--preset", "so400m-highres", "--config.stage1.steps", "7", "--show-config"])
    settings = json.loads(capsys.readouterr().out)["config"]
    assert Distill("a", "b", preset="so400m-378").settings.stage2.steps == 56_000
    with pytest.raises(ValueError, match="preset is 'demo'; accepted: 'embedded', "):
        Distill("a", "b", preset="demo")
    assert settings["compression"] == 18
    assert settings["highres"]["sizes"] == [518, 756, 1036]
    assert settings["stage1"]["steps"] == 7
    assert settings["stage2"]["steps"] == 56_000


def test_fields_of_a_range_of_sizes_are_options_of_every_preset(capsys):
    run(["distill", "a", "b", "--sizes", "28", "56", "--config.sizes.count", "3", "--show-config"])
    sizes = json.loads(capsys.readouterr().out)["config"]["sizes"]
    assert (sizes["smallest"], sizes["largest"], sizes["count"]) == (28, 56, 3)
    arguments = ["a", "--sizes", "28", "56", "--config.sizes.largest-share", "0.5"]
    assert parsed(Pretrain, "cgspn pretrain", arguments).config.sizes == SizeRange(28, 56, largest_share=0.5)
    run(["distill", "a", "b", "--show-config"])
    assert json.loads(capsys.readouterr().out)["config"]["sizes"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "train", "--steps", "0"], "steps is 0; accepted: 1 or more"),
        (["bench", "table", "--batches", "1", "0"], "batches is (1, 0); accepted: 1 or more each"),
        (["distill", "a", "b", "--config.stage2.steps", "-1"], "config.stage2: steps is -1; accepted: 0 or more"),
        (["bench", "scaling", "--batches", "1"], "batches is (1,); expected one number for each of the sizes"),
    ],
)
def test_settings_that_refuse_themselves_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cgspn", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert message in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_is_there_before_pytorch_is():
    """`--help` and `--version` import nothing heavy; a second of CPU would be PyTorch's import."""
    code = "import sys, cgspn.cli; sys.argv[1:] = [sys.argv[-1]]; cgspn.cli.main(); assert 'torch' not in sys.modules"
    for option, shown in (("--help", "eval zeroshot"), ("--version", "cgspn 0.")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


def test_help_has_two_levels_and_names_positionals(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            run(["distill", option])
        assert end.value.code == 0
        shown[option] = capsys.readouterr().out
    assert "TEACHER OUT" in shown["--help"]
    assert "--config.stage1.steps" in shown["--help"]
    assert "--config.stage1.warmup" not in shown["--help"]
    assert "--config.stage1.warmup" in shown["--help-all"]
    assert "cgspn distill --help-all" in shown["--help"]


@pytest.mark.parametrize("name", ["all", "zeroshot", "retrieval", "segment"])
@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_models_to_evaluate_are_required_and_have_no_default(name, option, capsys):
    with pytest.raises(SystemExit):
        run(["eval", name, option])
    positionals = capsys.readouterr().out.partition("positional arguments")[2].partition("options")[0]
    assert "(required)" in positionals
    assert "default" not in positionals


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_every_default_is_named(name, option, capsys):
    with pytest.raises(SystemExit):
        run([*name.split(), option])
    assert "(default: )" not in " ".join(capsys.readouterr().out.split())


def test_debug_shows_where_an_error_is_from(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cgspn", "convert", "nowhere", "x", "--debug"])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("cgspn: error: nowhere does not exist")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 18.6 GiB for an array"), "out of memory: cgspn asked for 18.6 GiB"),
        (RuntimeError("DefaultCPUAllocator: you tried to allocate 800 bytes."), "cgspn asked for 800 bytes"),
        (MemoryError(), "asked for more than there is"),
        (OSError(28, "No space left on device"), "disk full: "),
        (KeyError("x"), "KeyError: 'x'; --debug shows where"),
        (ValueError("two\nlines"), "two lines"),
        (ZeroDivisionError(), "ZeroDivisionError: ZeroDivisionError"),
    ],
)
def test_what_is_said_of_an_error(error, said):
    assert said in said_of(error)


def test_names_are_shown_as_they_are(monkeypatch, tmp_path):
    name = "[red]\x1b[31m\udcff"
    command = [sys.executable, "-m", "cgspn.cli", "convert", tmp_path / name, tmp_path / "out"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    found = subprocess.run(command, capture_output=True, env=env)
    assert found.returncode == 2
    assert rb"[red]\x1b[31m\udcff does not exist" in found.stderr
    assert not found.stdout


def test_no_other_file_is_written_over_unasked(monkeypatch, tmp_path, capsys):
    page = tmp_path / "other.json"
    page.write_text("someone's")
    for words in (
        ["show", "embedded", "--out", page],
        ["export", "embedded", tmp_path / "other.onnx"],
        ["eval", "zeroshot", "embedded", "--out", page],
        ["pretrain", tmp_path],
        ["convert", "embedded", tmp_path],
    ):
        for name in ("other.onnx", "other.onnx.json", "config.json"):
            (tmp_path / name).write_text("someone's")
        monkeypatch.setattr("sys.argv", ["cgspn", *map(str, words)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert "--overwrite" in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"someone's"}


def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cgspn", "pretrain", "x"])
    monkeypatch.setattr(Pretrain, "run", lambda _: {}["key"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "cgspn: error: KeyError: 'key'; --debug shows where\n"


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for words, (kind, _) in COMMANDS.items()])
def test_every_usual_setting_exists_and_has_words(kind, words):
    module, _, name = kind.partition(":")
    command = getattr(import_module(f"cgspn.commands.{module}"), name)
    settings = usual_settings(command, command.start([]))
    assert issubclass(command, Command)
    assert len(fields(settings)) >= len(command.usual), words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("bench train --steps few", "Error parsing --steps: invalid literal for int() with base 10: 'few'"),
        ("bench train --steps 0", "Error parsing config: steps is 0; accepted: 1 or more"),
        ("distill a b --presett embedded", "Unrecognized options: --presett, embedded; did you mean --preset?"),
        ("export a b --device tpu", "invalid choice 'tpu' for argument '--device'. Expected one of ('cpu', 'cuda')."),
    ],
)
def test_settings_that_cannot_be_are_one_line_as_all_errors(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cgspn", *arguments.split()])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == f"cgspn: error: {said}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [Export("embedded", Path("x.onnx"), device="cuda"), Pretrain(Path("x"), device="cuda")]
)
def test_a_gpu_that_is_not_there_is_asked_for_in_vain(command):
    with pytest.raises(ValueError, match="device is cuda, but PyTorch finds no CUDA GPU here; accepted: cpu"):
        command.run()
