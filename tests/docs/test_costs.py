"""The images on the page of costs are those of the presets."""

from pathlib import Path

import pytest

from cgspn.distill.presets import PRESETS

TEXT = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()


def images(optim):
    return f"{optim.steps * optim.batch_size:,}"


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_states_the_images_of_each_preset(name):
    preset = PRESETS[name]
    assert f"`{name}`" in TEXT
    if name == "embedded":  # one row for both
        both = preset.stage1.steps * preset.stage1.batch_size + preset.stage2.steps * preset.stage2.batch_size
        assert f"{both:,}" in TEXT
    else:
        assert images(preset.stage1) in TEXT
        assert images(preset.stage2) in TEXT
    if preset.highres.sizes:
        assert TEXT.count(images(preset.highres.optim)) == len(preset.highres.sizes)
