"""Feature pyramids for detection and segmentation heads, computed from the encoder's single feature map."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from .encoder import Encoder


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """A feature pyramid: images [B, in, H, W] to maps of several strides, each [B, channels, ceil(H / stride), ceil(W /
    stride)].

    Images may have any height and width; they are padded with zeros at the bottom and right to whole patches. Cell (i,
    j) of a map covers the pixels that start at (i * stride, j * stride). With 14 px patches, the maps have strides 3.5,
    7, 14 and 28 and are resampled bilinearly to 4, 8, 16 and 32; `strides=(3.5, 7, 14, 28)` returns them without
    resampling.

    The maps come in an OrderedDict "p2", "p3", ... (two to that power is about the stride), and `out_channels` is
    what torchvision's detectors ask of a backbone:

        pyramid = FeaturePyramid(cgspn.load_encoder("runs/student"))
        maps = pyramid(images)  # {"p2": [B, 256, H/4, W/4], ..., "p5": [B, 256, H/32, W/32]}

    Blocks after `index`, the pooling and a classifier are not used. With DistributedDataParallel, remove them first
    with `encoder.prune_intermediate_layers([index])`.
    Source: the simple feature pyramid of ViTDet (Li et al., 2022), section 3.
    """

    def __init__(
        self, encoder: Encoder, channels: int = 256, strides: Sequence[float] = (4, 8, 16, 32), index: int = -1
    ) -> None:
        """Create a pyramid that shares `encoder` and trains it too, unless its gradients are disabled.

        channels: of every map. strides: in pixels, ascending. index: the block from whose normalised tokens the maps
        are computed. Raises ValueError for strides that are not positive and ascending, or a block that does not exist.
        """
        super().__init__()
        rising = all(a < b for a, b in pairwise(strides))
        if not strides or min(strides) <= 0 or not rising:
            raise ValueError(f"strides is {tuple(strides)}; accepted: positive numbers in rising order")
        (self.index,) = encoder.block_indices([index])
        self.encoder, self.out_channels, self.strides = encoder, channels, tuple(strides)
        patch, width = encoder.config.patch_size, encoder.config.width
        self.octaves = [round(math.log2(patch / stride)) for stride in strides]
        self.levels = nn.ModuleDict()
        for stride, octaves in zip(strides, self.octaves, strict=True):
            name = f"p{round(math.log2(stride))}"
            if name in self.levels:
                raise ValueError(f"strides is {tuple(strides)}; accepted: one for each power of two")
            self.levels[name] = _level(width, octaves, channels)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> OrderedDict[str, Tensor]:
        """Images [B, in, H, W] -> the maps, finest first.

        mask: [B, ceil(H / patch), ceil(W / patch)] bool, False where a position is padding of the batch.
        Raises ValueError for images with another number of dimensions or channels.
        """
        height, width = images.shape[-2:]
        patch = self.encoder.config.patch_size
        images = pad(images, (0, -width % patch, 0, -height % patch))
        (features,) = self.encoder.forward_intermediates(images, [self.index], norm=True, mask=mask)
        maps = OrderedDict()
        for (name, level), octaves, stride in zip(self.levels.items(), self.octaves, self.strides, strict=True):
            size = math.ceil(height / stride), math.ceil(width / stride)
            maps[name] = at_stride(level(features), patch / 2.0**octaves, stride, size)
        return maps


def at_stride(features: Tensor, own: float, stride: float, size: tuple[int, int]) -> Tensor:
    """Resample a map [B, C, h, w] of stride `own` bilinearly at another stride, to `size` cells: [B, C, *size].

    The upper left corner stays fixed. A resize to `size` would stretch the map if the last cells are incomplete.
    """
    if own != stride:
        beyond = math.ceil(stride / own)
        features = pad(features, (0, beyond, 0, beyond), mode="replicate")
        features = interpolate(features, scale_factor=own / stride, mode="bilinear", recompute_scale_factor=False)
    return features[:, :, : size[0], : size[1]]


def _level(width: int, octaves: int, channels: int) -> nn.Sequential:
    """The map, doubled `octaves` times (halved if negative) and projected to `channels`."""
    layers: list[nn.Module] = []
    for octave in range(octaves):
        narrow = max(width // 2, 1)
        layers.append(nn.ConvTranspose2d(width, narrow, 2, 2))
        if octave < octaves - 1:
            layers += [ChannelNorm(narrow, eps=1e-6), nn.GELU()]
        width = narrow
    if octaves < 0:  # ceil keeps a last odd row
        layers.append(nn.MaxPool2d(2**-octaves, ceil_mode=True))
    layers += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels, eps=1e-6)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels, eps=1e-6)]
    return nn.Sequential(*layers)
