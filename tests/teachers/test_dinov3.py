"""DINOv3: rotary positions at any size, as transformers computes them, and in students."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import cgspn
from cgspn.models import CheckpointError

transformers = pytest.importorskip("transformers")


def original(folder, **options):
    """A DINOv3 whose weights are all random, saved."""
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        num_register_tokens=3, rope_theta=50.0, **options,
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"use_gated_mlp": True, "hidden_act": "silu"}, {"query_bias": False, "value_bias": False}]
)
@torch.no_grad()
def test_tokens_and_class_equal_the_original_at_any_size(options, tmp_path):
    model = original(tmp_path, **options)
    encoder = cgspn.load_encoder(tmp_path)
    assert (encoder.config.registers, encoder.config.attention.rotary) == (3, 50.0)
    for size in ((32, 32), (24, 56)):
        images = torch.randn(2, 3, *size)
        ours, theirs = encoder(images), model(images)
        torch.testing.assert_close(ours.tokens.flatten(1, 2), theirs.last_hidden_state[:, 4:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.pooled, theirs.pooler_output, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padded_images_have_their_own_positions(tmp_path):
    original(tmp_path)
    encoder = cgspn.load_encoder(tmp_path)
    images = [torch.randn(3, 24, 40), torch.randn(3, 32, 16)]
    for image, together in zip(images, encoder.forward_variable_size(images, method="pad"), strict=True):
        torch.testing.assert_close(together.tokens, encoder(image[None]).tokens[0], rtol=1e-4, atol=1e-4)
    weights = encoder.blocks[0].mixer.weights(*encoder.embed(torch.randn(1, 3, 24, 40)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 19))


def test_a_student_keeps_rotary_attention_and_comes_back(tmp_path):
    original(tmp_path / "teacher")
    student = cgspn.convert(cgspn.load_encoder(tmp_path / "teacher"), compression=4, keep_attention=1).eval()
    student.save_pretrained(tmp_path / "student")
    images = torch.randn(1, 3, 24, 40)
    assert torch.equal(cgspn.load_encoder(tmp_path / "student")(images).tokens, student(images).tokens)
    with pytest.raises(ValueError, match="attention in windows accepts None"):
        cgspn.convert(cgspn.load_encoder(tmp_path / "teacher"), window_attention=1)


def test_a_bare_file_asks_for_a_name(tmp_path):
    original(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="number of heads"):
        cgspn.load_encoder(tmp_path / "bare.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_register_tokens": 4}))
    with pytest.raises(CheckpointError, match="num_register_tokens = 4, and its tensors show 3"):
        cgspn.load_encoder(tmp_path)
