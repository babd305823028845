"""What code written for a ViT of timm relies on, by value."""

import re

import pytest
import torch
from torch.nn.functional import interpolate

import cgspn
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, model_config
from cgspn.models.timm_api import resize_patches

SMALL = {"width": 32, "mlp_hidden": 64, "attention": AttentionConfig(2)}


def encoder(name="cgspn_mini_patch4_28", **overrides):
    torch.manual_seed(0)
    return cgspn.create_model(name, **SMALL, **overrides).eval()


def with_prefix(**overrides):
    return encoder("vit_mini_patch4_28", class_token=True, registers=2, pooling="cls", **overrides)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 20)


@pytest.mark.parametrize("make", [encoder, with_prefix])
def test_features_and_head_make_up_the_forward(make, images):
    model = make()
    tokens, out = model.forward_features(images), model(images)
    assert tokens.shape == (2, model.num_prefix_tokens + 15, 32)
    assert torch.equal(tokens[:, model.num_prefix_tokens :].reshape(2, 3, 5, 32), out.tokens)
    assert torch.equal(model.forward_head(tokens), out.pooled)


def test_a_classifier_leaves_the_forward_as_it_was(images, tmp_path):
    model = encoder()
    pooled = model(images).pooled
    model.reset_classifier(7)
    assert torch.equal(model(images).pooled, pooled)
    logits = model.forward_head(model.forward_features(images))
    torch.testing.assert_close(logits, model.get_classifier()(pooled))
    model.save_pretrained(tmp_path)
    loaded = cgspn.load_encoder(tmp_path)
    assert loaded.num_classes == 7
    assert torch.equal(loaded.get_classifier().weight, model.get_classifier().weight)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images).pooled, model.forward_features(images).mean(1))
    for pool in ("max", "map"):
        with pytest.raises(ValueError, match=r"global_pool is .*accepted: 'avg', 'token'"):
            model.reset_classifier(0, pool)
    with pytest.raises(ValueError, match="without a class token"):
        model.reset_classifier(0, "token")
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)


def test_masks_reach_features_head_and_intermediates(images):
    model = encoder()
    padded = torch.cat([images, torch.full((2, 3, 12, 8), 9.0)], 3)
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[:, :, 5:] = False
    tokens = model.forward_features(padded, mask)
    torch.testing.assert_close(model.forward_head(tokens, mask=mask), model(images).pooled)
    (last,) = model.forward_intermediates(padded, 1, norm=True, mask=mask)
    torch.testing.assert_close(last[..., :5].permute(0, 2, 3, 1), model(images).tokens)


def test_intermediates_in_every_form(images):
    model = with_prefix()
    maps = model.forward_intermediates(images, [0, 2])
    final, again = model.forward_intermediates(images, [0, 2], intermediates_only=False)
    assert torch.equal(final, model.forward_features(images))
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    flat = model.forward_intermediates(images, [0, 2], output_fmt="NLC")
    assert all(torch.equal(a.flatten(2).mT, b) for a, b in zip(maps, flat, strict=True))
    (tokens, prefix), _ = model.forward_intermediates(images, [3, 0], return_prefix_tokens=True, norm=True)
    assert torch.equal(torch.cat([prefix, tokens.flatten(2).mT], 1), final)
    early, _ = model.forward_intermediates(images, [1], stop_early=True, intermediates_only=False)
    (second,) = model.forward_intermediates(images, [1], norm=True, output_fmt="NLC")
    assert torch.equal(early[:, 3:], second)
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_stopping_early_runs_no_block_too_many(images):
    model = encoder()
    ran = []
    for i, block in enumerate(model.each_block()):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(images, [1])
    assert ran == [0, 1]


@pytest.mark.parametrize("make", [encoder, with_prefix])
def test_every_parameter_has_a_group_and_embeddings_do_not_decay(make):
    model = make(num_classes=3)
    matcher = model.group_matcher(coarse=True)
    assert re.compile(matcher["stem"]).groups == 0  # timm reads captured groups as layer numbers
    patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
    rest = {name.split(".")[0] for name, _ in model.named_parameters() if not any(re.match(p, name) for p in patterns)}
    assert rest == ({"pool", "head"} if make is encoder else {"head"})  # after the blocks, which is right
    assert model.no_weight_decay() == ({"pool.probe"} if make is encoder else {"prefix", "positions.table"})


def test_attributes_follow_the_config():
    model = with_prefix(embed_dim=8, num_classes=5)
    assert (model.num_features, model.embed_dim, model.head_hidden_size, model.num_classes) == (32, 32, 8, 5)
    assert (model.num_prefix_tokens, model.num_reg_tokens, model.has_class_token) == (3, 2, True)
    assert (model.global_pool, encoder().global_pool) == ("token", "map")
    embed = model.patch_embed
    assert (embed.patch_size, embed.img_size, embed.grid_size, embed.num_patches) == ((4, 4), (28, 28), (7, 7), 49)
    assert [info["reduction"] for info in model.feature_info] == [4] * 4
    cfg = model.default_cfg
    assert (cfg["input_size"], cfg["mean"], cfg["num_classes"]) == ((3, 28, 28), (0.5, 0.5, 0.5), 5)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).weight.shape == (32, 3, 4, 4)


def test_a_native_size_changes_nothing_at_that_size(images, tmp_path):
    model = encoder("vit_mini_patch4_28")
    before = model(images)
    model.set_input_size((12, 20))
    torch.testing.assert_close(model(images).tokens, before.tokens)
    assert model.positions.table.shape == (15, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(cgspn.load_encoder(tmp_path).positions.table, model.positions.table)
    for arguments in ((30,), ((28, 30),), (None, 5), (None, (4, 2))):
        with pytest.raises(ValueError, match="size is"):
            model.set_input_size(*arguments)


def test_larger_patches_answer_larger_images_as_before():
    """FlexiViT's property: exact where the patch grows, and images are resized by the same filter."""
    torch.manual_seed(0)
    old = torch.nn.Conv2d(3, 16, 4, 4)
    patch = torch.randn(1, 3, 4, 4)
    new = resize_patches(old, 7)
    torch.testing.assert_close(new(interpolate(patch, (7, 7), mode="bicubic", antialias=True)), old(patch))
    model = encoder()
    model.set_input_size(49, 7)
    assert model(torch.randn(1, 3, 49, 14)).tokens.shape == (1, 7, 2, 32)
    assert (model.config.patch_size, model.patch_embed.grid_size) == (7, (7, 7))


@pytest.mark.parametrize("make", [encoder, with_prefix])
def test_pruning_keeps_the_maps_and_the_config(make, images, tmp_path):
    model = make(num_classes=3)
    maps = model.forward_intermediates(images, [0, -3])
    kept = model.prune_intermediate_layers([0, -3], prune_norm=True)
    assert kept == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(model.forward_intermediates(images, kept), maps, strict=True))
    assert not [name for name, _ in model.named_parameters() if name.split(".")[0] in ("norm", "pool", "head")]
    model.save_pretrained(tmp_path)
    loaded = cgspn.load_encoder(tmp_path)
    assert len(loaded.blocks) == 2
    assert torch.equal(loaded(images).tokens, model(images).tokens)


def test_a_head_survives_conversion():
    teacher = encoder("vit_mini_patch4_28", num_classes=3)
    student = cgspn.convert(teacher, compression=4)
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert Encoder(model_config("vit_mini_patch4_28")).num_classes == 0
