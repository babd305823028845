"""What is recognised without any other library, and what wrong files are told."""

import pytest
import torch
from parity import relative
from safetensors.torch import save_file

import cgspn
from cgspn.models import CheckpointError

C = 32


def linear(name, rows, columns):
    return {f"{name}.weight": torch.randn(rows, columns) * columns**-0.5, f"{name}.bias": torch.randn(rows) * 0.1}


def norm(name):
    return {f"{name}.weight": torch.rand(C) + 0.5, f"{name}.bias": torch.randn(C) * 0.1}


def timm_state(*, classes=1, registers=0, scale=False, pre_norm=False, pool=False, positions=16 + 1):
    state = {"patch_embed.proj.weight": torch.randn(C, 3, 14, 14) * 0.05, "pos_embed": torch.randn(1, positions, C)}
    if not pre_norm:
        state["patch_embed.proj.bias"] = torch.randn(C)
    if classes:
        state["cls_token"] = torch.randn(1, 1, C)
    if registers:
        state["reg_token"] = torch.randn(1, registers, C)
    for i in range(2):
        b = f"blocks.{i}."
        state |= norm(b + "norm1") | linear(b + "attn.qkv", 3 * C, C) | linear(b + "attn.proj", C, C)
        state |= norm(b + "norm2") | linear(b + "mlp.fc1", 64, C) | linear(b + "mlp.fc2", C, 64)
        if scale:
            state |= {b + "ls1.gamma": torch.randn(C), b + "ls2.gamma": torch.randn(C)}
    if pre_norm:
        state |= norm("norm_pre")
    if pool:
        state["attn_pool.latent"] = torch.randn(1, 1, C)
        state |= linear("attn_pool.q", C, C) | linear("attn_pool.kv", 2 * C, C) | linear("attn_pool.proj", C, C)
        state |= norm("attn_pool.norm") | linear("attn_pool.mlp.fc1", 64, C) | linear("attn_pool.mlp.fc2", C, 64)
    return state | norm("norm")


def openclip_state(prefix="visual."):
    state = {
        "conv1.weight": torch.randn(C, 3, 14, 14) * 0.05,
        "class_embedding": torch.randn(C),
        "positional_embedding": torch.randn(17, C),
        "proj": torch.randn(C, 24) * C**-0.5,
    }
    for i in range(2):
        b = f"transformer.resblocks.{i}."
        packed = linear("x", 3 * C, C)
        state |= {b + "attn.in_proj_weight": packed["x.weight"], b + "attn.in_proj_bias": packed["x.bias"]}
        state |= norm(b + "ln_1") | linear(b + "attn.out_proj", C, C) | norm(b + "ln_2")
        state |= linear(b + "mlp.c_fc", 64, C) | linear(b + "mlp.c_proj", C, 64)
    state = {prefix + key: value for key, value in (state | norm("ln_pre") | norm("ln_post")).items()}
    if not prefix:  # the text tower's keys have no prefix either: a bare image tower is alone in its file
        return state
    return state | {"logit_scale": torch.tensor(1.0), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}


def trunk(state):
    return {"visual.trunk." + key: value for key, value in state.items()} | {"logit_bias": torch.tensor(-10.0)}


CASES = {
    "timm dinov2": (lambda: timm_state(scale=True), {"layer_scale": 1e-5, "pooling": "cls", "norm_eps": 1e-6}),
    "timm registers": (lambda: timm_state(scale=True, registers=4, positions=16), {"registers": 4}),
    "timm clip": (
        lambda: timm_state(pre_norm=True) | linear("head", 24, C),
        {"pre_norm": True, "embed_dim": 24, "embed_bias": True, "patch_bias": False, "norm_eps": 1e-5},
    ),
    "timm classifier": (lambda: timm_state() | linear("head", 1000, C), {"embed_dim": None, "pre_norm": False}),
    "timm siglip": (lambda: timm_state(classes=0, positions=16, pool=True), {"pooling": "map", "class_token": False}),
    "timm mean": (
        lambda: {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in timm_state().items()},
        {"pool_norm": True, "final_norm": False},
    ),
    "openclip siglip": (lambda: trunk(timm_state(classes=0, positions=16, pool=True)), {"pooling": "map"}),
    "openclip clip": (openclip_state, {"embed_dim": 24, "activation": "gelu", "pooling": "cls"}),
    "openclip tower": (lambda: openclip_state(""), {"embed_dim": 24, "position_resize": "bicubic_antialias"}),
}


@pytest.mark.parametrize("name", CASES)
def test_families_are_recognised_and_convert(name, tmp_path):
    torch.manual_seed(0)
    make, expected = CASES[name]
    state = make()
    save_file(state, tmp_path / "w.safetensors")
    encoder = cgspn.load_encoder(tmp_path / "w.safetensors", heads=2)
    for field, value in expected.items():
        assert getattr(encoder.config, field) == value, field
    assert encoder.config.image_size == (56, 56)
    assert encoder.config.depth == 2
    encoder.save_pretrained(tmp_path / "own")
    images = torch.randn(1, 3, 42, 70)
    own = cgspn.load_encoder(tmp_path / "own")
    assert relative(own(images).pooled, encoder(images).pooled) < 1e-6  # alignment in memory changes sums
    out = cgspn.convert(encoder, compression=4)(images)
    assert out.tokens.isfinite().all()
    assert out.pooled.isfinite().all()
    assert out.pooled.shape == encoder(images).pooled.shape


def test_file_names_and_configs_tell_the_activation(tmp_path):
    save_file(openclip_state(), tmp_path / "vit_b_32-openai.safetensors")
    assert cgspn.load_encoder(tmp_path / "vit_b_32-openai.safetensors", heads=2).config.activation == ("quick_gelu")
    save_file(openclip_state(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 24, "quick_gelu": true, "vision_cfg": {"layers": 2, "head_width": 16, '
        '"image_size": 60}}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}'
    )
    config = cgspn.load_encoder(tmp_path).config
    assert (config.activation, config.attention.heads, config.image_mean) == ("quick_gelu", 2, (0.1, 0.2, 0.3))
    assert (config.image_size, config.crop_remainder) == ((60, 60), True)


def test_metadata_and_own_keys_tell_the_resize(tmp_path):
    path = tmp_path / "w.safetensors"
    for metadata, extra, expected in (
        ({}, {}, "bicubic_antialias"),
        ({"pos_embed": "37x37, bicubic resize without antialias"}, {}, "bicubic"),
        ({}, {"mask_token": torch.zeros(1, C)}, "bicubic"),
    ):
        save_file(timm_state(scale=True) | extra, path, metadata=metadata)
        assert cgspn.load_encoder(path, heads=2).config.position_resize == expected


def test_wrong_files_say_what_was_expected_and_found(tmp_path):
    path = tmp_path / "w.safetensors"
    state = timm_state(scale=True)
    save_file(state, path)
    whole = path.read_bytes()
    for cut, message in ((len(whole) // 2, "truncated"), (5, "truncated"), (0, "truncated")):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=message):
            cgspn.load_encoder(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        cgspn.load_encoder(path)
    (tmp_path / "w.pt").write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="cannot be read as a file with only tensors"):
        cgspn.load_encoder(tmp_path / "w.pt")
    save_file({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"not a known kind .* begin with conv.weight"):
        cgspn.load_encoder(path)
    part = {k: v for k, v in state.items() if "attn.qkv" not in k}
    save_file(part, path)
    with pytest.raises(CheckpointError, match=r"nearest to timm's vision transformer, but has no blocks.0.attn.qkv"):
        cgspn.load_encoder(path)
    part = {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"} | {"blocks.1.extra.weight": torch.zeros(2)}
    save_file(part, path)
    with pytest.raises(CheckpointError, match=r"missing blocks.1.mlp.fc2.bias; unexpected blocks.1.extra.weight"):
        cgspn.load_encoder(path, heads=2)
    save_file(state | {"norm.weight": torch.zeros(C + 1)}, path)
    with pytest.raises(CheckpointError, match=r"norm.weight: \(33,\) where \(32,\) is expected"):
        cgspn.load_encoder(path, heads=2)
    with pytest.raises(CheckpointError, match="does not exist"):
        cgspn.load_encoder(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a weight file"):
        cgspn.load_encoder(tmp_path / "notes.txt")
