"""Taps, at which teacher and student are compared: after each sub-layer (PP) and after each block (PB)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..layers import Block, Grid
from ..models.config import EncoderConfig
from ..models.encoder import Encoder

RunTapped = Callable[[Block, Tensor, Grid], tuple[Tensor, Tensor]]


class Taps(NamedTuple):
    """The features recorded in one forward pass, in the order of the blocks; grid tokens only.

    block_inputs: tokens [B, N, C] entering each block, prefix tokens included.
    sublayers: PP, the branch of each mixing sub-layer before the residual, [B, h*w, C].
    blocks: PB, the output of each block, [B, h*w, C].
    tokens: after the last norm, [B, h*w, C]. pooled: [B, C]. grid: the grid of the block_inputs.
    """

    block_inputs: list[Tensor]
    sublayers: list[Tensor]
    blocks: list[Tensor]
    tokens: Tensor
    pooled: Tensor
    grid: Grid


def tapped_forward(encoder: Encoder, images: Tensor, run: RunTapped = Block.tapped) -> Taps:
    """Run the forward pass of an encoder and record every tap. images: normalised, [B, channels, H, W].

    run: function that runs a block, like `Block.tapped`. Raises ValueError for an image size that is not a multiple of
        the patch size.
    Paper: PP and PB taps (docs/paper.md).
    """
    tokens, grid = encoder.embed(images)
    block_inputs, sublayers, blocks = [], [], []
    for block in encoder.each_block():
        block_inputs.append(tokens)
        tokens, branch = encoder.run_tapped(block, tokens, grid, run)
        sublayers.append(branch[:, grid.prefix :])
        blocks.append(tokens[:, grid.prefix :])
    tokens = encoder.norm(tokens)
    pooled = encoder.forward_head(tokens, pre_logits=True)
    return Taps(block_inputs, sublayers, blocks, tokens[:, grid.prefix :], pooled, grid)


def retarget_first_block(taps: Taps, entry: Tensor) -> Taps:
    """Change a teacher's taps for a student whose grid tokens enter the first block as `entry` [B, h*w, C].

    Without position embeddings a student's tokens differ from the teacher's before the first block, and this difference
    would stay in the residual stream. So the first sub-layer gets the student's own tokens, and its target is the
    teacher's stream after the first sub-layer minus these tokens. The scan can infer positions because it starts at the
    borders. Not in the paper.
    """
    gap = taps.block_inputs[0][:, taps.grid.prefix :] - entry
    prefix = taps.block_inputs[0][:, : taps.grid.prefix]
    return taps._replace(
        block_inputs=[torch.cat([prefix, entry], 1), *taps.block_inputs[1:]],
        sublayers=[taps.sublayers[0] + gap, *taps.sublayers[1:]],
    )


@torch.no_grad()
def observe(
    teacher: Encoder,
    images: Tensor,
    student: EncoderConfig,
    size: tuple[int, int] | None = None,
    run: RunTapped = Block.tapped,
) -> Taps:
    """The frozen teacher's taps for images with the student's normalisation.

    teacher: put into eval mode. images: [B, channels, H, W]. size: (height, width) in pixels to which images are
    resized for the teacher; its grid features are then upsampled bilinearly to the grid of the original images. None
    does not resize. run: as in `tapped_forward`.

    Paper: high-resolution curriculum, upsampled self-teacher (docs/paper.md).
    """
    teacher.eval()
    config = teacher.config
    if (config.image_mean, config.image_std) != (student.image_mean, student.image_std):
        mean, std, mean_t, std_t = (
            torch.tensor(v, device=images.device)[:, None, None]
            for v in (student.image_mean, student.image_std, config.image_mean, config.image_std)
        )
        # in float32, because bf16 would round after each step
        images = ((images.float() * std + mean - mean_t) / std_t).to(images.dtype)
    if size is None or size == tuple(images.shape[-2:]):
        return tapped_forward(teacher, images, run)
    h, w = images.shape[-2] // config.patch_size, images.shape[-1] // config.patch_size
    taps = tapped_forward(teacher, interpolate(images, size, mode="bilinear", antialias=True), run)

    def up(tokens: Tensor) -> Tensor:
        grid = tokens.unflatten(1, (taps.grid.height, taps.grid.width)).permute(0, 3, 1, 2)
        return interpolate(grid.float(), (h, w), mode="bilinear").to(tokens.dtype).flatten(2).transpose(1, 2)

    return taps._replace(
        block_inputs=[],
        sublayers=[up(t) for t in taps.sublayers],
        blocks=[up(t) for t in taps.blocks],
        tokens=up(taps.tokens),
        grid=taps.grid._replace(height=h, width=w),
    )
