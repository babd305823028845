"""Parity with timm and OpenCLIP on random weights, where they are installed.

Slow models are left out: each is small in depth, as wide as its library makes it.
"""

import json

import pytest
import torch
from parity import relative, shaken
from safetensors.torch import save_file
from standins import import_library

import cgspn


def library(name):
    """pytest.importorskip, with stand-ins for a torchvision that does not import on a CPU-only torch."""
    try:
        return import_library(name)
    except ImportError as error:
        pytest.skip(f"{name} does not import: {error}")


TIMM = [
    ("vit_small_patch14_dinov2", {"img_size": 112}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 112}),
    ("vit_giant_patch14_dinov2", {"img_size": 56}),
    ("vit_base_patch16_clip_224", {"num_classes": 512}),
    ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 512}),
    ("vit_huge_patch14_clip_224", {"num_classes": 1024}),
    ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    ("vit_so400m_patch14_siglip_378", {"num_classes": 0}),
    ("vit_so400m_patch14_siglip_384", {"num_classes": 0}),
    ("vit_base_patch16_siglip_gap_224", {"num_classes": 0}),
    ("vit_base_patch16_224", {"num_classes": 1000}),
]


@pytest.mark.parametrize(("name", "arguments"), TIMM, ids=[name for name, _ in TIMM])
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_timm(name, arguments, layout, tmp_path):
    timm = library("timm")
    torch.manual_seed(0)
    model = shaken(timm.create_model(name, depth=2, dynamic_img_size=True, **arguments))
    args = {"depth": 2} | ({"img_size": arguments["img_size"]} if "img_size" in arguments else {})
    cfg = {"architecture": name, "global_pool": model.global_pool, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    path = tmp_path / ("model.safetensors" if layout == "folder" else f"{name}.safetensors")
    save_file(model.state_dict(), path)
    encoder = cgspn.load_encoder(tmp_path if layout == "folder" else path)
    p = encoder.config.patch_size
    side = encoder.config.image_size[0] // p * p
    is_clip = "clip" in name
    for size in ((side, side), (3 * p, 9 * p)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            features = model.forward_features(images)
            pooled = model.forward_head(features, pre_logits=not is_clip)
            ours = encoder(images)
        assert relative(ours.tokens.flatten(1, 2), features[:, model.num_prefix_tokens :]) < 1e-5, size
        assert relative(ours.pooled, pooled) < 1e-5, size


OPENCLIP = [
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-SO400M-14-SigLIP2-378",
]


@pytest.mark.parametrize("name", OPENCLIP)
def test_openclip(name, tmp_path):
    open_clip = library("open_clip")
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    text = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 100, "context_length": 8}
    config["text_cfg"] = {k: v for k, v in config["text_cfg"].items() if not k.startswith("hf_")} | text
    model = shaken(open_clip.factory.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    encoder = cgspn.load_encoder(tmp_path)
    side = encoder.config.image_size[0]
    images = torch.randn(2, 3, side, side)
    visual = model.visual
    with torch.no_grad():
        ours = encoder(images)
        pooled = visual(images)
        if hasattr(visual, "trunk"):
            tokens = visual.trunk.forward_features(images)
        else:
            visual.output_tokens = True
            pooled, tokens = visual(images)
    assert relative(ours.tokens.flatten(1, 2), tokens) < 1e-5
    assert relative(ours.pooled, pooled) < 1e-5
    # another size: OpenCLIP resizes the positions when it loads weights into a model of that size
    p = encoder.config.patch_size
    if hasattr(visual, "trunk"):
        return
    size = [3 * p, 9 * p]
    config["vision_cfg"]["image_size"] = size
    other = open_clip.factory.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    state = dict(model.state_dict())
    open_clip.factory.resize_pos_embed(state, other)
    other.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert relative(encoder(images).pooled, other.visual(images)) < 1e-5
