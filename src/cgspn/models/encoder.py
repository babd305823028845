"""The image encoder: one class for ViT, C-GSPN, GSPN and hybrids, which differ in their list of mixers."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import AttentionMixer, Block, Grid, LayerNorm, LearnedPositions, Mixer, PatchEmbed, PropagationMixer
from ..layers.pooling import ClassTokenPool, MapPool, MeanPool
from ..layers.window_attention import WindowAttentionMixer, order, window_of
from .card import write_card
from .checkpoint import PREPROCESSING, save_model, write_atomically
from .config import MODEL_TYPE, EncoderConfig, preprocessing, to_dict
from .cuda_graphs import CapturedEncoder
from .timm_api import TimmContract, build_head
from .variable_size import encode_variable_size
from .weights import saved_state


class EncoderOutput(NamedTuple):
    """The output of an encoder. tokens [B, h, w, C]: the grid after the last norm. pooled [B, C or embed_dim]: one
    vector per image.

    For the image encoder of an image-text model, the pooled vector is the image embedding, not normalised.
    """

    tokens: Tensor
    pooled: Tensor


def build_mixer(config: EncoderConfig, layer: int) -> Mixer:
    """Create the mixer of one block. Raises the mixer's ValueError for settings that do not match the width."""
    if config.mixers[layer] == "attention":
        return AttentionMixer(config.width, config.attention)
    if config.mixers[layer] == "window_attention":
        return WindowAttentionMixer(config.width, config.attention, config.window_size)
    return PropagationMixer(config.width, config.propagation)


class Encoder(TimmContract):
    """An image encoder: normalised images [B, channels, H, W] to tokens and a pooled vector.

    H and W may be any multiples of the patch size. Images are normalised with config.image_mean and config.image_std.
    With config.num_classes, a classifier follows the pooling; its logits are `forward_head(forward_features(images))`,
    and `forward` does not change. The method names are those of timm's vision transformers (docs/timm.md).

    block_type: class of the blocks; subclasses for other libraries override it.
    """

    block_type: type[Block] = Block

    def __init__(self, config: EncoderConfig) -> None:
        """Raises ValueError for a config with inconsistent settings."""
        super().__init__()
        self.config = config
        width, patch, eps = config.width, config.patch_size, config.norm_eps
        self.patch_embed = PatchEmbed(
            patch, config.channels, width, config.patch_bias, config.crop_remainder, config.image_size
        )
        self.prefix = nn.Parameter(torch.randn(config.prefix, width) * 0.02) if config.prefix else None
        table = LearnedPositions(config.position_grid, width, config.position_resize) if config.positions else None
        self.positions = table
        self.pre_norm = LayerNorm(width, eps=eps) if config.pre_norm else nn.Identity()
        mlp = (config.mlp_hidden, config.activation, eps)
        mixers = (build_mixer(config, layer) for layer in range(config.depth))
        self.blocks = nn.ModuleList(self.block_type(width, mixer, *mlp, config.layer_scale) for mixer in mixers)
        self.norm = LayerNorm(width, eps=eps) if config.final_norm else nn.Identity()
        self.pool: nn.Module
        if config.pooling == "map":
            self.pool = MapPool(width, config.attention.heads, *mlp)
        else:
            self.pool = MeanPool() if config.pooling == "mean" else ClassTokenPool(config.summary_tokens)
        self.pool_norm = LayerNorm(width, eps=eps) if config.pool_norm else nn.Identity()
        self.project: nn.Module = nn.Identity()
        if config.embed_dim is not None:
            self.project = nn.Linear(width, config.embed_dim, bias=config.embed_bias)
            nn.init.normal_(self.project.weight, std=width**-0.5)
        self.head = build_head(config)
        self.checkpointing = False

    def init_weights(self, mode: str = "") -> None:
        """Initialise all weights as in a new encoder, for example after `to_empty` from the meta device.

        mode: accepted for compatibility with timm; it has no effect.
        """
        fresh = Encoder(self.config).state_dict()
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(fresh[name])

    def record_sizes(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Record in the config that the encoder was trained at these shapes, (height, width) in pixels.

        The native size becomes the largest size it was trained at: the only shape, or a square. Position embeddings do
        not change; they are resized as before.
        """
        patch, chosen = self.config.patch_size, tuple(shapes)
        sides = [h if h == w else max(1, round((h * w) ** 0.5 / patch)) * patch for h, w in chosen]
        trained = tuple(sorted({*self.config.trained_sizes, *sides}))
        native = self.config.image_size
        if max(sides) == trained[-1]:
            native = chosen[0] if len(chosen) == 1 else (trained[-1], trained[-1])
        table = self.positions.grid if self.positions is not None else None
        self.config = replace(self.config, trained_sizes=trained, image_size=native, position_table=table)
        self.patch_embed.img_size = native

    def each_block(self) -> list[Block]:
        """The blocks in order, including any wrappers around them."""
        return list(self.blocks)  # type: ignore[arg-type]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether the backward recomputes each block's activations instead of saving them."""
        self.checkpointing = enable

    def embed(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Grid]:
        """Apply everything before the first block: images [B, channels, H, W] -> tokens [B, prefix + h*w, C] and the
        grid.

        mask: [B, h, w] bool, False where a position is padding. Raises ValueError for sizes that are not multiples of
            the patch size.
        """
        tokens, grid = self.patch_embed(images, mask)
        if self.positions is not None:
            tokens = tokens + self.positions(grid.height, grid.width, mask).to(tokens.dtype)
        if self.prefix is not None:
            prefix = self.prefix
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        return self.pre_norm(tokens), grid._replace(prefix=self.config.prefix)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images [B, channels, H, W] -> normalised tokens [B, prefix + h*w, C] after the last block, as in timm.

        mask: [B, h, w] bool, False where a position is padding. Raises ValueError for sizes that are not multiples of
            the patch size.
        """
        return self._features(images, mask)[0]

    def _features(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Grid]:
        tokens, grid = self.embed(images, mask)
        for block in self.each_block():
            tokens, grid = order(tokens, grid, window_of(block))
            tokens = self.run_block(block, tokens, grid)
        tokens, grid = order(tokens, grid, None)
        return self.norm(tokens), grid

    def run_block(self, block: Block, tokens: Tensor, grid: Grid) -> Tensor:
        """Run a block, with activation checkpointing if enabled."""
        return self._recomputed(block, tokens, grid)

    def run_tapped(
        self,
        block: Block,
        tokens: Tensor,
        grid: Grid,
        run: Callable[[Block, Tensor, Grid], tuple[Tensor, Tensor]] = Block.tapped,
    ) -> tuple[Tensor, Tensor]:
        """A block's output and mixing branch from `run`, with activation checkpointing if enabled."""
        return self._recomputed(partial(run, block), tokens, grid)

    def _recomputed(self, function: Callable[[Tensor, Grid], Any], tokens: Tensor, grid: Grid) -> Any:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return function(tokens, grid)
        # blocks are deterministic, so RNG states are not saved, which CUDA graphs do not allow
        return checkpoint(function, tokens, grid, use_reentrant=False, preserve_rng_state=False)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, prefix + h*w, C] -> logits [B, num_classes], or pooled [B, config.pooled_width].

        pre_logits: return the pooled vector even if there is a classifier.
        mask: [B, h, w] bool, as for the tokens.
        """
        prefix = self.config.prefix
        grid = Grid(1, tokens.shape[1] - prefix, prefix, mask)  # pooling does not use positions
        pooled: Tensor = self.project(self.pool_norm(self.pool(tokens, grid)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Images [B, channels, H, W] -> tokens [B, h, w, C] and pooled [B, config.pooled_width]."""
        tokens, grid = self._features(images, mask)
        return EncoderOutput(to_map(tokens, grid), self.forward_head(tokens, pre_logits=True, mask=mask))

    def forward_variable_size(self, images: Sequence[Tensor], **options: Any) -> list[EncoderOutput]:
        """Encode images [channels, H, W] of different sizes: tokens [h, w, C] and pooled for each, in order.

        options: `method`, `max_tokens`, `max_shapes` and `shapes` of `cgspn.models.encode_variable_size`, with the same
            errors.
        """
        return encode_variable_size(self, images, **options)

    def captured(self, *, limit: int = 16, memory: float = 8.0) -> CapturedEncoder:
        """Return a callable that runs this encoder with CUDA graphs, for inference on one or a few images.

        Arguments and errors are those of `CapturedEncoder`.
        """
        return CapturedEncoder(self, limit=limit, memory=memory)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        *,
        return_prefix_tokens: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = True,
        mask: Tensor | None = None,
    ) -> Any:
        """Return feature maps after the given blocks, as in timm: a list of [B, C, h, w] in the order of `indices`.

        Args:
            images: [B, channels, H, W].
            indices: an int n for the last n blocks, or block indices (negative ones count from the end); None for all.
            norm: apply the final LayerNorm to each.
            return_prefix_tokens: return pairs (map, prefix tokens [B, prefix, C]) instead of maps, if there are prefix
                tokens.
            stop_early: do not run blocks after the last requested one, even if the final tokens are returned.
            output_fmt: "NCHW", or "NLC" for [B, h*w, C].
            intermediates_only: return only the list, and run no block that it does not need. False returns the tuple
                (final tokens as in `forward_features`, list). The default is True here and False in timm.
            mask: [B, h, w] bool, False where a position is padding.

        Raises ValueError for an index outside the encoder or another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; accepted: 'NCHW', 'NLC'")
        wanted = self.block_indices(indices)
        tokens, grid = self.embed(images, mask)
        taken: dict[int, Any] = {}
        last = max(wanted) + 1 if intermediates_only or stop_early else self.config.depth
        for i, block in enumerate(self.each_block()[:last]):
            tokens, grid = order(tokens, grid, window_of(block))
            tokens = self.run_block(block, tokens, grid)
            if i not in wanted:
                continue
            seen = order(self.norm(tokens) if norm else tokens, grid, None)[0]
            taken[i] = to_map(seen, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else seen[:, grid.prefix :]
            if return_prefix_tokens and grid.prefix:
                taken[i] = (taken[i], seen[:, : grid.prefix])
        maps = [taken[i] for i in wanted]
        return maps if intermediates_only else (self.norm(order(tokens, grid, None)[0]), maps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, each atomically.

        Also writes preprocessor_config.json, with which transformers can load the folder (`cgspn.models.hf`), and a
        model card, README.md, if there is none. Raises OSError if the folder cannot be written, and the CheckpointError
        of `saved_state` before anything is written.
        """
        state = saved_state(self, lambda: Encoder(self.config))
        write_atomically(Path(folder) / PREPROCESSING, json.dumps(preprocessing(self.config), indent=2) + "\n")
        config = {"model": "encoder", "model_type": MODEL_TYPE, "architectures": ["CgspnModel"]}
        save_model(folder, {**config, "encoder": to_dict(self.config)}, state)
        write_card(folder, self.config, sum(p.numel() for p in self.parameters()))


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """tokens [B, prefix + h*w, C] -> the grid tokens [B, h, w, C]."""
    return tokens[:, grid.prefix :].unflatten(1, (grid.height, grid.width))
