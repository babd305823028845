"""timm's vision transformers: CLIP, SigLIP and DINOv2 ones, alone or as the trunk of an OpenCLIP model."""

from __future__ import annotations

from typing import Any

from ...layers import Activation, AttentionConfig
from ...models.config import EncoderConfig
from .family import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Family,
    Rule,
    Tower,
    attention_blocks,
    both,
    grid_positions,
    head_count,
    normalisation,
    prefix_tokens,
    sizes,
    title,
)

CLASSIFIERS = (1000, 10450, 11221, 11821, 21841, 21843)  # labels of ImageNet in its editions: no image embedding
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def config(tower: Tower) -> EncoderConfig:
    """From shapes, timm's config.json or OpenCLIP's where there is one, and file metadata."""
    source = tower.source
    stated = source.configs.get("config.json", {})
    vision = source.configs.get("open_clip_config.json", {}).get("model_cfg", {}).get("vision_cfg", {})
    args: dict[str, Any] = stated.get("model_args") or {}
    name = str(stated.get("architecture") or vision.get("timm_model_name") or source.metadata.get("layout", ""))
    width, channels, patch, _ = tower.shape("patch_embed.proj.weight")
    classes = int(tower.has("cls_token"))
    key = "reg_token" if tower.has("reg_token") else "register_tokens"
    registers = tower.shape(key)[-2] if tower.has(key) else 0
    rows = tower.shape("pos_embed")[-2] if tower.has("pos_embed") else 0
    native = args.get("img_size") or stated.get("pretrained_cfg", {}).get("input_size", [0])[-1]
    native = vision.get("image_size") or native
    # positions of all prefix tokens, of the class token alone, or of none
    extra = next((e for e in (classes + registers, classes, 0) if round((rows - e) ** 0.5) ** 2 == rows - e), 0)
    side = tower.side(rows - extra) if rows else (native // patch if isinstance(native, int) else 16)
    pre_norm, scale = tower.has("norm_pre.weight"), tower.has("blocks.0.ls1.gamma")
    pooled_by_map = tower.has("attn_pool.latent")
    sigmoid = pooled_by_map or "siglip" in name
    packed = tower.shape("blocks.0.mlp.fc1.weight")[0]
    hidden = tower.shape("blocks.0.mlp.fc2.weight")[1]
    act: Activation = "gelu"
    if packed == 2 * hidden:
        act = "swiglu"
    elif args.get("act_layer") in _ACTIVATIONS:
        act = _ACTIVATIONS[args["act_layer"]]
    elif "quickgelu" in name or (not name and "quickgelu" in source.name.lower()):
        act = "quick_gelu"
    elif sigmoid and (patch == 32 or (patch == 16 and (width in (1152, 1536) or (width, side) == (1024, 32)))):
        act = "gelu_tanh"  # timm's own choice for these; the other SigLIP models have the exact one
    embed = _embed_dim(tower, pre_norm)
    mean, std = (CLIP_MEAN, CLIP_STD) if pre_norm else (HALF, HALF) if sigmoid else (IMAGENET_MEAN, IMAGENET_STD)
    pooling = stated.get("global_pool") or ("token" if classes else "avg")
    kind = "clip" if pre_norm else "siglip" if sigmoid else "dinov2" if scale else "vit"
    # DINOv2's own files and copies of them say, by key or in words, that they resize as DINOv2 does
    plain = (tower.has("mask_token") and not registers) or "without antialias" in source.metadata.get("pos_embed", "")
    return EncoderConfig(
        name=name if name.startswith("vit_") else title(kind, width, patch, side * patch),
        **sizes(tower, patch, side, native),
        channels=channels,
        width=width,
        mixers=attention_blocks(tower.depth(r"blocks\.(\d+)\.")),
        mlp_hidden=hidden,
        activation=act,
        attention=AttentionConfig(
            head_count(tower, width, args.get("num_heads"), sixteen=sigmoid), tower.has("blocks.0.attn.qkv.bias")
        ),
        layer_scale=1e-5 if scale else None,
        positions=rows > 0,
        position_resize="bicubic" if plain else "bicubic_antialias",
        class_token=bool(classes),
        registers=registers,
        patch_bias=tower.has("patch_embed.proj.bias"),
        pre_norm=pre_norm,
        final_norm=tower.has("norm.weight"),
        norm_eps=float(source.metadata.get("layer_norm_eps") or (1e-5 if pre_norm else 1e-6)),
        pooling="map" if pooled_by_map else "cls" if pooling == "token" and classes else "mean",
        pool_norm=tower.has("fc_norm.weight"),
        embed_dim=embed,
        embed_bias=embed is not None and _head(tower)[1],
        **normalisation(source, mean, std, squeeze=sigmoid),
    )


def _head(tower: Tower) -> tuple[int, bool]:
    """Rows of the head, 0 for none, and whether it has a bias."""
    outer = tower.source.weights
    for weight, bias in (
        ("visual.head.proj.weight", "visual.head.proj.bias"),
        (tower.prefix + "head.weight", tower.prefix + "head.bias"),
    ):
        if weight in outer:
            return outer[weight].shape[0], bias in outer
    return 0, False


def _embed_dim(tower: Tower, pre_norm: bool) -> int | None:
    """The width of the image embedding. A head of CLIP is its projection; other heads are classifiers, left out."""
    rows = _head(tower)[0]
    inside_clip = tower.prefix.endswith("trunk.")
    return rows if rows and (inside_clip or (pre_norm and rows not in CLASSIFIERS)) else None


TIMM = Family(
    "timm's vision transformer",
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    (
        *both("patch_embed.projection", "patch_embed.proj"),
        Rule("prefix", ("cls_token", "?reg_token|register_tokens", "pos_embed"), prefix_tokens),
        Rule("positions.table", ("pos_embed",), grid_positions),
        *both("pre_norm", "norm_pre"),
        *both("blocks.{i}.norm1", "blocks.{i}.norm1"),
        *both("blocks.{i}.mixer.qkv", "blocks.{i}.attn.qkv"),
        *both("blocks.{i}.mixer.out", "blocks.{i}.attn.proj"),
        Rule("blocks.{i}.scale1.gamma", ("blocks.{i}.ls1.gamma",)),
        *both("blocks.{i}.norm2", "blocks.{i}.norm2"),
        *both("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *both("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        Rule("blocks.{i}.scale2.gamma", ("blocks.{i}.ls2.gamma",)),
        *both("norm", "norm"),
        Rule("pool.probe", ("attn_pool.latent",)),
        *both("pool.q", "attn_pool.q"),
        *both("pool.kv", "attn_pool.kv"),
        *both("pool.out", "attn_pool.proj"),
        *both("pool.norm", "attn_pool.norm"),
        *both("pool.mlp.fc1", "attn_pool.mlp.fc1"),
        *both("pool.mlp.fc2", "attn_pool.mlp.fc2"),
        *both("pool_norm", "fc_norm"),
        *both("project", "/visual.head.proj.{p}|head.{p}"),
    ),
    config,
    (r"mask_token$", r"head\.(weight|bias)$"),
)
