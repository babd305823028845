"""Settings of every measurement that it cannot have are refused when they are given, by the argument's name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from cgspn.bench.contenders import Shape
from cgspn.bench.encoder import EncoderBenchConfig
from cgspn.bench.scaling import ScalingConfig
from cgspn.bench.table import TableConfig, run
from cgspn.bench.train import TrainBenchConfig

ONE, EACH = "accepted: 1 or more", "accepted: 1 or more each"
TILES = "accepted: multiples of the patch size 14"
WRONG: list[tuple[type, dict[str, Any], str]] = [
    (Shape, {"width": 0}, f"width is 0; {ONE}"),
    (Shape, {"heads": 0}, f"heads is 0; {ONE}"),
    (Shape, {"hidden": 0}, f"hidden is 0; {ONE}"),
    (Shape, {"patch": 0}, f"patch is 0; {ONE}"),
    (Shape, {"compression": 2000}, "compression is 2000; a width of 1152 accepts 0.015625 to 1152"),
    (TableConfig, {"batches": (0,)}, f"batches is (0,); {EACH}"),
    (TableConfig, {"rounds": 0}, f"rounds is 0; {ONE}"),
    (TableConfig, {"sizes": (378, 380)}, f"sizes holds 380; {TILES}"),
    (TableConfig, {"sizes": (0,)}, f"sizes holds 0; {TILES}"),
    (TableConfig, {"sizes": ()}, "sizes is empty; expected one or more"),
    (EncoderBenchConfig, {"batch": 0}, f"batch is 0; {ONE}"),
    (EncoderBenchConfig, {"rounds": 0}, f"rounds is 0; {ONE}"),
    (EncoderBenchConfig, {"sizes": (1000,)}, f"sizes holds 1000; {TILES}"),
    (EncoderBenchConfig, {"largest": ((4116, 0),)}, f"largest is ((4116, 0),); {EACH}"),
    (EncoderBenchConfig, {"largest": ((4117, 1),)}, f"largest holds 4117; {TILES}"),
    (
        EncoderBenchConfig,
        {"models": ("vit_mni_patch4_28",)},
        "models: model is 'vit_mni_patch4_28', which does not",
    ),
    (EncoderBenchConfig, {"models": ("vit_mini_patch4_28+int8",)}, "ends in 'int8'"),
    (ScalingConfig, {"steps": 1}, "steps is 1; accepted: 2 or more"),
    (ScalingConfig, {"batches": (64, 0)}, f"batches is (64, 0); {EACH}"),
    (ScalingConfig, {"check_batch": 0}, f"check_batch is 0; {ONE}"),
    (ScalingConfig, {"link": 0}, f"link is 0; {ONE}"),
    (ScalingConfig, {"check_size": 380}, f"check_size is 380; {TILES}"),
    (ScalingConfig, {"sizes": (378, 0)}, f"sizes holds 0; {TILES}"),
    (
        ScalingConfig,
        {"student": "cgspn_mni_patch4_28"},
        "student: model is 'cgspn_mni_patch4_28', which does not",
    ),
    (TrainBenchConfig, {"teacher": "vit_mni_patch4_28"}, "teacher: model is 'vit_mni_patch4_28', which does not"),
    (TrainBenchConfig, {"steps": 0}, f"steps is 0; {ONE}"),
    (TrainBenchConfig, {"largest": 0}, f"largest is 0; {ONE}"),
    (TrainBenchConfig, {"smallest": 0}, f"smallest is 0; {ONE}"),
    (TrainBenchConfig, {"sizes": (1,)}, f"sizes holds 1; {TILES}"),
]


@pytest.mark.parametrize(("kind", "given", "message"), WRONG)
def test_what_cannot_be_measured_is_refused_by_name(kind: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**given)


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _, _ in WRONG))
def test_help_has_words_for_every_setting(kind: type) -> None:
    for field in fields(kind):
        assert re.search(rf"^ {{8}}{field.name}: ", kind.__doc__ or "", re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contenders": ("Mamba",)}, "'Mamba' is not a contender"),
        ({"shape": Shape(heads=7)}, "heads is 7; a width of 1152 accepts its divisors"),
    ],
)
def test_a_contender_that_cannot_be_is_refused_before_others_are_timed(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cgspn.bench.table.ceilings", lambda _: pytest.fail("measured already"))
    with pytest.raises(ValueError, match=message):
        run(TableConfig(**given), tmp_path, torch.device("cpu"))
