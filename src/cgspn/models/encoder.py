"""The image encoder: one class for ViT, C-GSPN, GSPN and hybrids, which differ in a list of mixers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import (
    AttentionMixer,
    Block,
    ClassTokenPool,
    Grid,
    LearnedPositions,
    MapPool,
    MeanPool,
    Mixer,
    PatchEmbed,
    PropagationMixer,
)
from .checkpoint import save_model
from .config import EncoderConfig, to_dict


class EncoderOutput(NamedTuple):
    """tokens [B, h, w, C]: the grid after the last norm. pooled [B, C or embed_dim]: one vector an image.

    For the image towers of image-text models the pooled vector is their image embedding, of any length.
    """

    tokens: Tensor
    pooled: Tensor


def build_mixer(config: EncoderConfig, layer: int) -> Mixer:
    """The mixer of one block. Raises ValueError from the mixer for settings that do not fit the width."""
    if config.mixers[layer] == "attention":
        return AttentionMixer(config.width, config.attention)
    return PropagationMixer(config.width, config.propagation)


class Encoder(nn.Module):
    """Images [B, channels, H, W] (normalised with config.image_mean and image_std) to tokens and a pooled vector.

    Any H and W that are multiples of the patch size. Source: design, sections 3 and 6.
    """

    def __init__(self, config: EncoderConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        grid = (config.image_size[0] // patch, config.image_size[1] // patch)
        self.patch_embed = PatchEmbed(patch, config.channels, width, config.patch_bias, config.crop_remainder)
        self.prefix = nn.Parameter(torch.randn(config.prefix, width) * 0.02) if config.prefix else None
        self.positions = LearnedPositions(grid, width, config.position_resize) if config.positions else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                width,
                build_mixer(config, layer),
                config.mlp_hidden,
                config.activation,
                config.norm_eps,
                config.layer_scale,
            )
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.pool: nn.Module
        if config.pooling == "map":
            self.pool = MapPool(width, config.attention.heads, config.mlp_hidden, config.activation, config.norm_eps)
        else:
            self.pool = MeanPool() if config.pooling == "mean" else ClassTokenPool()
        self.pool_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pool_norm else nn.Identity()
        self.project: nn.Module = nn.Identity()
        if config.embed_dim is not None:
            self.project = nn.Linear(width, config.embed_dim, bias=config.embed_bias)
            nn.init.normal_(self.project.weight, std=width**-0.5)
        self.checkpointing = False

    def each_block(self) -> list[Block]:
        """The blocks in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.checkpointing = enable

    def embed(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Grid]:
        """Everything before the first block: images [B, channels, H, W] -> tokens [B, prefix + h*w, C] and grid.

        mask: [B, h, w] bool, False where a position is padding. Raises ValueError for sizes that patches do not tile.
        """
        tokens, grid = self.patch_embed(images)
        if self.positions is not None:
            tokens = tokens + self.positions(grid.height, grid.width)
        if self.prefix is not None:
            prefix = self.prefix
            tokens = torch.cat([prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        return self.pre_norm(tokens), grid._replace(prefix=self.config.prefix, mask=mask)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Grid]:
        """Images to the normalised tokens [B, prefix + h*w, C] after the last block, and their grid."""
        tokens, grid = self.embed(images, mask)
        for block in self.each_block():
            tokens = self.run_block(block, tokens, grid)
        return self.norm(tokens), grid

    def run_block(self, block: Block, tokens: Tensor, grid: Grid) -> Tensor:
        """One block, with activation checkpointing if that is on."""
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, tokens, grid, use_reentrant=False)
            return out
        result: Tensor = block(tokens, grid)
        return result

    def run_tapped(self, block: Block, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """One block's output and its mixing branch, with activation checkpointing if that is on."""
        if self.checkpointing and torch.is_grad_enabled():
            out: tuple[Tensor, Tensor] = checkpoint(block.tapped, tokens, grid, use_reentrant=False)
            return out
        return block.tapped(tokens, grid)

    def forward_head(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Normalised tokens [B, N, C] -> pooled [B, config.pooled_width]."""
        pooled: Tensor = self.project(self.pool_norm(self.pool(tokens, grid)))
        return pooled

    def forward(self, images: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Images [B, channels, H, W] -> tokens [B, h, w, C] and pooled [B, config.pooled_width]."""
        tokens, grid = self.forward_features(images, mask)
        return EncoderOutput(to_map(tokens, grid), self.forward_head(tokens, grid))

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False
    ) -> list[Tensor]:
        """Feature maps after chosen blocks, as timm gives them: list of [B, C, h, w].

        Args:
            images: [B, channels, H, W].
            indices: the last n blocks (int), or block indices, negative ones from the end; None for all.
            norm: apply the final LayerNorm to each.

        Raises ValueError for an index outside the encoder.
        """
        wanted = self.block_indices(indices)
        tokens, grid = self.embed(images)
        maps = {}
        for i, block in enumerate(self.each_block()[: max(wanted) + 1]):
            tokens = self.run_block(block, tokens, grid)
            if i in wanted:
                maps[i] = to_map(self.norm(tokens) if norm else tokens, grid).permute(0, 3, 1, 2)
        return [maps[i] for i in wanted]

    def block_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Indices from 0 for what `forward_intermediates` accepts. Raises ValueError outside the encoder."""
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all.

        Raises OSError if the folder cannot be written.
        """
        save_model(folder, {"model": "encoder", "encoder": to_dict(self.config)}, self.state_dict())


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """tokens [B, prefix + h*w, C] -> the grid alone, [B, h, w, C]."""
    return tokens[:, grid.prefix :].reshape(len(tokens), grid.height, grid.width, -1)
