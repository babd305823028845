"""Tracing of an image encoder with torch.export, with dynamic batch, height and width."""

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import normalize, pad

from ..compat import private
from ..layers import Grid, LearnedPositions, MapPool, PropagationMixer
from ..layers.plain import is_plain
from ..models.dual import DualEncoder, image_encoder
from ..models.encoder import Encoder
from .bounds import Bounds


class ImageSide(nn.Module):
    """The exported module: maps normalised images [B, channels, H, W] to the outputs in `names`.

    tokens [B, h, w, C] and pooled [B, C or embed_dim] of the encoder; logits [B, num_classes] if it has a classifier;
    embedding [B, E] of unit length if it is the image side of an image-text model.
    """

    def __init__(self, model: Encoder | DualEncoder) -> None:
        """model: not modified."""
        super().__init__()
        dual = isinstance(model, DualEncoder)
        self.encoder = image_encoder(model)
        self.projection: nn.Module | None = model.image_projection if isinstance(model, DualEncoder) else None
        self.names = ["tokens", "pooled"]
        self.names += ["logits"] if self.encoder.config.num_classes else []
        self.names += ["embedding"] if dual else []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of `names`."""
        tokens, pooled = self.encoder(images)
        outputs = [tokens, pooled]
        if "logits" in self.names:
            outputs.append(self.encoder.head(pooled))
        if self.projection is not None:
            outputs.append(normalize(self.projection(pooled), dim=-1))
        return tuple(outputs)


class OpenPositions(LearnedPositions):
    """Position embeddings without the shortcut for the native grid, which would fix the size of a traced program."""

    def forward(self, height: int, width: int, mask: Tensor | None = None) -> Tensor:
        """The position embeddings of a grid, as in `LearnedPositions`. `mask` is not used."""
        return self.resized(height, width)


class OpenMapPool(MapPool):
    """Attention pooling over a copy of the grid tokens, because a view after a prefix adds guards on sizes of 1."""

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """See `MapPool`."""
        own = tokens[:, grid.prefix :].clone(memory_format=torch.contiguous_format)
        return super().forward(own, grid._replace(prefix=0))


class ShiftedPropagation(PropagationMixer):
    """A propagation mixer that computes its local convolution as a sum of shifted maps.

    Tracing a convolution over channels-last maps adds guards on sizes of 1. The program would then reject grids with
    one row and batches of one image.
    """

    def localise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `PropagationMixer`, without a mask."""
        if self.local is not None:
            reach = self.config.local_kernel // 2
            height, width = x.shape[1:3]
            wide = pad(x, (0, 0, reach, reach, reach, reach))
            near = x if self.local.bias is None else x + self.local.bias
            for i in range(2 * reach + 1):
                for j in range(2 * reach + 1):
                    near = near + wide[:, i : i + height, j : j + width] * self.local.weight[:, 0, i, j]
            x = near
        return self.norm(x.flatten(1, 2)).view(x.shape)


def trace(side: ImageSide, bounds: Bounds, *, onnx: bool = False) -> ExportedProgram:
    """Trace an `ImageSide` for all sizes and batches in `bounds`, with its current device and dtype.

    bounds: a single size, or a batch of only 1, is fixed in the program; others are dynamic. onnx: keep local
    convolutions. Such a program is only for the ONNX exporter, which ignores memory layouts; in PyTorch it would reject
    grids with one line. Raises torch's errors if the model cannot be traced.
    """
    shape_config = private("fx.experimental._config")
    side = copy.deepcopy(side).eval().requires_grad_(False)
    for module in side.modules():
        if type(module) is LearnedPositions:
            module.__class__ = OpenPositions
        if type(module) is MapPool:
            module.__class__ = OpenMapPool
        # checked here, because parameters have another type during tracing
        if (
            not onnx
            and type(module) is PropagationMixer
            and (module.local is None or is_plain(module.local, nn.Conv2d))
        ):
            module.__class__ = ShiftedPropagation
    low, high = bounds.grid
    open_sizes: dict[int, object] = {}
    if bounds.max_batch > 1:
        # one or two could be confused with the traced batch of two; the bounds check rejects three
        open_sizes[0] = Dim("batch", min=1, max=max(3, bounds.max_batch))
    if low < high:
        open_sizes[2] = bounds.patch * Dim("rows", min=low, max=high)
        open_sizes[3] = bounds.patch * Dim("columns", min=low, max=high)
    # example sizes that differ from each other, from 0 and from 1, if possible: tracing would fix those
    batch = min(2, bounds.max_batch)
    height, width = (bounds.patch * min(max(low, n), high) for n in (3, 5))
    weight = side.encoder.input_weight
    images = torch.zeros(batch, side.encoder.config.channels, height, width, device=weight.device, dtype=weight.dtype)
    # without this a program that was traced at 2 rejects sizes of 1
    with torch.no_grad(), shape_config.patch(backed_size_oblivious=True):
        return torch.export.export(side, (images,), dynamic_shapes=(open_sizes,), strict=False)
