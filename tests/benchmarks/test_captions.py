"""The study of captions beside distillation, in small."""

import io
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.resolution.captions import (
    WAYS,
    CaptionsConfig,
    base,
    beyond,
    load_captioned,
    measured,
    pooling_its_tokens,
    variant_of,
    with_text_tower,
    zero_shot,
)
from PIL import Image

from cgspn.data import load_embedded
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, TextConfig, model_config

CONFIG = CaptionsConfig(Path(), (), (), Path(), row="values 6", size=28, px=(28, 44), steps=(1, 2, 2), batch_size=8)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    small = {"width": 36, "mixers": ("attention",) * 2, "mlp_hidden": 48, "attention": AttentionConfig(heads=2)}
    return Encoder(model_config("vit_mini_patch4_28", **small, pooling="cls", class_token=True)).eval()


@pytest.fixture(autouse=True)
def small_text_tower(monkeypatch):
    monkeypatch.setattr("benchmarks.resolution.captions.TEXT", TextConfig(width=16, depth=1, heads=2))


@pytest.fixture(scope="module")
def images():
    return load_embedded("train").subset(torch.arange(64))


def test_every_variant_is_a_run_and_captions_are_compared_in_whole_batches():
    gpu = base(CONFIG, 0, True)
    for title in WAYS:
        variant = variant_of(CONFIG, title)
        config = beyond(gpu, variant, 90)
        assert config.highres.sizes == ((448, 756, 1036) if title.startswith("curriculum") else (1036,))
        assert config.highres.optim.steps * len(config.highres.sizes) == 90
        assert config.highres.optim.learning_rate == pytest.approx(2.5e-5)
        assert config.compute.capture is ("captions" not in title)
        assert config.loss.contrastive == (0.1 if "captions" in title else 0)
        assert (config.highres.teacher == "none") is title.endswith(", captions")
        assert config.highres.optim.accumulate == (1 if "captions" in title else 2)


def test_the_names_are_those_of_the_captions(tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number, name in enumerate(("tench", "car side", "tench")):
            picture = io.BytesIO()
            Image.new("RGB", (20, 30), (number, 0, 0)).save(picture, "png")
            for ending, content in (("png", picture.getvalue()), ("txt", f"a photo of a {name}.".encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    found = load_captioned([tmp_path / "photos.tar"], 16, torch.device("cpu"))
    assert found.class_names == ("car side", "tench")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.images.shape == (3, 3, 16, 16)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_the_image_vector_is_the_mean_of_the_tokens(teacher):
    batch = torch.rand(2, 3, 28, 28)
    whole, mean = teacher(batch), pooling_its_tokens(teacher)(batch)
    torch.testing.assert_close(mean.tokens, whole.tokens)
    torch.testing.assert_close(mean.pooled, whole.tokens.mean((1, 2)))


def test_a_text_tower_learns_to_name_what_the_encoder_sees(teacher, images):
    few = replace(images, class_names=tuple(name.lower() for name in images.class_names))
    encoder = pooling_its_tokens(teacher)
    before, after = (with_text_tower(encoder, few, (28,), steps) for steps in (0, 40))
    assert zero_shot(after, encoder, few, 28) > zero_shot(before, encoder, few, 28) + 20
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), after.image.parameters()))


def test_each_row_is_measured_at_each_size(teacher, images):
    encoder = pooling_its_tokens(teacher)
    dual = with_text_tower(encoder, images, CONFIG.px, 2)
    chosen = WAYS[0], WAYS[-1]
    config = replace(CONFIG, higher=(32, 44), variants=chosen)
    rows = list(measured(config, dual, images, images, images, images.images[:4]))
    titles = ("", "before", *chosen)
    assert [(row["variant"], row["px"]) for row in rows] == [(title, px) for title in titles for px in (28, 44)]
    assert len({row["cosine"] for row in rows[2:]}) == 6
    assert all(row["cosine"] == pytest.approx(1) and math.isfinite(row["zero-shot"]) for row in rows[:2])
