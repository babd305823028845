"""timm's encoder interface except for the forward passes: metadata, parameter groups and changes to the model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from ..layers import ClassTokenPool, LearnedPositions, MeanPool, PatchEmbed
from .config import EncoderConfig

POOLS = {"map": "map", "mean": "avg", "cls": "token"}  # our name: timm's name
WITH_PREVIOUS = (99999,)  # timm's code for "in the group of the previous layer"


def _stated(name: str, doc: str) -> property:
    """A property for a field of the encoder's config under timm's name."""
    return property(lambda self: getattr(self.config, name), doc=doc)


class TimmContract(nn.Module):
    """The part of timm's encoder interface that inspects or changes an encoder. `config` follows every change.

    As in timm, `num_features` and `embed_dim` are the width of the tokens, and `head_hidden_size` is the length of the
    pooled vector, which CLIP projects to another width.
    """

    config: EncoderConfig
    patch_embed: PatchEmbed
    positions: LearnedPositions | None
    blocks: nn.ModuleList
    norm: nn.Module
    pool: nn.Module
    pool_norm: nn.Module
    project: nn.Module
    head: nn.Module

    num_features = _stated("width", "Channels of the tokens, C.")
    embed_dim = _stated("width", "Channels of the tokens, C; not `config.embed_dim`, the width of CLIP's projection.")
    head_hidden_size = _stated("pooled_width", "Length of the pooled vector that the classifier reads.")
    num_classes = _stated("num_classes", "Outputs of the classifier; 0 without one.")
    in_chans = _stated("channels", "Channels of the images.")
    num_prefix_tokens = _stated("prefix", "Class and register tokens before the grid.")
    num_reg_tokens = _stated("registers", "Register tokens before the grid.")
    has_class_token = _stated("class_token", "Whether the first token is a class token.")

    @property
    def input_weight(self) -> nn.Parameter:
        """A weight of the patch embedding. Images must have its dtype and device."""
        return next(self.patch_embed.parameters())

    @property
    def global_pool(self) -> str:
        """The pooling under timm's name: "map", "avg" or "token"."""
        return POOLS[self.config.pooling]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry per block: module, channels and stride in pixels."""
        shared = {"num_chs": self.config.width, "reduction": self.config.patch_size}
        return [{"module": f"blocks.{i}", **shared} for i in range(self.config.depth)]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The preprocessing, for `timm.data.resolve_model_data_config`."""
        return data_config(self.config)

    default_cfg = pretrained_cfg  # its older name

    def no_weight_decay(self) -> set[str]:
        """Names of embedding parameters, which have no weight decay."""
        names = ("prefix", "positions.table", "pool.probe")
        return {name for name, _ in self.named_parameters() if name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that map parameter names to layers: stem, then blocks. Unmatched names come last.

        coarse: passed by timm; no effect, because blocks are the coarsest groups.
        """
        return {
            "stem": r"^(?:prefix|positions|patch_embed|pre_norm)\b",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\b", WITH_PREVIOUS)],
        }

    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; num_classes 0 for none.

        global_pool: new pooling under timm's name, "avg" or "token"; None keeps the current one.

        Raises ValueError for a pooling that is unknown, needs a missing class token, or would need new weights ("map").
        """
        if global_pool not in (None, self.global_pool):
            pooling = {"avg": "mean", "token": "cls"}.get(str(global_pool))
            if pooling is None:
                raise ValueError(f"global_pool is {global_pool!r}; accepted: 'avg', 'token', {self.global_pool!r}")
            self.config = replace(self.config, pooling=pooling)  # type: ignore[arg-type]
            self.pool = MeanPool() if pooling == "mean" else ClassTokenPool(self.config.summary_tokens)
        self.config = replace(self.config, num_classes=num_classes)
        weight = self.input_weight
        self.head = build_head(self.config).to(weight.device, weight.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the native image size and optionally the patch size. Position embeddings and patches are resized.

        Forward accepts any size without this. Use it to save a checkpoint with that size, to train position embeddings
        at that size, or for a finer or coarser grid.

        img_size: (height, width) in pixels. patch_size: in pixels, square. None keeps either.

        Raises ValueError for an image size that is not a multiple of the patch, or a patch that is not square.
        Source: timm; for the patches, FlexiViT (Beyer et al., 2023).
        """
        config = self.config
        height, width = _pair(config.image_size if img_size is None else img_size)
        patch, across = _pair(config.patch_size if patch_size is None else patch_size)
        if patch != across or patch < 1:
            raise ValueError(f"patch_size is {(patch, across)}; accepted: one positive number, or twice the same")
        if min(height, width) < patch or (not config.crop_remainder and (height % patch or width % patch)):
            raise ValueError(f"img_size is {(height, width)}; accepted: multiples of the patch size {patch}")
        if patch != config.patch_size:
            self.patch_embed.projection = resize_patches(self.patch_embed.projection, patch)
        self.patch_embed.patch_size, self.patch_embed.img_size = (patch, patch), (height, width)
        self.config = replace(config, image_size=(height, width), patch_size=patch, position_table=None)
        grid = self.patch_embed.grid_size
        if self.positions is not None and self.positions.grid != grid:
            table = self.positions.table
            resized = LearnedPositions(grid, config.width, config.position_resize)
            resized.table = nn.Parameter(self.positions(*grid).detach(), requires_grad=table.requires_grad)
            self.positions = resized

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop all modules that the feature maps of `indices` do not need. Returns non-negative indices.

        indices: as in `forward_intermediates`. prune_norm: drop the last LayerNorm too. prune_head: drop pooling
        weights, projection and classifier too. Raises ValueError for an index outside the encoder.
        """
        kept = self.block_indices(indices)
        self.blocks = self.blocks[: max(kept) + 1]
        self.config = replace(self.config, mixers=self.config.mixers[: max(kept) + 1])
        if prune_norm:
            self.norm = nn.Identity()
            self.config = replace(self.config, final_norm=False)
        if prune_head:
            self.reset_classifier(0, "token" if self.config.pooling == "cls" else "avg")
            self.pool_norm, self.project = nn.Identity(), nn.Identity()
            self.config = replace(self.config, pool_norm=False, embed_dim=None)
        return kept

    def block_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """`indices` of `forward_intermediates` as non-negative numbers. Raises ValueError outside the encoder."""
        depth = self.config.depth
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                raise ValueError(f"indices is {indices}; accepted: 1 to {depth} last blocks, or a list of indices")
            return list(range(depth - indices, depth))
        if not indices or any(not -depth <= i < depth for i in indices):
            raise ValueError(f"indices is {list(indices)}; accepted: at least one of {-depth} to {depth - 1}")
        return [i % depth for i in indices]


def data_config(config: EncoderConfig) -> dict[str, Any]:
    """The preprocessing of a config as timm's `pretrained_cfg`."""
    return {
        "architecture": config.name,
        "input_size": (config.channels, *config.image_size),
        "fixed_input_size": False,
        "min_input_size": (config.channels, config.patch_size, config.patch_size),
        "interpolation": config.image_resample,
        "crop_pct": config.image_crop_pct,
        "crop_mode": "center" if config.image_crop else "squash",
        "mean": config.image_mean,
        "std": config.image_std,
        "num_classes": config.num_classes,
        "pool_size": tuple(side // config.patch_size for side in config.image_size),
        "first_conv": "patch_embed.projection",
        "classifier": "head",
    }


def build_head(config: EncoderConfig) -> nn.Module:
    """Create the classifier of a config: a Linear with small weights, or an Identity if there are no classes."""
    if not config.num_classes:
        return nn.Identity()
    head = nn.Linear(config.pooled_width, config.num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def resize_patches(projection: nn.Conv2d, patch: int) -> nn.Conv2d:
    """Resize a patch projection so that a resized patch gives the same token as before.

    The weights are multiplied by the pseudo-inverse of the resize, because resized weights would change the magnitude
    of the tokens. Source: FlexiViT (Beyer et al., 2023), section 3.4.
    """
    if not isinstance(projection, nn.Conv2d):  # an adapter around it would be lost
        raise ValueError(f"patch_embed.projection is a {type(projection).__name__}; expected a Conv2d to resize it")
    weight = projection.weight
    out, channels, old, _ = weight.shape
    basis = torch.eye(old * old, device=weight.device).view(-1, 1, old, old)
    resize = interpolate(basis, (patch, patch), mode="bicubic", antialias=True).flatten(1)  # [old^2, patch^2]
    resized = weight.float().view(out, channels, -1) @ torch.linalg.pinv(resize).T
    new = nn.Conv2d(channels, out, patch, patch, bias=projection.bias is not None)
    new.weight = nn.Parameter(resized.view(out, channels, patch, patch).to(weight.dtype), weight.requires_grad)
    new.bias = projection.bias
    return new


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
