"""MLPs in 8 bits: every row of the times runs, where 8 bits are emulated."""

import json

import torch
from benchmarks.fp8 import precisions, speed

from cgspn.bench.contenders import Shape
from cgspn.models import create_model


def test_every_row_has_a_time(tmp_path):
    tables = speed(tmp_path, (28,), 1, 1, Shape(width=32, heads=2, hidden=64, compression=4), "abc")
    assert json.loads((tmp_path / "speed.json").read_text())["machine"]["commit"] == "abc"
    halves, blocks = tables.values()
    assert {row["MLP half"] for row in halves} >= {"bf16, epilogues", "fp8"}
    assert all(row["ms"] > 0 for row in halves)
    timed = {row["block"]: row.get("ms") for row in blocks}
    assert timed["C-GSPN, MLP fp8"] > 0


def test_8_bits_are_close_to_32():
    torch.manual_seed(0)
    models = precisions(create_model("cgspn_mini_patch4_28").eval())
    images = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        wanted = models["float32"](images).pooled
        found = models["float32, MLPs in fp8"](images).pooled
    assert 0 < ((found - wanted).norm() / wanted.norm()).item() < 0.1
