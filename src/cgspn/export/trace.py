"""An image encoder as one program of tensors, with batch, height and width left open: torch.export."""

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
    """The exported module: normalised images [B, channels, H, W] to the outputs in `names`, in this order.

    tokens [B, h, w, C] and pooled [B, C or embed_dim] of the encoder; logits [B, num_classes] if it has a classifier;
    embedding [B, E] of unit length if it is the image side of an image-text model.
    """

    def __init__(self, model: Encoder | DualEncoder) -> None:
        """The model is not changed."""
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
    """Learned positions without the short cut at the native grid, which would fix the size of a traced program."""

    def forward(self, height: int, width: int, mask: Tensor | None = None) -> Tensor:
        """As `LearnedPositions`, without a mask."""
        return self.resized(height, width)


class OpenMapPool(MapPool):
    """Attention pooling over a copy of the grid tokens: of a view behind a prefix, tracing asks whether sizes are 1."""

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """As `MapPool`."""
        own = tokens[:, grid.prefix :].clone(memory_format=torch.contiguous_format)
        return super().forward(own, grid._replace(prefix=0))


class ShiftedPropagation(PropagationMixer):
    """A propagation mixer whose local convolution is a sum of shifted maps.

    Tracing a convolution over channels-last maps asks whether sizes are 1, and the program would then refuse grids of
    one row and batches of one image.
    """

    def localise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As `PropagationMixer`, without a mask."""
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
    """The program of an `ImageSide` for all sizes and batches of `bounds`, on the device and in the dtype it is in.

    Args:
        side: it is not changed.
        bounds: one size or a batch of 1 alone are fixed in the program; others stay open.
        onnx: keep local convolutions as such. The program is then of use to the ONNX exporter alone, to which memory
            layouts mean nothing; PyTorch would refuse grids of one line.

    Raises torch's own errors for what cannot be traced.
    """
    shape_config = private("fx.experimental._config")
    side = copy.deepcopy(side).eval().requires_grad_(False)
    for module in side.modules():
        if type(module) is LearnedPositions:
            module.__class__ = OpenPositions
        if type(module) is MapPool:
            module.__class__ = OpenMapPool
        # asked here, as parameters are tensors of another kind while a program is traced
        if (
            not onnx
            and type(module) is PropagationMixer
            and (module.local is None or is_plain(module.local, nn.Conv2d))
        ):
            module.__class__ = ShiftedPropagation
    low, high = bounds.grid
    open_sizes: dict[int, object] = {}
    if bounds.max_batch > 1:
        # one or two would be taken for the two that are traced; what checks the bounds refuses three
        open_sizes[0] = Dim("batch", min=1, max=max(3, bounds.max_batch))
    if low < high:
        open_sizes[2] = bounds.patch * Dim("rows", min=low, max=high)
        open_sizes[3] = bounds.patch * Dim("columns", min=low, max=high)
    # an example of sizes that differ from each other and from 1 and 0, where the bounds have such: tracing fixes others
    batch = min(2, bounds.max_batch)
    height, width = (bounds.patch * min(max(low, n), high) for n in (3, 5))
    weight = side.encoder.patch_embed.projection.weight
    images = torch.zeros(batch, side.encoder.config.channels, height, width, device=weight.device, dtype=weight.dtype)
    # sizes of 1 are as likely as others: without this a program traced at 2 refuses them
    with torch.no_grad(), shape_config.patch(backed_size_oblivious=True):
        return torch.export.export(side, (images,), dynamic_shapes=(open_sizes,), strict=False)
