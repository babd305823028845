"""Models of transformers: CLIP, SigLIP and SigLIP 2 (fixed-size and NaFlex), DINOv2 with and without registers, from
folders of `save_pretrained` with the image tower or the whole model."""

from typing import Any

from torch import Tensor

from ...layers import Activation, AttentionConfig
from ...models.config import EncoderConfig
from .family import Family, Rule, Tower, alike, both, built, grid_positions, head_count, linear_patches, prefix_tokens
from .preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, normalisation

_POSITIONS = "embeddings.position_embedding.weight"
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def stated_of(tower: Tower) -> dict[str, Any]:
    """The image tower's settings in config.json."""
    config = tower.source.configs.get("config.json", {})
    return dict(config.get("vision_config") or config.get("backbone_config") or config)


def activation_of(stated: dict[str, Any], default: str) -> Activation:
    """The activation of the MLPs. Raises ValueError for an unknown one."""
    name = str(stated.get("hidden_act", default))
    if name not in _ACTIVATIONS:
        raise ValueError(f"its config has hidden_act {name!r}; accepted: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def clip_config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes and config.json."""
    stated = stated_of(tower)
    patches = tower.patches("embeddings.patch_embedding.weight")
    projection = tower.find("/visual_projection.weight")
    return built(
        tower,
        "clip",
        patches,
        tower.shape(_POSITIONS)[0] - 1,
        stated.get("image_size"),
        stated,
        mlp_hidden=tower.shape("encoder.layers.0.mlp.fc1.weight")[0],
        activation=activation_of(stated, "quick_gelu"),
        attention=AttentionConfig(head_count(tower, patches[0], stated.get("num_attention_heads"))),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        norm_eps=stated.get("layer_norm_eps", 1e-5),
        pooling="cls",
        embed_dim=projection[1].shape[0] if projection else None,
        **normalisation(tower.source, CLIP_MEAN, CLIP_STD),
    )


def siglip_config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes and config.json. NaFlex has a linear patch embedding."""
    stated = stated_of(tower)
    shape = tower.shape("embeddings.patch_embedding.weight")
    naflex = len(shape) == 2
    width = shape[0]
    channels = stated.get("num_channels", 3) if naflex else shape[1]
    patch = round((shape[1] / channels) ** 0.5) if naflex else shape[2]
    return built(
        tower,
        "siglip2_naflex" if naflex else "siglip",
        (width, channels, patch),
        tower.shape(_POSITIONS)[0],
        stated.get("image_size"),
        stated,
        mlp_hidden=tower.shape("encoder.layers.0.mlp.fc1.weight")[0],
        activation=activation_of(stated, "gelu_pytorch_tanh"),
        attention=AttentionConfig(head_count(tower, width, stated.get("num_attention_heads"), sixteen=True)),
        position_resize="bilinear_antialias" if naflex else "bicubic",
        norm_eps=stated.get("layer_norm_eps", 1e-6),
        pooling="map" if tower.has("head.probe") else "mean",
        **normalisation(tower.source, HALF, HALF, squeeze=True),
    )


_MLP = "encoder.layer.0.mlp.{}.weight"


def dinov2_config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes and config.json."""
    stated = stated_of(tower)
    patches = tower.patches("embeddings.patch_embeddings.projection.weight")
    gated = tower.has("encoder.layer.0.mlp.weights_in.weight") or tower.has("encoder.layer.0.mlp.gate_proj.weight")
    registers = tower.has("embeddings.register_tokens")
    second = next(n for n in ("weights_out", "down_proj", "fc2") if n == "fc2" or tower.has(_MLP.format(n)))
    return built(
        tower,
        "reg_dinov2" if registers else "dinov2",
        patches,
        tower.shape("embeddings.position_embeddings")[-2] - 1,
        stated.get("image_size"),
        stated,
        mlp_hidden=tower.shape(_MLP.format(second))[1],
        activation="swiglu" if gated else activation_of(stated, "gelu"),
        attention=AttentionConfig(
            head_count(tower, patches[0], stated.get("num_attention_heads")),
            any(tower.has(f"encoder.layer.0.attention.{name}.bias") for name in ("attention.query", "q_proj")),
        ),
        layer_scale=1.0,
        position_resize="bicubic_antialias" if registers else "bicubic",
        class_token=True,
        registers=tower.shape("embeddings.register_tokens")[-2] if registers else 0,
        norm_eps=stated.get("layer_norm_eps", 1e-6),
        pooling="cls",
        **normalisation(tower.source, IMAGENET_MEAN, IMAGENET_STD),
    )


def _first_third(config: EncoderConfig, packed: Tensor) -> Tensor:
    return packed[: config.width].clone()


def _last_thirds(config: EncoderConfig, packed: Tensor) -> Tensor:
    return packed[config.width :].clone()


_LAYER = "encoder.layers.{i}"
_BLOCKS = (
    *both("blocks.{i}.norm1", _LAYER + ".layer_norm1"),
    *both("blocks.{i}.mixer.qkv", *(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv")),
    *both("blocks.{i}.mixer.out", _LAYER + ".self_attn.out_proj"),
    *both("blocks.{i}.norm2", _LAYER + ".layer_norm2"),
    *alike("blocks.{i}.mlp", _LAYER + ".mlp", "fc1", "fc2"),
)
CLIP = Family(
    "transformers' CLIP",
    ("embeddings.class_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    (
        *both("patch_embed.projection", "embeddings.patch_embedding"),
        Rule("prefix", ("embeddings.class_embedding", _POSITIONS), prefix_tokens),
        Rule("positions.table", (_POSITIONS,), grid_positions),
        *both("pre_norm", "pre_layrnorm"),  # spelled like this in transformers
        *_BLOCKS,
        *both("norm", "post_layernorm"),
        Rule("project.weight", ("/visual_projection.weight",)),
    ),
    clip_config,
    (r"embeddings\.position_ids$", r"visual_projection", r"text_", r"logit_", r"classifier"),
)
SIGLIP = Family(
    "transformers' SigLIP",
    ("embeddings.patch_embedding.weight", "post_layernorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    (
        Rule("patch_embed.projection.weight", ("embeddings.patch_embedding.weight",), linear_patches),
        Rule("patch_embed.projection.bias", ("embeddings.patch_embedding.bias",)),
        Rule("positions.table", (_POSITIONS,), grid_positions),
        *_BLOCKS,
        *both("norm", "post_layernorm"),
        Rule("pool.probe", ("head.probe",)),
        *both("pool.q", "head.attention.in_proj_{p}", take=_first_third),
        *both("pool.kv", "head.attention.in_proj_{p}", take=_last_thirds),
        *both("pool.out", "head.attention.out_proj"),
        *both("pool.norm", "head.layernorm"),
        *alike("pool.mlp", "head.mlp", "fc1", "fc2"),
    ),
    siglip_config,
    (r"embeddings\.position_ids$", r"text_", r"logit_", r"classifier"),
)
_LAYER2 = "encoder.layer.{i}"


def _either(where: str, *parts: str) -> list[str]:
    return ["|".join(f"{_LAYER2}{where}.{name}" for name in part.split("|")) for part in parts]


# transformers 5 saves the old names but has new ones in memory; a state dict may have either
DINOV2 = Family(
    "transformers' DINOv2",
    (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layer_scale1.lambda1",
        "encoder.layer.0.attention.attention.query.weight|encoder.layer.0.attention.q_proj.weight",
    ),
    (
        *both("patch_embed.projection", "embeddings.patch_embeddings.projection"),
        Rule(
            "prefix",
            ("embeddings.cls_token", "?embeddings.register_tokens", "embeddings.position_embeddings"),
            prefix_tokens,
        ),
        Rule("positions.table", ("embeddings.position_embeddings",), grid_positions),
        *both("blocks.{i}.norm1", _LAYER2 + ".norm1"),
        *both(
            "blocks.{i}.mixer.qkv",
            *_either(".attention", "attention.query|q_proj", "attention.key|k_proj", "attention.value|v_proj"),
        ),
        *both("blocks.{i}.mixer.out", *_either(".attention", "output.dense|o_proj")),
        Rule("blocks.{i}.scale1.gamma", (_LAYER2 + ".layer_scale1.lambda1",)),
        *both("blocks.{i}.norm2", _LAYER2 + ".norm2"),
        *both("blocks.{i}.mlp.fc1", *_either(".mlp", "fc1|weights_in|gate_proj"), f"?{_LAYER2}.mlp.up_proj"),
        *both("blocks.{i}.mlp.fc2", *_either(".mlp", "fc2|weights_out|down_proj")),
        Rule("blocks.{i}.scale2.gamma", (_LAYER2 + ".layer_scale2.lambda1",)),
        *both("norm", "layernorm"),
    ),
    dinov2_config,
    (r"embeddings\.mask_token$", r"classifier"),
)
