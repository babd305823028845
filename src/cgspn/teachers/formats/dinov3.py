"""DINOv3 in transformers' format: rotary positions, register tokens, keys without bias. timm's format is in timm.py."""

import torch
from torch import Tensor

from ...layers import AttentionConfig
from ...models.config import EncoderConfig
from .family import Family, Rule, Tower, both, built, grid_rows, head_count, prefix_tokens
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalisation
from .transformers import activation_of, stated_of

ROTARY_BASE = 100.0  # in every published model
_LAYER = "layer.{i}"
_QKV = [f"{_LAYER}.attention.{name}_proj" for name in "qkv"]


def config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes and config.json."""
    stated = stated_of(tower)
    patches = tower.patches("embeddings.patch_embeddings.weight")
    native, gated = stated.get("image_size"), tower.has("layer.0.mlp.gate_proj.weight")
    if gated and stated.get("hidden_act", "silu") != "silu":
        raise ValueError(f"its config has a gate of {stated['hidden_act']!r}; accepted: 'silu'")
    return built(
        tower,
        "dinov3",
        patches,
        grid_rows(native, patches[2]) or 256,
        native,
        stated,
        mlp_hidden=tower.shape("layer.0.mlp.down_proj.weight")[1],
        activation="swiglu" if gated else activation_of(stated, "gelu"),
        attention=AttentionConfig(
            head_count(tower, patches[0], stated.get("num_attention_heads"), by_width=patches[0] != 1280),
            tower.has("layer.0.attention.q_proj.bias"),
            float(stated.get("rope_theta", ROTARY_BASE)),
        ),
        layer_scale=1.0,
        positions=False,
        class_token=True,
        registers=tower.shape("embeddings.register_tokens")[-2],
        norm_eps=stated.get("layer_norm_eps", 1e-5),
        pooling="cls",
        **normalisation(tower.source, IMAGENET_MEAN, IMAGENET_STD, squeeze=True),
    )


def with_key_bias(config: EncoderConfig, *biases: Tensor) -> Tensor:
    """Concatenate the biases of queries, keys and values. If there are only two, that of the keys is zero."""
    return torch.cat([biases[0], torch.zeros_like(biases[0]), biases[1]] if len(biases) == 2 else biases)


DINOV3 = Family(
    "transformers' DINOv3",
    ("embeddings.patch_embeddings.weight", "layer.0.attention.q_proj.weight", "layer.0.layer_scale1.lambda1"),
    (
        *both("patch_embed.projection", "embeddings.patch_embeddings"),
        Rule("prefix", ("embeddings.cls_token", "embeddings.register_tokens"), prefix_tokens),
        *both("blocks.{i}.norm1", _LAYER + ".norm1"),
        Rule("blocks.{i}.mixer.qkv.weight", tuple(f"{name}.weight" for name in _QKV)),
        Rule("blocks.{i}.mixer.qkv.bias", (f"{_QKV[0]}.bias", f"?{_QKV[1]}.bias", f"{_QKV[2]}.bias"), with_key_bias),
        *both("blocks.{i}.mixer.out", _LAYER + ".attention.o_proj"),
        Rule("blocks.{i}.scale1.gamma", (_LAYER + ".layer_scale1.lambda1",)),
        *both("blocks.{i}.norm2", _LAYER + ".norm2"),
        *both("blocks.{i}.mlp.fc1", f"?{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"),
        *both("blocks.{i}.mlp.fc2", _LAYER + ".mlp.down_proj"),
        Rule("blocks.{i}.scale2.gamma", (_LAYER + ".layer_scale2.lambda1",)),
        *both("norm", "norm"),
    ),
    config,
    (r"embeddings\.mask_token$", r"classifier"),
)
