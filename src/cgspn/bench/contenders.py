"""What the efficiency tables compare: blocks of one width that differ in their mixer, and how attention is computed."""

from __future__ import annotations

import importlib.util
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
FLASH_PACKAGE = "attention, flash-attn package"
OURS = "C-GSPN"
PAPER = "C-GSPN, the paper's sub-layer"
PLAIN = "C-GSPN, plain pieces"
VALUES = {"C-GSPN, values 3": 3.0, "C-GSPN, values 6": 6.0}
# attention in windows of so many positions a side, through what PyTorch picks or through chosen kernels
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
        """Raise ValueError for what no block has."""
        at_least(self, 1, "width", "heads", "hidden", "patch")
        PropagationConfig(compression=self.compression).latent_width(self.width)


class FlashPackageMixer(AttentionMixer):
    """Attention through the flash-attn package, where that is installed."""

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]."""
        from flash_attn import flash_attn_qkvpacked_func  # type: ignore[import-not-found,import-untyped]

        batch, count, _ = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, -1)
        out: Tensor = self.out(flash_attn_qkvpacked_func(qkv).flatten(2))
        return out


@dataclass(frozen=True, eq=False)
class Contender:
    """A block, and the context in which it runs (which kernels attention may use)."""

    name: str
    block: Block
    context: Callable[[], AbstractContextManager[object]]

    def sublayer(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Norm, mixer, residual: [B, N, C] -> [B, N, C], in the order that the mixer wants."""
        grid = grid._replace(window=self.block.mixer.window)
        with self.context():
            return self.block.mixing_half(tokens, grid)

    def whole(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The block: [B, N, C] -> [B, N, C], in the order that the mixer wants."""
        grid = grid._replace(window=self.block.mixer.window)
        with self.context():
            out: Tensor = self.block(tokens, grid)
            return out


def propagation(shape: Shape, config: PropagationConfig | None = None) -> PropagationMixer:
    """A C-GSPN mixer of the shape's compression, or of any other settings."""
    return PropagationMixer(shape.width, config or PropagationConfig(compression=shape.compression))


def windows(name: str, shape: Shape) -> WindowAttentionMixer:
    """Attention in the windows of a name of `WINDOWS` or `KERNELS`."""
    side = WINDOWS[name.split(",")[0]]
    return WindowAttentionMixer(shape.width, AttentionConfig(shape.heads), (side, side))


def paper_config(shape: Shape) -> PropagationConfig:
    """The sub-layer as published: no norms, no convolution, directions summed."""
    return PropagationConfig(
        compression=shape.compression, merge="sum", latent_norm=False, merge_norm=False, local_kernel=0
    )


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Contender:
    """A contender with random weights. Raises ValueError for a name that does not exist."""
    kind = name.removesuffix(FUSED_MLP)
    mixers: dict[str, Callable[[], Mixer]] = {
        **{n: lambda: AttentionMixer(shape.width, AttentionConfig(shape.heads)) for n in ATTENTION},
        FLASH_PACKAGE: lambda: FlashPackageMixer(shape.width, AttentionConfig(shape.heads)),
        **{n: lambda n=n: windows(n, shape) for n in (*WINDOWS, *KERNELS)},  # type: ignore[misc]
        "GSPN": lambda: propagation(shape, GSPN),
        OURS: lambda: propagation(shape),
        PAPER: lambda: propagation(shape, paper_config(shape)),
        PLAIN: lambda: propagation(shape),  # with PyTorch's own layers around the scan
        **{
            n: lambda v=v: propagation(shape, replace(value_config(v), compression=shape.compression))  # type: ignore[misc]
            for n, v in VALUES.items()
        },
    }
    if kind not in mixers:
        raise ValueError(f"{name!r} is no contender; accepted: {', '.join(map(repr, mixers))}")
    block = Block(shape.width, mixers[kind](), shape.hidden, "gelu_tanh", 1e-6, None).to(device, dtype)
    if name == PLAIN or (name.startswith("attention") and not name.endswith(FUSED_MLP)):
        block.fusion_backend = "torch"
    kernels = (ATTENTION | KERNELS).get(kind)
    return Contender(name, block.eval(), (lambda: sdpa_kernel(kernels)) if kernels else nullcontext)


def names(device: torch.device) -> list[str]:
    """The contenders that can run on a device, attention first."""
    found = list(ATTENTION) if device.type == "cuda" else ["attention, math", "attention, flash"]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        found.append(FLASH_PACKAGE)
    # the same MLP serves attention: what makes ours faster must not be what attention was denied
    same = ["attention, flash" + FUSED_MLP] + (["attention, cuDNN" + FUSED_MLP] if device.type == "cuda" else [])
    plain = [PLAIN] if device.type == "cuda" else []  # elsewhere ours is that
    windowed = [*WINDOWS, *KERNELS] if device.type == "cuda" else [*WINDOWS]
    return [*found, *same, *windowed, "GSPN", PAPER, *plain, *VALUES, OURS]
