"""timm's vision transformers, such as CLIP, SigLIP and DINOv2, alone or as the trunk of an OpenCLIP model."""

import math
import re
from typing import Any

from ...layers import Activation, AttentionConfig
from ...models.config import EncoderConfig
from .dinov3 import ROTARY_BASE, with_key_bias
from .family import Family, Rule, Tower, alike, both, built, grid_positions, grid_rows, head_count, prefix_tokens
from .names import is_plain, name_in_file, size_of, unsupported_argument, unsupported_reason
from .preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, normalisation

# numbers of ImageNet classes, not embedding widths
CLASSIFIERS = (1000, 10450, 11221, 11821, 21841, 21843)
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_FC1 = "blocks.{i}.mlp.fc1"
_HEAD = "/head.proj.{p}|head.{p}"  # OpenCLIP's head is outside of the trunk
_NAME_IT = "; give it its architecture's name, as of timm, or a config.json that states it"
_TELLTALE = {
    r"relative_position_bias_table|rel_pos_": "relative position biases",
    r"\.gamma_1$|\.q_bias$|\.w12\.|fc1_g\.": "layers of EVA, BEiT or DINOv3",
    r"dist_token$": "a distillation token",
    r"rope|freqs_cis": "rotary positions",
    r"attn\.(q|k)_norm\.": "norms of queries and keys",
}


def config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes, configs, metadata and the file name. Raises ValueError for unsupported models."""
    source = tower.source
    stated = source.configs.get("config.json", {})
    vision = source.configs.get("open_clip_config.json", {}).get("model_cfg", {}).get("vision_cfg", {})
    args: dict[str, Any] = stated.get("model_args") or {}
    name = str(stated.get("architecture") or vision.get("timm_model_name") or source.metadata.get("layout", ""))
    name = (name or name_in_file(source.name)).split(".")[0]
    if (told := stated.get("architecture") or vision.get("timm_model_name")) and not is_plain(told):
        raise ValueError(f"its config states the architecture {told!r}, which is none of timm's plain ViTs")
    rotary = "dinov3" in name
    _refuse(tower, name, args, rotary)
    width, channels, patch = tower.patches("patch_embed.proj.weight")
    classes = int(tower.has("cls_token"))
    key = "reg_token" if tower.has("reg_token") else "register_tokens"
    registers = tower.shape(key)[-2] if tower.has(key) else 0
    rows = tower.shape("pos_embed")[-2] if tower.has("pos_embed") else 0
    native = args.get("img_size") or stated.get("pretrained_cfg", {}).get("input_size", [])[-2:]
    native = vision.get("image_size") or native or size_of(name)
    # there are positions for all prefix tokens, only the class token, or none
    extras = (e for e in (classes + registers, classes, 0) if e <= rows)
    told = grid_rows(native, patch)
    own = [rows - extra for extra in extras]
    grid = next((n for n in own if n == told), next((n for n in own if math.isqrt(n) ** 2 == n), rows)) or told or 256
    pre_norm = tower.has("norm_pre.weight")
    scale = tower.has("blocks.0.ls1.gamma") or tower.has("blocks.0.gamma_1")
    clip = not name or "clip" in name
    pooled_by_map = tower.has("attn_pool.latent")
    # averaged grids of these widths without prefix are SigLIP's, without its pooling head
    bare = not (name or classes or registers or tower.has("fc_norm.weight")) and width in (1024, 1152, 1536)
    sigmoid = pooled_by_map or "siglip" in name or bare
    embed = _embed_dim(tower, pre_norm, stated)
    mean, std = (CLIP_MEAN, CLIP_STD) if pre_norm else (HALF, HALF) if sigmoid else (IMAGENET_MEAN, IMAGENET_STD)
    pooling = args.get("global_pool") or stated.get("global_pool") or vision.get("timm_pool")
    if pooling not in (None, "", "token", "avg", "map"):
        raise ValueError(f"its config states the pooling {pooling!r}; accepted: 'token', 'avg', 'map'")
    if not pooling:  # in timm, a norm after the pooling means mean pooling
        pooling = "avg" if tower.has("fc_norm.weight") or not classes or rotary else "token"
    kind = "dinov3" if rotary else "clip" if pre_norm else "siglip" if sigmoid else "dinov2" if scale else "vit"
    # a key or the architecture name identifies DINOv2's own files, which resize as DINOv2 does
    plain = (tower.has("mask_token") and not registers) or "without antialias" in source.metadata.get("pos_embed", "")
    # neither a class token nor its position: one of two models of width 768, with 12 or 16 heads
    anonymous = not (name or stated or classes or registers or pooled_by_map) and width == 768
    own_name = {"name": name} if name.startswith("vit_") else {}
    return built(
        tower,
        kind,
        (width, channels, patch),
        grid,
        native,
        args,
        **own_name,
        mlp_hidden=tower.shape("blocks.0.mlp.fc2.weight")[1],
        activation=_activation(tower, name, args, sigmoid, (width, patch, grid)),
        attention=AttentionConfig(
            head_count(tower, width, args.get("num_heads"), name, sixteen=sigmoid, by_width=not anonymous),
            tower.has("blocks.0.attn.qkv.bias") or tower.has("blocks.0.attn.q_bias"),
            ROTARY_BASE if rotary else None,
        ),
        layer_scale=1e-5 if scale else None,
        positions=tower.has("pos_embed"),
        position_resize="bicubic" if plain else "bicubic_antialias",
        class_token=bool(classes),
        registers=registers,
        patch_bias=tower.has("patch_embed.proj.bias"),
        pre_norm=pre_norm,
        final_norm=tower.has("norm.weight"),
        norm_eps=float(source.metadata.get("layer_norm_eps") or (1e-5 if (pre_norm and clip) or rotary else 1e-6)),
        pooling="map" if pooled_by_map else "cls" if pooling == "token" and classes else "mean",
        pool_norm=tower.has("fc_norm.weight"),
        embed_dim=embed,
        embed_bias=embed is not None and _head(tower)[1],
        **normalisation(source, mean, std, squeeze=sigmoid),
    )


def _refuse(tower: Tower, name: str, args: dict[str, Any], rotary: bool) -> None:
    """Raise ValueError for encoders that compute, or may compute, something else with such tensors."""
    reason = unsupported_reason(name)
    argument = unsupported_argument(args)
    if reason or argument:
        raise ValueError(f"{name or 'its model_args'}: {reason or argument}, which this library does not compute")
    if tower.find("/head.mlp.fc1.weight"):
        raise ValueError("its projection is an MLP, which this library does not compute")
    if rotary:
        return
    tell = next((what for key, what in _TELLTALE.items() if any(re.search(key, k) for k in tower.weights)), None)
    if tell:
        raise ValueError(f"it has {tell}, which this library does not compute")
    if not tower.has("pos_embed") and args.get("pos_embed") != "none":
        raise ValueError("it has no table of positions; rotary or relative ones are not supported")
    if name:
        return
    norm, classes = tower.has("norm_pre.weight"), tower.has("cls_token")
    if norm and (tower.has("attn_pool.latent") or not (tower.has("norm.weight") or tower.has("fc_norm.weight"))):
        raise ValueError("it may be a Perception Encoder, whose rotary positions no tensor shows" + _NAME_IT)
    if not classes and not tower.has("blocks.0.attn.qkv.bias") and not tower.has("blocks.0.ls1.gamma"):
        raise ValueError("its norms may come before its branches or after them (rpn)" + _NAME_IT)


def _activation(
    tower: Tower, name: str, args: dict[str, Any], sigmoid: bool, shape: tuple[int, int, int]
) -> Activation:
    if tower.has("blocks.0.mlp.fc1_g.weight"):
        return "swiglu"
    packed, hidden = tower.shape("blocks.0.mlp.fc1.weight")[0], tower.shape("blocks.0.mlp.fc2.weight")[1]
    stated = args.get("act_layer")
    if packed == 2 * hidden and stated in (None, "silu"):
        return "swiglu"
    if stated is not None and stated not in _ACTIVATIONS:
        raise ValueError(f"its config has act_layer {stated!r}; accepted: {', '.join(_ACTIVATIONS)}")
    if stated is not None:
        return _ACTIVATIONS[stated]
    if "quickgelu" in name or (not name and "quickgelu" in tower.source.name.lower()):
        return "quick_gelu"
    if not name and tower.has("norm_pre.weight"):
        tower.warn_of("activation", "the tensors do not show which GELU this CLIP uses; exact GELU is assumed")
    # timm's choice for these; other SigLIP models have the exact GELU
    width, patch, rows = shape
    by_tanh = patch == 32 or (patch == 16 and (width in (1152, 1536) or (width, rows) == (1024, 32 * 32)))
    return "gelu_tanh" if sigmoid and by_tanh else "gelu"


def _head(tower: Tower) -> tuple[int, bool]:
    """The number of rows of the head (0 for none), and whether it has a bias."""
    weight = tower.find(_HEAD.format(p="weight"))
    return (weight[1].shape[0] if weight else 0), tower.find(_HEAD.format(p="bias")) is not None


def _embed_dim(tower: Tower, pre_norm: bool, stated: dict[str, Any]) -> int | None:
    """The width of the image embedding. CLIP's head is a projection; classifiers are ignored.

    Without an OpenCLIP model around the tower, both are a linear layer called head. The width of an embedding is at
    least half of the tokens' and a multiple of 64; numbers of classes seldom are, and classifiers have label names.
    """
    rows, width = _head(tower)[0], tower.shape("patch_embed.proj.weight")[0]
    if tower.prefix.endswith("trunk."):
        return rows or None
    labels = stated.get("label_names") or stated.get("pretrained_cfg", {}).get("label_names")
    shaped = rows >= width // 2 and rows % max(1, min(64, width // 4)) == 0
    return rows if pre_norm and shaped and not labels and rows not in CLASSIFIERS else None


TIMM = Family(
    "timm's vision transformer",
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    (
        *both("patch_embed.projection", "patch_embed.proj"),
        Rule("prefix", ("?cls_token", "?reg_token|register_tokens", "?pos_embed"), prefix_tokens),
        Rule("positions.table", ("pos_embed",), grid_positions),
        *both("pre_norm", "norm_pre"),
        *alike("blocks.{i}", "blocks.{i}", "norm1", "norm2", "mlp.fc2"),
        Rule("blocks.{i}.mixer.qkv.weight", ("blocks.{i}.attn.qkv.weight",)),
        Rule(
            "blocks.{i}.mixer.qkv.bias",
            ("blocks.{i}.attn.qkv.bias|blocks.{i}.attn.q_bias", "?blocks.{i}.attn.v_bias"),
            with_key_bias,
        ),
        *both("blocks.{i}.mixer.out", "blocks.{i}.attn.proj"),
        Rule("blocks.{i}.scale1.gamma", ("blocks.{i}.ls1.gamma|blocks.{i}.gamma_1",)),
        *both("blocks.{i}.mlp.fc1", f"{_FC1}|{_FC1}_g", f"?{_FC1}_x"),
        Rule("blocks.{i}.scale2.gamma", ("blocks.{i}.ls2.gamma|blocks.{i}.gamma_2",)),
        *both("norm", "norm"),
        Rule("pool.probe", ("attn_pool.latent",)),
        *alike("pool", "attn_pool", "q", "kv", "norm", "mlp.fc1", "mlp.fc2"),
        *both("pool.out", "attn_pool.proj"),
        *both("pool_norm", "fc_norm"),
        *both("project", _HEAD),
    ),
    config,
    (r"mask_token$", r"head\.(weight|bias)$", r"decoder_"),
)
