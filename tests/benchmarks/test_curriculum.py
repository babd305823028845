"""The study of higher resolutions, in small."""

from pathlib import Path

import pytest
import torch
from benchmarks.resolution.curriculum import VARIANTS, CurriculumConfig, base, higher, measured

from cgspn.data import load_embedded
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, model_config


def test_every_variant_is_a_run():
    start = base(CurriculumConfig(Path("teacher"), ("photos",)), "mixed", 0, False)
    for variant in VARIANTS.values():
        config = higher(start, variant, 240)
        assert config.stage1.steps == config.stage2.steps == 0
        assert config.highres.optim.steps * len(config.highres.sizes) == 240
        assert config.highres.optim.learning_rate == pytest.approx(2.5e-4 * variant.rate)


def test_each_row_is_measured_at_each_size(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small = {"width": 36, "mixers": ("attention",) * 2, "mlp_hidden": 48, "attention": AttentionConfig(heads=2)}
    teacher = Encoder(model_config("vit_mini_patch4_28", **small)).eval()
    train = load_embedded("train").subset(torch.arange(64))
    config = CurriculumConfig(
        Path(), (), ("values 6",), ("a", "b"), (0,), ("fixed",), 28, px=(28, 44), steps=(1, 2, 2), batch_size=8
    )
    variants = {name: VARIANTS["448: + smaller sizes"].__class__((44,), images=8, carried=name == "a") for name in "ab"}
    monkeypatch.setattr("benchmarks.resolution.curriculum.VARIANTS", variants)
    rows = list(measured(config, teacher, train, train.images[:4], tmp_path))
    assert [(row["variant"], row["px"]) for row in rows] == [(v, px) for v in ("before", "a", "b") for px in (28, 44)]
    assert len({row["cosine"] for row in rows}) == 6
