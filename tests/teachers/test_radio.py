"""RADIO from a file of its layout, against its arithmetic written out by hand."""

import json

import pytest
import torch
from parity import relative
from safetensors.torch import save_file
from torch.nn.functional import gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

import cgspn
from cgspn.models import CheckpointError

C, P, SIDE, HEADS, TOKENS, DEPTH = 32, 4, 12, 2, 6, 2
SUMMARY = [0, 2]


def radio_state(scale="ls1.gamma"):
    torch.manual_seed(0)
    shapes = {
        "patch_generator.embedder.weight": (C, 3 * P * P),
        "patch_generator.pos_embed": (1, SIDE * SIDE, C),
        "patch_generator.cls_token.token": (TOKENS, C),
    }
    for i in range(DEPTH):
        for name, shape in {
            "attn.qkv": (3 * C, C),
            "attn.proj": (C, C),
            "mlp.fc1": (2 * C, C),
            "mlp.fc2": (C, 2 * C),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", scale, scale.replace("1", "2")):
            shapes[f"blocks.{i}.{name}"] = (C,)
    state = {f"radio_model.model.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    state |= {
        f"radio_model.input_conditioner.norm_{name}": torch.full((3, 1, 1), v)
        for name, v in (("mean", 0.4), ("std", 0.2))
    }
    state["radio_model.adaptors.clip.head_mlp.fc1.weight"] = torch.zeros(2, 2)
    return state | {"radio_model.summary_idxs": torch.tensor(SUMMARY)}


def by_hand(state, images, corners):
    """Features [B, N, C] and the summary of normalised images."""
    w = {key.removeprefix("radio_model.model."): value for key, value in state.items()}
    h, wide = images.shape[2] // P, images.shape[3] // P
    patches = images.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).reshape(len(images), h * wide, -1)
    table = w["patch_generator.pos_embed"].view(1, SIDE, SIDE, C).permute(0, 3, 1, 2)
    side = max(h, wide)
    if (h, wide) != (SIDE, SIDE):
        table = interpolate(table, (side, side), mode="bilinear", align_corners=corners)[:, :, :h, :wide]
    x = linear(patches, w["patch_generator.embedder.weight"]) + table.flatten(2).mT
    x = torch.cat([w["patch_generator.cls_token.token"].expand(len(images), -1, -1), x], 1)
    for i in range(DEPTH):
        b = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        normal = layer_norm(x, (C,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = (
            linear(normal, b["attn.qkv.weight"], b["attn.qkv.bias"]).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + b["ls1.gamma"] * linear(mixed, b["attn.proj.weight"], b["attn.proj.bias"])
        normal = layer_norm(x, (C,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        hidden = gelu(linear(normal, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * linear(hidden, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x[:, TOKENS:], x[:, SUMMARY].flatten(1)


@pytest.mark.parametrize(
    ("version", "corners"),
    [("radio_v2.5-h", True), ("c-radio_v3-b", True), ("c-radio_v3-g", False), ("c-radio_v4-h", False)],
)
def test_parity_at_any_size_from_the_file_alone(version, corners, tmp_path):
    state = radio_state()
    save_file(state, tmp_path / "model.safetensors")
    stated = {"version": version, "preferred_resolution": [24, 24], "model_type": "", "auto_map": {"AutoModel": "x.y"}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    encoder = cgspn.load_encoder(tmp_path, heads=HEADS)
    config = encoder.config
    assert (config.image_size, config.position_grid, config.registers) == ((24, 24), (SIDE, SIDE), TOKENS - 1)
    assert config.image_mean == pytest.approx((0.4,) * 3)
    assert config.pooled_width == 2 * C
    for size in ((24, 24), (12, 28), (SIDE * P, SIDE * P), (40, 60)):
        images = torch.randn(2, 3, *size)
        tokens, summary = by_hand(state, images, corners)
        with torch.no_grad():
            ours = encoder(images)
        assert relative(ours.tokens.flatten(1, 2), tokens) < 1e-5, size
        assert relative(ours.pooled, summary) < 1e-5, size


def test_padded_batches_crop_positions_image_by_image(tmp_path):
    save_file(radio_state(), tmp_path / "x.safetensors")
    encoder = cgspn.load_encoder(tmp_path / "x.safetensors", heads=HEADS)
    images = [torch.randn(3, 12, 28), torch.randn(3, 20, 8)]
    with torch.no_grad():
        padded = encoder.forward_variable_size(images, method="pad", max_shapes=1)
        for image, out in zip(images, padded):
            assert relative(out.tokens, encoder(image[None]).tokens[0]) < 1e-5


def test_students_of_radio_answer_with_its_summary_and_keep_nothing_of_its_tokens(tmp_path):
    save_file(radio_state("ls1.grandma"), tmp_path / "radio_v2.5-b.safetensors")
    teacher = cgspn.load_encoder(tmp_path / "radio_v2.5-b.safetensors", heads=HEADS, image_size=(24, 24))
    student = cgspn.convert(teacher, compression=4, keep_attention=1)
    images = torch.randn(1, 3, 24, 40)
    assert student(images).pooled.shape == teacher(images).pooled.shape == (1, 2 * C)
    student.save_pretrained(tmp_path / "student")
    again = cgspn.load_encoder(tmp_path / "student")
    assert relative(again(images).pooled, student.eval()(images).pooled) < 1e-5
    teacher.save_pretrained(tmp_path / "teacher")
    assert relative(cgspn.load_encoder(tmp_path / "teacher")(images).pooled, teacher(images).pooled) < 1e-6


def test_what_is_not_computed_is_refused(tmp_path):
    state = radio_state() | {"radio_model.feature_normalizer.mean": torch.zeros(C)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="normalises its features"):
        cgspn.load_encoder(tmp_path / "x.safetensors", heads=HEADS)
