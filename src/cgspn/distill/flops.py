"""Floating-point operations of a training step, counted without computing, and what a device can do in a second."""

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

# FLOP/s in bfloat16 with float32 sums, dense, from the makers' data sheets; the first name found in the device's counts
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
    """FLOP/s that a device can do at best, or None for a CPU, float32 or a device that is not in `PEAKS`."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def forward_flops(encoder: EncoderConfig, size: tuple[int, int]) -> int:
    """FLOP of one image of `size` (height, width) pixels through an encoder, on the way forward alone."""

    def count(config: EncoderConfig) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # without gradients, torch 2.11 fails
            tapped_forward(Encoder(config), _image(config, size))
        return counter.get_total_flops()

    return _of_all_blocks(count, encoder)


def training_flops(
    student: EncoderConfig, size: tuple[int, int], *, sublayer_adapters: bool = False, block_adapters: bool = False
) -> int:
    """FLOP of one image of `size` (height, width) pixels through a student and its adapters, forward and backward.

    Counted on the meta device, a multiply-add as two: matrix products, attention and scans. What is recomputed to save
    memory does not count, nor do norms, activations and losses. sublayer_adapters, block_adapters: where adapters are.
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
    """FLOP of one image through the sub-layers of the blocks `learning`, forward and backward to their weights alone.

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
    """The count of an encoder from those of one and two blocks of each kind: all blocks of a kind cost the same."""
    one, more = 0, 0
    for mixer, blocks in Counter(config.mixers).items():
        one = count(replace(config, mixers=(mixer,)))
        block = count(replace(config, mixers=(mixer, mixer))) - one
        one -= block  # what is around the blocks, the same whatever their kind
        more += blocks * block
    return one + more


def _image(config: EncoderConfig, size: tuple[int, int]) -> Tensor:
    return torch.empty(1, config.channels, *size, device="meta")
