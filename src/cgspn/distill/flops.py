"""FLOPs of a training step, counted on the meta device, and peak rates of GPUs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..layers import Grid
from ..models.config import EncoderConfig
from ..models.encoder import Encoder
from .adapters import Adapters
from .taps import tapped_forward

Size = tuple[int, int]  # (height, width) in pixels

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


def forward_flops(encoder: EncoderConfig, size: Size) -> int:
    """FLOPs of an encoder's forward pass for one image of `size` (height, width) pixels."""
    # torch 2.11 fails without gradients
    return _of_all_blocks(encoder, lambda encoder: tapped_forward(encoder, _image(encoder.config, size)))


def training_flops(
    student: EncoderConfig, size: Size, *, sublayer_adapters: bool = False, block_adapters: bool = False
) -> int:
    """FLOPs of a student and its adapters, forward and backward, for one image of `size` (height, width) pixels.

    Counts matrix products, attention and scans, with two per multiply-add. Recomputation, norms, activations and losses
    are not counted. sublayer_adapters, block_adapters: whether PP and PB taps have adapters.
    """

    def step(encoder: Encoder) -> None:
        config, taps = encoder.config, tapped_forward(encoder, _image(encoder.config, size))
        adapters = Adapters(config.depth, config.width, sublayers=sublayer_adapters, blocks=block_adapters)
        bridged = [*zip(adapters.sublayers, taps.sublayers), *zip(adapters.blocks, taps.blocks)]
        torch.stack([taps.pooled.sum(), *(bridge(features).sum() for bridge, features in bridged)]).sum().backward()

    return _of_all_blocks(student, step)


def sublayer_flops(student: EncoderConfig, size: Size, learning: list[int]) -> int:
    """FLOPs of the sub-layers of the blocks `learning` for one image, forward and backward to their weights only.

    Counted as in `training_flops`.
    """
    grid = Grid(size[0] // student.patch_size, size[1] // student.patch_size, student.prefix)

    def step(encoder: Encoder) -> None:
        tokens = torch.empty(1, grid.prefix + grid.tokens, student.width)
        encoder.each_block()[0].sublayer(tokens, grid).sum().backward()

    kinds = Counter(student.mixers[i] for i in learning)
    return sum(blocks * _counted(student, (mixer,), step) for mixer, blocks in kinds.items())


def _counted(config: EncoderConfig, mixers: Any, run: Callable[[Encoder], object]) -> int:
    """The FLOPs of `run` on an encoder with other mixers, on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(Encoder(replace(config, mixers=mixers)))
    return counter.get_total_flops()


def _of_all_blocks(config: EncoderConfig, run: Callable[[Encoder], object]) -> int:
    """The FLOPs of `run` on an encoder, extrapolated from one and two blocks of each kind."""
    outside, within = 0, 0
    for mixer, blocks in Counter(config.mixers).items():
        one = _counted(config, (mixer,), run)
        block = _counted(config, (mixer, mixer), run) - one
        outside, within = one - block, within + blocks * block
    return outside + within


def _image(config: EncoderConfig, size: Size) -> Tensor:
    return torch.empty(1, config.channels, *size, device="meta")
