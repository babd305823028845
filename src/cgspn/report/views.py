"""What the feature and influence pictures are made of: canvases, feature maps, and who sees what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import center_crop, normalize, to_float
from ..distill.taps import Taps, tapped_forward
from ..evaluate import influence_map
from ..layers import AttentionMixer, Grid
from ..models.config import EncoderConfig
from ..models.encoder import Encoder
from .pictures import tile


def canvases(images: Tensor, config: EncoderConfig, columns: int) -> tuple[Tensor, Tensor]:
    """Images put together to larger ones: columns x columns of them make a canvas, each at the native size.

    Args:
        images: uint8, or float in 0..1, [N, 1 or 3, H, W], N a multiple of columns**2.
        config: of the encoder, for the native size and the normalisation.
        columns: images to a side of a canvas.

    Returns:
        Grey pictures [B, h, w] in 0..1 to show, and what the encoder takes, [B, 3, h, w]; B = N / columns**2.

    Raises ValueError if N does not fit.
    """
    if len(images) % columns**2:
        raise ValueError(f"images holds {len(images)}; expected a multiple of {columns**2}")
    native = center_crop(to_float(images), config.image_size)
    whole = torch.stack([tile(group, columns) for group in native.split(columns**2)])
    return whole.mean(1), normalize(whole, config.image_mean, config.image_std)


@torch.no_grad()
def feature_maps(encoder: Encoder, images: Tensor) -> Tensor:
    """The grid tokens after the last norm: normalised images [B, 3, H, W] -> [B, h, w, C]."""
    tokens: Tensor = encoder(images).tokens
    return tokens


@torch.no_grad()
def walk(encoder: Encoder, image: Tensor) -> Taps:
    """Every tap of one normalised image [1, 3, H, W]."""
    return tapped_forward(encoder, image)


def sublayer_view(
    encoder: Encoder, taps: Taps, layer: int, position: tuple[int, int], *, probes: int | None = None
) -> Tensor:
    """How much one position of one mixer alone takes from every other position, on the features that enter it.

    Of an attention mixer this is the row of its attention map, averaged over the heads. Of any other mixer it is
    the size of the derivative, `influence_map`.

    Args:
        encoder: whose mixer.
        taps: of one image, by `walk`.
        layer: index of the block.
        position: (row, column) on the grid.
        probes: of `influence_map`.

    Returns:
        [h, w], not negative.
    """
    block, grid = encoder.each_block()[layer], taps.grid
    with torch.no_grad():
        entry = block.norm1(taps.block_inputs[layer])
    mixer = block.mixer
    if isinstance(mixer, AttentionMixer):
        row = mixer.weights(entry, grid).mean(1)[0, grid.prefix + position[0] * grid.width + position[1]]
        return row[grid.prefix :].view(grid.height, grid.width)

    def alone(x: Tensor) -> Tensor:
        out: Tensor = mixer(x.flatten(1, 2), grid)
        return out.unflatten(1, (grid.height, grid.width))

    return influence_map(alone, entry.unflatten(1, (grid.height, grid.width)), position, probes=probes)


def encoder_view(encoder: Encoder, taps: Taps, position: tuple[int, int], *, probes: int | None = 16) -> Tensor:
    """How much one position of the encoder's output changes with each position of what enters its first block.

    Args:
        encoder: any encoder.
        taps: of one image, by `walk`.
        position: (row, column) on the grid.
        probes: of `influence_map`; None for the exact norm.

    Returns:
        [h, w], not negative.
    """
    grid: Grid = taps.grid
    prefix, entry = taps.block_inputs[0][:, : grid.prefix], taps.block_inputs[0][:, grid.prefix :]

    def run_blocks(x: Tensor) -> Tensor:
        tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
        for block in encoder.each_block():
            tokens = block(tokens, grid)
        out: Tensor = encoder.norm(tokens)
        return out[:, grid.prefix :].unflatten(1, (grid.height, grid.width))

    return influence_map(run_blocks, entry.unflatten(1, (grid.height, grid.width)), position, probes=probes)


def reach(values: Tensor, position: tuple[int, int], share: float = 0.5) -> float:
    """Radius, in patches, within which a position finds `share` of what it takes from all others; 0 for nothing.

    Args:
        values: [h, w], not negative; the position's own value does not count.
        position: (row, column).
        share: 0 to 1.
    """
    rows = torch.arange(values.shape[0], dtype=torch.float64)[:, None] - position[0]
    columns = torch.arange(values.shape[1], dtype=torch.float64)[None] - position[1]
    distance = (rows.square() + columns.square()).sqrt().flatten()
    weight = torch.where(distance > 0, values.detach().double().flatten(), 0.0)
    if float(weight.sum()) == 0:
        return 0.0
    order = distance.argsort()
    summed = weight[order].cumsum(0) / weight.sum()
    first = min(int((summed < share - 1e-12).sum()), len(order) - 1)
    return float(distance[order][first])


def snap(
    picture: Tensor, patch: int, near: tuple[float, float], *, bright: bool = True, within: int = 4
) -> tuple[int, int]:
    """The brightest (or darkest) patch near a place, so that a chosen pixel lies on an object (or beside one).

    Args:
        picture: [H, W].
        patch: size of a patch in pixels.
        near: the place, as shares of height and width.
        bright: brightest or darkest.
        within: largest distance from it, in patches.

    Returns:
        (row, column) of the patch grid.
    """
    means = torch.nn.functional.avg_pool2d(picture[None, None].float(), patch)[0, 0]
    h, w = means.shape
    row, column = int(near[0] * (h - 1)), int(near[1] * (w - 1))
    top, left = max(0, row - within), max(0, column - within)
    window = means[top : row + within + 1, left : column + within + 1]
    index = int(window.argmax() if bright else window.argmin())
    return top + index // window.shape[1], left + index % window.shape[1]
