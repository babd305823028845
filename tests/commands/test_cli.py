"""The program as a user meets it: exit codes, one clear line, whole files."""

import os
import subprocess
import sys

import pytest

SMALL = ["--config.distill.stage1.steps", "1", "--config.distill.stage2.steps", "1"]
SMALL += ["--config.distill.stage1.batch-size", "8", "--config.distill.stage2.batch-size", "8"]
SMALL += ["--config.test-images", "40", "--config.probe-images", "40"]


def cgspn(*arguments, cwd):
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cgspn.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_shows_examples(tmp_path):
    result = cgspn("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "demo" in result.stdout
    assert "cgspn demo" in cgspn("demo", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "file"], "out is file, where nothing can be written"),
        (["demo", "--config.test-images", "0"], "test_images is 0; accepted: 1 to 4000"),
        (["demo", "--config.distill.compression", "97"], "compression is 97"),
        (["pretrain", "x", "--config.model", "vit_mni_patch4_28"], "did you mean"),
        (["pretrain", "x", "--config.optim.batch-size", "0"], "batch_size is 0"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = cgspn(*arguments, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert message in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_demo_runs_twice_over_its_own_output(tmp_path):
    for _ in range(2):
        result = cgspn("demo", *SMALL, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    names = {p.relative_to(tmp_path / "demo").as_posix() for p in (tmp_path / "demo").rglob("*") if p.is_file()}
    assert {"report.html", "table.json", "c-gspn/config.json", "c-gspn/model.safetensors"} <= names
    assert not any(".tmp" in name or name.startswith(".") for name in names)
