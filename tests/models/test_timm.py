"""The models through timm itself. Skips where timm does not import: it needs torchvision, and that its own torch."""

import subprocess
import sys
import warnings

import pytest
import torch

import cgspn

try:  # not importorskip: torchvision beside another torch raises RuntimeError
    import timm
except Exception as error:
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("error")  # timm warns of names that it has already
    from cgspn.models.timm_models import TimmEncoder, checkpoint_filter_fn, from_encoder

from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch.nn.functional import pad

NAME = "cgspn_tiny_patch14_378"
SHALLOW = {"mixers": ("propagation",) * 3}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 42, 70)


def test_all_names_are_timms_too():
    assert set(cgspn.list_models()) <= set(timm.list_models())


def test_timm_classifies_saves_and_loads(images, tmp_path):
    model = timm.create_model(NAME, num_classes=10, **SHALLOW).eval()
    assert isinstance(model, TimmEncoder)
    logits = model(images)
    assert logits.shape == (2, 10)
    assert torch.equal(model.forward_head(model.forward_features(images)), logits)
    model.save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    again = timm.create_model(NAME, num_classes=10, checkpoint_path=weights, **SHALLOW).eval()
    torch.testing.assert_close(again(images), logits)
    overlay = {"file": weights, "num_classes": 10}
    tuned = timm.create_model(NAME, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, **SHALLOW).eval()
    own = cgspn.load_encoder(tmp_path)
    torch.testing.assert_close(tuned.forward_head(tuned.forward_features(images), True), own(images).pooled)
    grey = timm.create_model(
        NAME, pretrained=True, in_chans=1, num_classes=0, pretrained_cfg_overlay=overlay, **SHALLOW
    )
    weight = own.patch_embed.projection.weight.sum(1, keepdim=True)  # timm's way from colour to grey
    torch.testing.assert_close(grey.patch_embed.projection.weight, weight)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(NAME, pretrained=True)


def test_features_only_gives_the_maps_of_a_pruned_encoder(images):
    torch.manual_seed(1)
    features = timm.create_model(NAME, features_only=True, out_indices=(0, -2), **SHALLOW)
    torch.manual_seed(1)
    whole = timm.create_model(NAME, **SHALLOW)
    _, maps = whole.forward_intermediates(images, [0, 1])
    for mine, timms in zip(maps, features(images), strict=True):
        torch.testing.assert_close(mine, timms)
    assert features.feature_info.channels() == [192, 192]
    assert features.feature_info.reduction() == [14, 14]
    assert len(features.model.blocks) == 2


def test_data_config_follows_the_model():
    model = timm.create_model(NAME, img_size=196, in_chans=1, global_pool="avg", drop_rate=0.0, **SHALLOW)
    assert resolve_model_data_config(model)["input_size"] == (1, 196, 196)
    model.set_input_size((126, 98))
    config = resolve_model_data_config(model)
    assert config["input_size"] == (1, 126, 98)
    assert (config["mean"], config["crop_pct"], model.global_pool) == ((0.5,), 1.0, "avg")


def test_layer_decay_grows_towards_the_head():
    model = timm.create_model(NAME, num_classes=2, **SHALLOW)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    found = [scale[id(p)] for p in (model.patch_embed.projection.weight, model.blocks[0].norm1.weight)]
    found += [scale[id(p)] for p in (model.blocks[2].norm1.weight, model.norm.weight, model.head.weight)]
    assert found == [0.5**4, 0.5**3, 0.5, 0.5, 1.0]


def test_a_student_becomes_a_model_of_timm_and_shares_its_weights(images):
    student = cgspn.create_model(NAME, **SHALLOW).eval()
    model = from_encoder(student, num_classes=4)
    assert model(images).shape == (2, 4)
    assert model.blocks[0].norm1.weight is student.blocks[0].norm1.weight
    assert not model.training


def test_a_shared_model_without_pooling_comes_back(images, tmp_path):
    model = timm.create_model(NAME, global_pool="", num_classes=5, **SHALLOW).eval()
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("resized", [False, True])
def test_a_shared_student_comes_back_bit_for_bit(images, resized, tmp_path):
    student = cgspn.convert(cgspn.create_model("vit_mini_patch4_28"), compression=3, keep_attention=1).eval()
    model = from_encoder(student, num_classes=3)
    if resized:
        model.set_input_size((56, 28))
    images = images[..., :40, :68]
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    assert again.config == model.config
    own = cgspn.load_encoder(tmp_path)
    assert torch.equal(own.forward_head(own.forward_features(images)), model(images))


def test_options_mean_what_they_mean_in_timm(images):
    dropping = timm.create_model(NAME, drop_path_rate=0.5, dtype=torch.float64, **SHALLOW).train()
    assert [block.drop_path for block in dropping.blocks] == [0.0, 0.25, 0.5]
    assert not torch.equal(dropping(images.double()), dropping(images.double()))
    assert torch.equal(dropping.eval()(images.double()), dropping(images.double()))
    assert next(timm.create_model(NAME, device="meta", **SHALLOW).parameters()).is_meta
    assert timm.create_model(NAME, embed_dim=96, **SHALLOW).config.mlp_hidden == 384
    tokens = timm.create_model(NAME, global_pool="", num_classes=5, **SHALLOW).eval()
    assert tokens(images).shape == (2, 15, 5)
    overlaid = timm.create_model(NAME, pretrained_cfg_overlay={"mean": (0.0, 0.0, 0.0)}, **SHALLOW)
    assert timm.data.resolve_model_data_config(overlaid)["mean"] == (0.0, 0.0, 0.0)
    padded = timm.create_model(NAME, dynamic_img_pad=True, **SHALLOW).eval()
    assert torch.equal(padded(images[..., :40, :60]), padded(pad(images[..., :40, :60], (0, 10, 0, 2))))
    with pytest.raises(TypeError, match="qk_norm"):
        timm.create_model(NAME, qk_norm=True)


def test_hooks_give_the_maps_that_getters_give(images):
    torch.manual_seed(1)
    hooked = timm.create_model(NAME, features_only=True, feature_cls="hook", out_indices=(0, 2), **SHALLOW)
    maps = hooked.body.forward_intermediates(images, [0, 2], intermediates_only=True)
    for mine, timms in zip(maps, hooked(images), strict=True):
        torch.testing.assert_close(mine, timms)
    found = hooked.body.forward_intermediates(images, [1], output_dict=True)
    assert found.keys() == {"image_intermediates", "image_features"}


def test_weights_are_drawn_after_to_empty_and_filtered_from_wrappings(images):
    model = timm.create_model("vit_mini_patch4_28", device="meta").to_empty(device="cpu")
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    larger = timm.create_model("vit_mini_patch4_28", img_size=56)
    state = checkpoint_filter_fn({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, larger)
    larger.load_state_dict(state)
    assert len(larger.positions.table) == 14 * 14


def test_scripts_are_traces_for_all_sizes():
    model = timm.create_model("hybrid_mini_patch4_28").eval()
    scripted = torch.jit.script(model)
    images = torch.randn(1, 3, 16, 28)
    torch.testing.assert_close(scripted(images), model(images))


def test_options_that_no_encoder_has_are_named():
    for options in ({"proj_drop_rate": 0.1}, {"qk_norm": True}, {"global_pool": "max"}):
        (option,) = options
        with pytest.raises(ValueError, match=option):
            timm.create_model(NAME, **options)


def test_importing_the_package_does_not_import_timm():
    code = "import sys, cgspn; assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
