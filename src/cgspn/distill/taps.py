"""Taps, at which teacher and student are compared: after each sub-layer (PP) and after each block (PB)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..layers import Block, Grid
from ..models.config import EncoderConfig
from ..models.encoder import Encoder

# relative errors of the tokens: order of sums; bfloat16 through tens of blocks
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}

RunTapped = Callable[[Block, Tensor, Grid], tuple[Tensor, Tensor]]


class Taps(NamedTuple):
    """The features recorded in one forward pass.

    stream: tokens [B, N, C] before the first block and after each block, prefix tokens included.
    sublayers: PP, the branch of each mixing sub-layer before the residual, grid tokens only, [B, h*w, C].
    tokens: after the last norm, [B, h*w, C]. pooled: [B, C]. grid: the grid of the stream.
    """

    stream: list[Tensor]
    sublayers: list[Tensor]
    tokens: Tensor
    pooled: Tensor
    grid: Grid

    @property
    def block_inputs(self) -> list[Tensor]:
        """The tokens [B, N, C] entering each block, prefix tokens included."""
        return self.stream[:-1]

    @property
    def blocks(self) -> list[Tensor]:
        """PB, the output of each block, grid tokens only, [B, h*w, C]."""
        return [tokens[:, self.grid.prefix :] for tokens in self.stream[1:]]

    def features(self) -> list[Tensor]:
        """All features in one list."""
        return [*self.stream, *self.sublayers, self.tokens, self.pooled]

    def with_features(self, features: list[Tensor]) -> "Taps":
        """Taps of the same grid with other `features`."""
        *rest, tokens, pooled = features
        return Taps(rest[: len(self.stream)], rest[len(self.stream) :], tokens, pooled, self.grid)


def tapped_forward(encoder: Encoder, images: Tensor, run: RunTapped = Block.tapped) -> Taps:
    """Run the forward pass of an encoder and record every tap. images: normalised, [B, channels, H, W].

    run: function that runs a block, like `Block.tapped`. Raises ValueError for an image size that is not a multiple of
        the patch size.
    Paper: PP and PB taps (docs/paper.md).
    """
    tokens, grid = encoder.embed(images)
    stream, sublayers = [tokens], []
    for block in encoder.each_block():
        tokens, branch = encoder.run_tapped(block, tokens, grid, run)
        stream.append(tokens)
        sublayers.append(branch[:, grid.prefix :])
    tokens = encoder.norm(tokens)
    pooled = encoder.forward_head(tokens, pre_logits=True)
    return Taps(stream, sublayers, tokens[:, grid.prefix :], pooled, grid)


def retarget_first_block(taps: Taps, entry: Tensor) -> Taps:
    """Change a teacher's taps for a student whose grid tokens enter the first block as `entry` [B, h*w, C].

    Without position embeddings a student's tokens differ from the teacher's before the first block, and this difference
    would stay in the residual stream. So the first sub-layer gets the student's own tokens, and its target is the
    teacher's stream after the first sub-layer minus these tokens. The scan can infer positions because it starts at the
    borders. Not in the paper.
    """
    first, prefix = taps.stream[0], taps.grid.prefix
    gap = first[:, prefix:] - entry
    return taps._replace(
        stream=[torch.cat([first[:, :prefix], entry], 1), *taps.stream[1:]],
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

    return Taps(
        [up(tokens[:, taps.grid.prefix :]) for tokens in taps.stream],
        [up(tokens) for tokens in taps.sublayers],
        up(taps.tokens),
        taps.pooled,
        Grid(h, w, 0),
    )


class ParityError(RuntimeError):
    """Raised if the teacher's taps do not match its forward pass; the message gives the error and the tolerance."""


@torch.no_grad()
def check_parity(teacher: Encoder, images: Tensor, precision: str) -> float:
    """Compare the taps of a teacher, in the run's precision, with its plain forward pass in float32.

    teacher: in eval mode. images: [B, channels, H, W], normalised; two are enough. precision: "float32" or "bfloat16".

    Returns the relative error of the final tokens. Raises ParityError if it is too large for the precision, for example
    because of damaged weights or features that overflow.
    """
    plain = teacher(images).tokens.flatten(1, 2)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        tapped = tapped_forward(teacher, images).tokens
    error = float((tapped.double() - plain.double()).norm() / plain.double().norm())
    allowed = TOLERANCE[precision]
    if not error <= allowed:
        raise ParityError(
            f"the teacher's tokens in {precision} differ from its forward pass by {error:.2g}; accepted: {allowed}"
        )
    return error
