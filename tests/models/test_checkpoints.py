"""Checkpoints are whole or absent, and wrong ones say what is wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import cgspn
from cgspn.layers import AttentionConfig
from cgspn.models import CheckpointError, TextConfig, build_dual, model_config, tokenize
from cgspn.models.checkpoint import save_model, write_atomically
from cgspn.teachers import load_model

TINY = {
    "width": 32,
    "mixers": ("attention", "propagation"),
    "mlp_hidden": 64,
    "image_size": (8, 8),
    "attention": AttentionConfig(heads=2),
}


@pytest.fixture
def dual():
    torch.manual_seed(0)
    return build_dual(model_config("cgspn_mini_patch4_28", **TINY), TextConfig(width=16, depth=1, heads=2), 8).eval()


def test_an_image_text_model_comes_back_as_it_was(dual, tmp_path):
    dual.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    images, texts = torch.randn(2, 3, 8, 12), ["a bag", "a photo of an ankle boot"]
    assert torch.equal(loaded.encode_image(images), dual.encode_image(images))
    assert torch.equal(loaded.encode_text(texts), dual.encode_text(texts))
    assert torch.equal(cgspn.load_encoder(tmp_path)(images).pooled, dual.image(images).pooled)


def test_wrapped_and_shared_weights_are_saved_under_their_names(dual, tmp_path):
    encoder = dual.image
    encoder.blocks[1].norm1.weight = encoder.norm.weight
    for i, block in enumerate(encoder.blocks):
        encoder.blocks[i] = torch.compile(block, backend="eager")
    encoder.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(cgspn.load_encoder(tmp_path)(images).pooled, encoder(images).pooled)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: prune.identity(e.blocks[0].mlp.fc1, "weight"), r"lacks .*fc1.weight; .*fc1.weight_mask"),
        (lambda e: e.blocks[0].add_module("lora", nn.Linear(2, 2)), r"unexpectedly, .*blocks.0.lora.bias"),
        (lambda e: e.to("meta"), "patch_embed.projection.weight is without values, on the meta device"),
        (lambda e: e.norm.weight.data.fill_(1e6), "norm.weight holds values that are not finite"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(dual, tmp_path, spoil, message):
    spoil(dual.image)
    with pytest.raises(CheckpointError, match=message):
        dual.save_pretrained(tmp_path / "out", dtype=torch.float16)
    if "finite" not in message:
        with pytest.raises(CheckpointError, match=message):
            dual.image.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_in_a_batch_do_not_see_each_other(dual):
    alone = dual.encode_text(["a bag"])
    together = dual.encode_text(["a bag", "a much longer caption of an ankle boot"])[:1]
    torch.testing.assert_close(alone, together)
    assert not torch.allclose(alone, dual.encode_text(["a tag"]))


def test_tokenize_pads_cuts_and_refuses_nothing_silently():
    ids = tokenize(["AB", "abcd"], 3)
    assert ids.tolist() == [[98, 99, 0], [98, 99, 100]]
    for texts in ([], ["a", ""]):
        with pytest.raises(ValueError, match="texts is"):
            tokenize(texts, 8)


def test_with_image_copies_and_does_not_share(dual):
    other = dual.with_image(cgspn.convert(dual.image, compression=4))
    assert torch.equal(other.encode_text(["a bag"]), dual.encode_text(["a bag"]))
    with torch.no_grad():
        other.logit_scale.add_(1)
    assert other.logit_scale != dual.logit_scale
    with pytest.raises(ValueError, match="image has width 96; expected 32"):
        dual.with_image(cgspn.create_model("cgspn_mini_patch4_28"))


def test_wrong_folders_say_what_is_wrong(dual, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json and no model.safetensors"):
        cgspn.load_encoder(tmp_path)
    dual.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_model(tmp_path)
    config["encoder"]["depht"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="EncoderConfig has no depht"):
        load_model(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    write_atomically(target, "old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, "new")
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, {}, {"w": torch.zeros(3)})
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
