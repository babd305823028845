"""Sub-layers of flash-linear-attention and C-GSPN's, with equal width and tokens. Needs that package and a CUDA GPU.

    python -m benchmarks.linear_peers --out results/efficiency/peers

Writes peers.json and peers.md. The layers are causal over tokens in raster order. Only their cost is compared.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from cgspn.bench.contenders import OURS, Shape, build
from cgspn.bench.machine import ceilings, free
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.layers import Grid, Mixer
from cgspn.layers.block import Block

Row = dict[str, Any]
# Layers of flash-linear-attention, of the same width and tokens, each a stand-in for a mixer: module, class, and what
# is not theirs by default: heads that divide 1152. Simple GLA has Mamba2's recurrence.
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mamba2": ("mamba2", "Mamba2", {"head_dim": 64}),
    "simple GLA": ("simple_gla", "SimpleGatedLinearAttention", {}),
    "GLA": ("gla", "GatedLinearAttention", {}),
    "gated DeltaNet": ("gated_deltanet", "GatedDeltaNet", {"head_dim": 144, "num_heads": 6}),
}


class PeerMixer(Mixer):
    """A causal linear-attention layer over the tokens in raster order, as a mixer."""

    def __init__(self, layer: nn.Module) -> None:
        """layer: maps [B, N, C] to [B, N, C], or to a tuple whose first item that is."""
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]."""
        out = self.layer(tokens)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


def peer_rows(sizes: tuple[int, ...], batch: int, rounds: int, shape: Shape, device: torch.device) -> list[Row]:
    """Time sub-layers of flash-linear-attention, each interleaved with C-GSPN's. A row says if one is not installed."""
    if device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return [{"peer": "flash-linear-attention", "note": "not installed here" if device.type == "cuda" else "no GPU"}]
    rows: list[Row] = []
    for pixels in sizes:
        side = pixels // shape.patch
        grid = Grid(side, side)
        tokens = torch.randn(batch, grid.tokens, shape.width, device=device, dtype=torch.bfloat16)
        ours = build(OURS, shape, device, tokens.dtype).block
        for name in PEERS:
            row: Row = {"peer": name, "px": pixels, "B": batch}
            if name == "Mamba2" and importlib.util.find_spec("mamba_ssm") is None:
                rows.append(row | {"note": "needs mamba-ssm: without it, steps of PyTorch, minutes each"})
                continue
            try:
                blocks = {name: peer_block(name, shape).to(device, tokens.dtype), OURS: ours}
                calls: dict[str, Callable[[], object]] = {
                    n: partial(sublayer, block, tokens, grid) for n, block in blocks.items()
                }
                ms = medians(calls, rounds=rounds, graph=False)
                rows.append(row | {"sub-layer ms": ms[name], "C-GSPN ms": ms[OURS], "x C-GSPN": ms[name] / ms[OURS]})
            except Exception as error:  # of any kind: their versions and compilers differ; said, not left out
                rows.append(row | {"note": str(error).strip().splitlines()[0][:80]})
            free(device)
    return rows


def peer_block(name: str, shape: Shape) -> Block:
    """A block around one of `PEERS`."""
    module, kind, arguments = PEERS[name]
    layer = getattr(importlib.import_module(f"fla.layers.{module}"), kind)
    mixer = PeerMixer(layer(hidden_size=shape.width, layer_idx=0, **arguments))
    return Block(shape.width, mixer, shape.hidden, "gelu_tanh", 1e-6, None)


@torch.no_grad()
def sublayer(block: Block, tokens: Tensor, grid: Grid) -> Tensor:
    """The sub-layer of a block (norm, mixer, residual addition): [B, N, C] -> the same."""
    return block.mixing_half(tokens, grid)


def main(
    out: Path = Path("runs/bench"),
    sizes: tuple[int, ...] = (1036, 2058),
    batch: int = 32,
    rounds: int = 3,
    commit: str = "",
) -> None:
    """Measure and write.

    Args:
        out: folder for the results.
        sizes: side lengths of the square images in pixels.
        batch: number of images per call.
        rounds: number of interleaved timings of each.
        commit: commit to record in the results; by default that of the working tree.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = describe(commit, "python -m benchmarks.linear_peers") | ceilings(device)
    write(out, "peers", about, {"linear peers": peer_rows(sizes, batch, rounds, Shape(), device)})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
