"""The speed half of the frontier: large encoders of the designs whose quality is measured on twelve layers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from benchmarks.frontier.speed import LARGE, config_of
from benchmarks.resolution.students import STUDENTS

from cgspn.models.encoder import Encoder
from cgspn.models.registry import model_config


@pytest.mark.parametrize(
    ("name", "attention", "windows"),
    [
        ("ViT", 27, 0),
        ("frontier: values 6", 0, 0),
        ("frontier: attention in 1", 2, 0),
        ("frontier: attention in 3", 7, 0),
        ("frontier: attention in 3, spread", 7, 0),
        ("frontier: attention in 6", 14, 0),
        ("frontier: windows in 12", 0, 27),
        ("frontier: windows in 9, whole in 3", 7, 20),
        ("frontier: windows in 6, whole in 3, C-GSPN in 3", 7, 14),
    ],
)
def test_a_large_encoder_has_the_same_share_of_each_kind(name, attention, windows):
    """Of 27 layers as of 12: three layers of twelve are seven of 27, not three."""
    with torch.device("meta"):
        encoder = Encoder(config_of(STUDENTS[name], replace(model_config(LARGE), image_size=(224, 224))))
    kinds = Counter(type(block.mixer).__name__ for block in encoder.blocks)
    rest = 27 - attention - windows
    expected = {"AttentionMixer": attention, "WindowAttentionMixer": windows, "PropagationMixer": rest}
    assert kinds == {kind: count for kind, count in expected.items() if count}
