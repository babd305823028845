"""RADIO and C-RADIO, without running their code. Their adaptors to other teachers are not loaded.

The tower is a timm ViT with a different patch embedding: a linear layer, a table with one class token per teacher and
registers, and positions of a large grid, from which an image gets a resized part. Source: Ranzinger et al., "AM-RADIO:
Agglomerative Vision Foundation Model", 2024, and the released checkpoints.
"""

import re
from typing import Any

from torch import Tensor

from ...layers import AttentionConfig, PositionResize
from ...models.config import EncoderConfig
from .family import Family, Rule, Tower, alike, both, grid_positions, head_count, title
from .preprocessing import CLIP_MEAN, CLIP_STD

NATIVE = 512  # pixels, if the checkpoint does not state it
_TOKENS, _EMBED = "patch_generator.cls_token.token", "patch_generator.embedder.weight"


def config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes, buffers and config.json. Raises ValueError if features are normalised."""
    if tower.find("/feature_normalizer.mean"):
        raise ValueError("it normalises its features with a matrix, which this library does not support")
    stated = tower.source.configs.get("config.json", {})
    width, values = tower.shape(_EMBED)
    patch = round((values / 3) ** 0.5)
    tokens = tower.shape(_TOKENS)[-2]
    side = tower.side(tower.shape("patch_generator.pos_embed")[-2])
    summary = tower.find("/summary_idxs")
    version = str(stated.get("version") or tower.source.name).lower()
    size = _native(stated, patch)
    return EncoderConfig(
        name=title("radio", width, patch, size[0]),
        image_size=size,
        patch_size=patch,
        width=width,
        mixers=tower.mixers(),
        mlp_hidden=tower.shape("blocks.0.mlp.fc1.weight")[0],
        activation="gelu",
        attention=AttentionConfig(head_count(tower, width), tower.has("blocks.0.attn.qkv.bias")),
        layer_scale=1e-5 if tower.has("blocks.0.ls1.gamma") or tower.has("blocks.0.ls1.grandma") else None,
        position_resize=_resize(version, tokens),
        position_table=(side, side),
        class_token=True,
        registers=tokens - 1,
        patch_bias=False,
        final_norm=tower.has("norm.weight"),
        pooling="cls",
        summary_tokens=tuple(summary[1].read().tolist()) if summary else (0,),
        image_mean=_pixels(tower, "mean", CLIP_MEAN),
        image_std=_pixels(tower, "std", CLIP_STD),
        image_crop=True,
        image_resample="bicubic",
    )


def _native(stated: dict[str, Any], patch: int) -> tuple[int, int]:
    size = stated.get("preferred_resolution")
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(n >= patch and n % patch == 0 for n in size):
        return size[0], size[1]
    return NATIVE // patch * patch, NATIVE // patch * patch


def _resize(version: str, tokens: int) -> PositionResize:
    """The resize method: C-RADIOv4 and the larger C-RADIOv3 align pixel centres, the others corners."""
    if re.search(r"v4|v3-(l|g)", version) or (tokens == 10 and "v3" not in version):
        return "square_bilinear"
    return "square_bilinear_corners"


def _pixels(tower: Tower, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    found = tower.find(f"/input_conditioner.norm_{name}")
    return tuple(found[1].read().flatten().tolist()) if found else default


def _tokens(config: EncoderConfig, table: Tensor) -> Tensor:
    return table.reshape(-1, config.width)


def _patches(config: EncoderConfig, weight: Tensor) -> Tensor:
    """Reshape a linear layer over (channel, row, column) to a convolution."""
    return weight.view(-1, config.channels, config.patch_size, config.patch_size)


RADIO = Family(
    "RADIO",
    (_EMBED, _TOKENS, "blocks.0.attn.qkv.weight"),
    (
        Rule("patch_embed.projection.weight", (_EMBED,), _patches),
        Rule("prefix", (_TOKENS,), _tokens),
        Rule("positions.table", ("patch_generator.pos_embed",), grid_positions),
        *alike("blocks.{i}", "blocks.{i}", "norm1", "norm2", "mlp.fc1", "mlp.fc2"),
        *both("blocks.{i}.mixer.qkv", "blocks.{i}.attn.qkv"),
        *both("blocks.{i}.mixer.out", "blocks.{i}.attn.proj"),
        Rule("blocks.{i}.scale1.gamma", ("blocks.{i}.ls1.gamma|blocks.{i}.ls1.grandma",)),
        Rule("blocks.{i}.scale2.gamma", ("blocks.{i}.ls2.gamma|blocks.{i}.ls2.grandma",)),
        *both("norm", "norm"),
    ),
    config,
    (r"head\.(weight|bias)$",),
)
