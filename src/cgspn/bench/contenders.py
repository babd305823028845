"""The blocks of the efficiency tables, with equal width and different mixers and attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layers import (
    GSPN,
    AttentionConfig,
    AttentionMixer,
    Block,
    Grid,
    Mixer,
    PropagationConfig,
    PropagationMixer,
    WindowAttentionMixer,
    value_config,
)
from .checks import at_least

ATTENTION = {
    "attention, math": SDPBackend.MATH,
    "attention, flash": SDPBackend.FLASH_ATTENTION,
    "attention, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "attention, efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS = "C-GSPN"
PAPER = "C-GSPN, the paper's sub-layer"
PLAIN = "C-GSPN, plain pieces"
VALUES = {"C-GSPN, values 3": 3.0, "C-GSPN, values 6": 6.0}
# window attention with this side length, with PyTorch's choice of kernel or a given one
WINDOWS = {"windows 8x8": 8, "windows 18x18": 18}
KERNELS = {f"{name}, {kind}": ATTENTION[f"attention, {kind}"] for name in WINDOWS for kind in ("flash", "cuDNN")}
FUSED_MLP = ", fused MLP"


@dataclass(frozen=True)
class Shape:
    """Dimensions of the blocks. The defaults are those of SO400M/14.

    Args:
        width: C, the number of channels per token.
        heads: number of attention heads.
        hidden: hidden width of the MLP.
        patch: patch size in pixels.
        compression: s in the paper; C-GSPN scans floor(C / s) channels.
    """

    width: int = 1152
    heads: int = 16
    hidden: int = 4304
    patch: int = 14
    compression: float = 18

    def __post_init__(self) -> None:
        """Raise ValueError for invalid sizes."""
        at_least(self, 1, "width", "heads", "hidden", "patch")
        PropagationConfig(compression=self.compression).latent_width(self.width)


@dataclass(frozen=True, eq=False)
class Contender:
    """A block, and a context that selects its attention kernels."""

    name: str
    block: Block
    context: Callable[[], AbstractContextManager[object]]

    def sublayer(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The sub-layer: [B, N, C] -> [B, N, C], with tokens in the mixer's order."""
        grid = grid._replace(window=self.block.mixer.window)
        with self.context():
            return self.block.mixing_half(tokens, grid)

    def whole(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The block: [B, N, C] -> [B, N, C], with tokens in the mixer's order."""
        grid = grid._replace(window=self.block.mixer.window)
        with self.context():
            out: Tensor = self.block(tokens, grid)
            return out


def paper_config(shape: Shape) -> PropagationConfig:
    """The published sub-layer: no norms, no convolution, summed directions."""
    return PropagationConfig(
        compression=shape.compression, merge="sum", latent_norm=False, merge_norm=False, local_kernel=0
    )


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Contender:
    """Create a contender with random weights. Raises ValueError for an unknown name."""
    kind = name.removesuffix(FUSED_MLP)
    ours = PropagationConfig(compression=shape.compression)
    # PLAIN has PyTorch's layers around the scan
    configs = {"GSPN": GSPN, OURS: ours, PLAIN: ours, PAPER: paper_config(shape)}
    configs |= {n: replace(value_config(v), compression=shape.compression) for n, v in VALUES.items()}
    attention, side = AttentionConfig(shape.heads), WINDOWS.get(kind.split(", ")[0])
    if kind in configs:
        mixer: Mixer = PropagationMixer(shape.width, configs[kind])
    elif kind in ATTENTION:
        mixer = AttentionMixer(shape.width, attention)
    elif side is not None and (kind in WINDOWS or kind in KERNELS):
        mixer = WindowAttentionMixer(shape.width, attention, (side, side))
    else:
        accepted = (*ATTENTION, *WINDOWS, *KERNELS, *configs)
        raise ValueError(f"{name!r} is not a contender; accepted: {', '.join(map(repr, accepted))}")
    block = Block(shape.width, mixer, shape.hidden, "gelu_tanh", 1e-6, None).to(device, dtype)
    if name == PLAIN or (name.startswith("attention") and not name.endswith(FUSED_MLP)):
        block.fusion_backend = "torch"
    kernels = (ATTENTION | KERNELS).get(kind)
    return Contender(name, block.eval(), (lambda: sdpa_kernel(kernels)) if kernels else nullcontext)


def names(device: torch.device) -> list[str]:
    """Names of the contenders that can run on a device, attention first."""
    cuda = device.type == "cuda"
    attention = list(ATTENTION) if cuda else ["attention, math", "attention, flash"]
    # attention gets the same fused MLP, so that the comparison is fair
    fused = [f"attention, {kernel}{FUSED_MLP}" for kernel in ("flash", "cuDNN")[: 1 + cuda]]
    windows, plain = (KERNELS, (PLAIN,)) if cuda else ((), ())  # C-GSPN is plain elsewhere
    return [*attention, *fused, *WINDOWS, *windows, "GSPN", PAPER, *plain, *VALUES, OURS]
