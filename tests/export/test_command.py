"""`cgspn export` as a user meets it: a table, a file with its description, or one line and nothing left behind."""

import json
import os
import subprocess
import sys

import pytest

from cgspn.commands.export import Export
from cgspn.export import load_exported
from cgspn.teachers import load_model


def cgspn(*arguments, cwd):
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "cgspn.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_wrong_input_gives_one_line_and_exit_code_2(tmp_path):
    result = cgspn("export", "embedded", "x.onnx", "--max-size", "57", cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert "max_size is 57; accepted: multiples of the patch size 4" in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 30])
def test_a_fixed_size_is_named_as_given(size, tmp_path):
    with pytest.raises(ValueError, match=f"^size is {size}; accepted: multiples of the patch size 4"):
        Export("embedded", tmp_path / "x.onnx", size=size).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_embedded_teacher_becomes_a_file_with_a_table_of_errors(format, tmp_path):
    name = "teacher.onnx" if format == "onnx" else "teacher.pt2"
    result = cgspn("export", "embedded", name, "--format", format, "--max-size", "40", "--max-batch", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"wrote {name} and {name}.json" in result.stdout
    for step in ("tracing the encoder", "opening the file", "comparing the outputs for 1 x 40 x 40"):
        assert step in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.json"]
    description = json.loads((tmp_path / f"{name}.json").read_text())
    assert description["normalisation"]["mean"] == list(load_model("embedded").image.config.image_mean)
    assert {"tokens", "pooled", "embedding"} == set(description["parity"][0]["relative_error"])
    assert max(max(row["relative_error"].values()) for row in description["parity"]) < 1e-5
    assert load_exported(tmp_path / name) is not None
