"""A stated architecture is believed; tensors that may be those of another one are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_recognition import linear, timm_state

import cgspn
from cgspn.models import CheckpointError


def state_of(width=None, **options):
    """A tiny timm state dict, its width another one if given."""
    torch.manual_seed(0)
    found = timm_state(**options)
    if width is None:
        return found
    return {
        k: torch.randn([{32: width, 96: 3 * width}.get(n, n) for n in v.shape]) * width**-0.5 for k, v in found.items()
    }


def load(folder, state, config=None, name="model.safetensors", **options):
    save_file(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        return cgspn.load_encoder(folder, **options)
    return cgspn.load_encoder(folder / name, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_pe_core_base_patch16_224.fb", "rotary positions"),
        ("vit_pe_spatial_large_patch14_448", "rotary positions"),
        ("eva02_base_patch14_448.mim", "rotary positions"),
        ("beitv2_base_patch16_224", "relative position biases"),
        ("vit_base_patch16_rpn_224", "norms after its branches"),
        ("vit_base_patch16_xp_224", "side by side"),
        ("aimv2_large_patch14_224", "RMSNorm"),
    ],
)
def test_what_no_tensor_shows_is_refused_by_name(name, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, state_of(), {"architecture": name}, heads=2)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, state_of(), name=f"{name}.safetensors", heads=2)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, state_of(), {"model_type": "llava", "vision_config": {"architecture": name}}, heads=2)


def test_what_may_be_another_architecture_is_refused_without_a_name(tmp_path):
    perception = state_of(pre_norm=True) | linear("attn_pool.q", 32, 32) | {"attn_pool.latent": torch.zeros(1, 1, 32)}
    with pytest.raises(CheckpointError, match="may be a Perception Encoder"):
        load(tmp_path, perception, heads=2)
    post = {k: v for k, v in state_of(classes=0, positions=16).items() if "qkv.bias" not in k}
    with pytest.raises(CheckpointError, match="before its branches or after"):
        load(tmp_path, post, heads=2)
    assert load(tmp_path, post, name="vit_base_patch16_gap_224.safetensors", heads=2).config.pooling == "mean"
    rotary = {k: v for k, v in state_of().items() if k != "pos_embed"}
    with pytest.raises(CheckpointError, match="no table of positions"):
        load(tmp_path, rotary, heads=2)
    assert not load(tmp_path, rotary, {"architecture": "vit_x", "model_args": {"pos_embed": "none"}}, heads=2).positions
    with pytest.raises(CheckpointError, match="relative position biases"):
        load(tmp_path, state_of() | {"blocks.0.attn.relative_position_bias_table": torch.zeros(9, 2)}, heads=2)


def test_heads_that_cannot_be_known_are_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="width is 128, and no config states the number of heads"):
        load(tmp_path, state_of(128))
    assert load(tmp_path, state_of(128), heads=4).config.attention.heads == 4
    assert load(tmp_path, state_of(192)).config.attention.heads == 3  # every published model of this width
    named = {"architecture": "vit_wee_patch16_reg1_gap_256"}
    assert load(tmp_path, state_of(256), named).config.attention.heads == 4
    stated = {"architecture": "vit_x", "model_args": {"num_heads": 8}}
    assert load(tmp_path, state_of(256), stated).config.attention.heads == 8
    either = state_of(768, classes=0, positions=16)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="width is 768"):
        load(tmp_path, either)
    assert load(tmp_path, either, name="vit_base_patch16_gap_224.pt.safetensors").config.attention.heads == 16


def test_arguments_and_activations_that_are_stated_count(tmp_path):
    for args, message in (
        ({"qk_norm": True}, "qk_norm = True"),
        ({"act_layer": "relu"}, "act_layer 'relu'"),
        ({"attn_layer": "diff"}, "attn_layer = 'diff'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path, state_of(), {"architecture": "vit_x", "model_args": args}, heads=2)
    quick = {"architecture": "vit_x", "model_args": {"act_layer": "quick_gelu", "qk_norm": False}}
    assert load(tmp_path, state_of(), quick, heads=2).config.activation == "quick_gelu"


def test_a_norm_after_the_pooling_is_a_sign_of_a_mean(tmp_path):
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in state_of().items()}
    config = load(tmp_path, state, heads=2).config
    assert (config.pooling, config.pool_norm, config.class_token) == ("mean", True, True)


@pytest.mark.parametrize(
    ("rows", "stated", "embed"),
    [(512, None, 512), (37, None, None), (1000, None, None), (397, None, None), (512, {"label_names": ["a"]}, None)],
)
def test_a_classifier_is_not_taken_for_a_projection(rows, stated, embed, tmp_path):
    state = state_of(768, pre_norm=True) | linear("head", rows, 768)
    config = None if stated is None else {"architecture": "vit_base_patch16_clip_224", **stated}
    assert load(tmp_path, state, config).config.embed_dim == embed


@pytest.mark.parametrize("name", ["qwen3_vit_88m", "hiera_base_224", "cait_s24_224", "resnet50"])
def test_a_stated_architecture_that_is_no_plain_vit_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"rotary positions|none of timm's plain ViTs"):
        load(tmp_path, state_of(), {"architecture": name}, heads=2)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_args": {"depth": 3}}, "depth = 3, and its tensors show 2"),
        ({"model_args": {"embed_dim": 64}}, "embed_dim = 64, and its tensors show 32"),
        ({"model_args": {"class_token": False}}, "class_token = False"),
        ({"global_pool": "avgmax"}, "states the pooling 'avgmax'"),
    ],
)
def test_a_config_and_tensors_that_disagree_are_refused(stated, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, state_of(), {"architecture": "vit_x", **stated}, heads=2)


def test_a_stated_size_says_that_the_table_is_no_square(tmp_path):
    state = state_of(positions=2 * 6 + 1)
    with pytest.raises(CheckpointError, match="do not form a square grid"):
        load(tmp_path, state, heads=2)
    encoder = load(tmp_path, state, {"architecture": "vit_x", "model_args": {"img_size": [28, 84]}}, heads=2)
    assert encoder.config.image_size == (28, 84)
    assert torch.equal(encoder.positions.table, state["pos_embed"][0, 1:])
