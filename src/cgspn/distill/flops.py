"""FLOPs of a training step, counted on the meta device, and peak rates of GPUs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..layers import Grid
from ..models.config import EncoderConfig
from ..models.encoder import Encoder
from .adapters import Adapters
from .taps import tapped_forward

# Dense bfloat16 FLOP/s with float32 sums, from data sheets. The first name contained in the device's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_of(device: torch.device, precision: str) -> float | None:
    """The peak FLOP/s of a device; None for a CPU, float32 or a device that is not in `PEAKS`."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def forward_flops(encoder: EncoderConfig, size: tuple[int, int]) -> int:
    """FLOPs of an encoder's forward pass for one image of `size` (height, width) pixels."""

    def count(config: EncoderConfig) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # torch 2.11 fails without gradients
            tapped_forward(Encoder(config), _image(config, size))
        return counter.get_total_flops()

    return _of_all_blocks(count, encoder)


def training_flops(
    student: EncoderConfig, size: tuple[int, int], *, sublayer_adapters: bool = False, block_adapters: bool = False
) -> int:
    """FLOPs of a student and its adapters, forward and backward, for one image of `size` (height, width) pixels.

    Counts matrix products, attention and scans, with two per multiply-add. Recomputation, norms, activations and losses
    are not counted. sublayer_adapters, block_adapters: whether PP and PB taps have adapters.
    """

    def count(config: EncoderConfig) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            taps = tapped_forward(Encoder(config), _image(config, size))
            adapters = Adapters(config.depth, config.width, sublayers=sublayer_adapters, blocks=block_adapters)
            ends = [taps.pooled.sum()]
            for bridges, features in ((adapters.sublayers, taps.sublayers), (adapters.blocks, taps.blocks)):
                ends += [bridge(f).sum() for bridge, f in zip(bridges, features)]
            torch.stack(ends).sum().backward()
        return counter.get_total_flops()

    return _of_all_blocks(count, student)


def sublayer_flops(student: EncoderConfig, size: tuple[int, int], learning: list[int]) -> int:
    """FLOPs of the sub-layers of the blocks `learning` for one image, forward and backward to their weights only.

    Counted as in `training_flops`.
    """
    grid = Grid(size[0] // student.patch_size, size[1] // student.patch_size, student.prefix)
    each: dict[str, int] = {}
    for mixer in {student.mixers[i] for i in learning}:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            block = Encoder(replace(student, mixers=(mixer,))).each_block()[0]
            block.sublayer(torch.empty(1, grid.prefix + grid.tokens, student.width), grid).sum().backward()
        each[mixer] = counter.get_total_flops()
    return sum(each[student.mixers[i]] for i in learning)


def _of_all_blocks(count: Callable[[EncoderConfig], int], config: EncoderConfig) -> int:
    """The FLOPs of an encoder, extrapolated from one and two blocks of each kind."""
    one, more = 0, 0
    for mixer, blocks in Counter(config.mixers).items():
        one = count(replace(config, mixers=(mixer,)))
        block = count(replace(config, mixers=(mixer, mixer))) - one
        one -= block  # the FLOPs outside of the blocks
        more += blocks * block
    return one + more


def _image(config: EncoderConfig, size: tuple[int, int]) -> Tensor:
    return torch.empty(1, config.channels, *size, device="meta")
