"""Whole encoders: images a second, memory, one image under CUDA graphs and torch.compile, and linear peers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Grid, Mixer
from ..layers.block import Block
from ..models.encoder import Encoder
from ..models.registry import create_model
from .contenders import Shape
from .machine import ceilings, describe, free
from .results import write
from .table import Mode, measured, peak_memory
from .timing import medians

Row = dict[str, Any]
# layers of flash-linear-attention, of the same width and tokens, each a stand-in for a mixer
PEERS = {"Mamba2": "Mamba2", "GLA": "GatedLinearAttention", "gated DeltaNet": "GatedDeltaNet"}


@dataclass(frozen=True)
class EncoderBenchConfig:
    """Settings.

    Args:
        models: names of `cgspn.list_models()`; ratios are to the first.
        sizes: of the square images, in pixels.
        batch: images at once; halved for a model until it fits.
        modes: "inference", "training" (forward and backward, blocks checkpointed).
        single: also one image at a time: launched, and replayed from a CUDA graph.
        compile: also with torch.compile(mode="max-autotune"); takes minutes.
        largest: pixels and batches of the pass at very high resolution.
        rounds: interleaved timings of each.
    """

    models: tuple[str, ...] = ("vit_so400m_patch14_378", "cgspn_so400m_patch14_378", "hybrid_so400m_patch14_378")
    sizes: tuple[int, ...] = (1036, 2058)
    batch: int = 32
    modes: tuple[Mode, ...] = ("inference", "training")
    single: bool = True
    compile: bool = False
    largest: tuple[tuple[int, int], ...] = ((4116, 1), (4116, 4))
    rounds: int = 3


def encoder_step(encoder: Encoder, images: Tensor, mode: Mode) -> Callable[[], object]:
    """One forward pass, or one forward and backward of the sum of the pooled vector."""

    def inference() -> object:
        with torch.no_grad():
            return encoder(images)

    def training() -> object:
        out = encoder(images)
        loss = out.pooled.float().sum() + out.tokens.float().mean()
        return torch.autograd.grad(loss, [p for p in encoder.parameters() if p.requires_grad], allow_unused=True)

    return inference if mode == "inference" else training


def model_row(name: str, pixels: int, batch: int, mode: Mode, device: torch.device, rounds: int) -> Row:
    """Images a second of one model at the largest batch up to `batch` that fits, and the memory of that step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row: Row = {"px": pixels, "mode": mode, "model": name}
    while batch:
        encoder = images = step = None
        try:
            encoder = make(name, pixels, device, dtype)
            encoder.set_grad_checkpointing(mode == "training")
            images = torch.randn(batch, encoder.config.channels, pixels, pixels, device=device, dtype=dtype)
            step = encoder_step(encoder, images, mode)
            memory = peak_memory(step, device)
            ms = medians({name: step}, rounds=rounds, graph=False)[name]
            return row | {"B": batch, "ms": ms, "images / s": 1e3 * batch / ms, "peak GB": memory}
        except torch.OutOfMemoryError:
            batch //= 2
        finally:
            encoder = images = step = None  # the step holds both
            free(device)
    return row | {"note": "OOM at B = 1"}


def make(name: str, pixels: int, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A model with random weights and native size `pixels`, so that no table of positions is resized in the timing."""
    with torch.device(device):
        return create_model(name, image_size=(pixels, pixels)).to(dtype).eval()


def throughput_rows(config: EncoderBenchConfig, device: torch.device, say: Callable[[str], object]) -> list[Row]:
    """Every model, size and mode."""
    rows = []
    for pixels in config.sizes:
        for mode in config.modes:
            found = [model_row(name, pixels, config.batch, mode, device, config.rounds) for name in config.models]
            rows += with_ratios(found, "images / s")
            say(
                f"{pixels} px, {mode}: "
                + ", ".join(f"{r['model']} {r.get('images / s', float('nan')):.3g} images/s" for r in found)
            )
    return rows


def with_ratios(rows: list[Row], key: str) -> list[Row]:
    """Each row's rate over that of the first."""
    first = rows[0].get(key)
    return [row | {"x the first": row[key] / first if first and key in row else None} for row in rows]


def single_rows(config: EncoderBenchConfig, device: torch.device) -> list[Row]:
    """One image at a time, all models interleaved: launched, from a CUDA graph, and compiled if asked for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for pixels in config.sizes:
        encoders = {name: make(name, pixels, device, dtype) for name in config.models}
        ways: dict[str, bool] = {"launched": False} | ({"CUDA graph": True} if device.type == "cuda" else {})
        for way, graph in ways.items():
            rows += single_way(encoders, pixels, way, graph, config.rounds, device)
        if config.compile:
            compiled = {name: torch.compile(model, mode="max-autotune") for name, model in encoders.items()}
            rows += single_way(compiled, pixels, "torch.compile, max-autotune", False, config.rounds, device)
        del encoders
        free(device)
    return rows


def single_way(
    encoders: dict[str, Any], pixels: int, way: str, graph: bool, rounds: int, device: torch.device
) -> list[Row]:
    """One way of running every encoder on one image."""
    calls: dict[str, Callable[[], object]] = {}
    for name, encoder in encoders.items():
        parameter = next(encoder.parameters())
        images = torch.randn(1, 3, pixels, pixels, device=device, dtype=parameter.dtype)
        calls[name] = encoder_step(encoder, images, "inference")
    times = measured(calls, max(rounds, 5), graph)
    first = next(iter(times.values()))
    return [{"px": pixels, "way": way, "model": n, "ms": ms, "the first / this": first / ms} for n, ms in times.items()]


def largest_rows(config: EncoderBenchConfig, device: torch.device) -> list[Row]:
    """Very large images in one pass, at batches that must fit whole."""
    rows = []
    for pixels, batch in config.largest:
        for name in config.models:
            row = model_row(name, pixels, batch, "inference", device, 1)
            rows.append(row | {"wanted B": batch, "fits": row.get("B") == batch})
    return rows


class PeerMixer(Mixer):
    """A causal linear-attention layer over the tokens in raster order: what a linear peer costs at the same width."""

    def __init__(self, layer: nn.Module) -> None:
        """layer: from [B, N, C] to [B, N, C], or to a tuple that begins with that."""
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]."""
        out = self.layer(tokens)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


def peer_rows(config: EncoderBenchConfig, shape: Shape, device: torch.device) -> list[Row]:
    """Blocks around layers of flash-linear-attention where it is installed; else a row that says that it is not."""
    if device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return [{"peer": "flash-linear-attention", "note": "not installed here" if device.type == "cuda" else "no GPU"}]
    layers = importlib.import_module("fla.layers")
    rows: list[Row] = []
    for pixels in config.sizes:
        side = pixels // shape.patch
        grid = Grid(side, side)
        tokens = torch.randn(config.batch, grid.tokens, shape.width, device=device, dtype=torch.bfloat16)
        for name, kind in PEERS.items():
            row: Row = {"peer": name, "px": pixels, "B": config.batch}
            try:
                mixer = PeerMixer(getattr(layers, kind)(hidden_size=shape.width, num_heads=shape.heads))
                block = Block(shape.width, mixer, shape.hidden, "gelu_tanh", 1e-6, None).to(device, torch.bfloat16)

                def run(block: Block = block, tokens: Tensor = tokens, grid: Grid = grid) -> object:
                    with torch.no_grad():
                        return block.mixer.residual(tokens, block.norm1, block.scale1, grid)

                rows.append(row | {"sub-layer ms": medians({name: run}, rounds=config.rounds, graph=False)[name]})
            except (RuntimeError, ValueError, TypeError) as error:  # their versions differ: said, not left out
                rows.append(row | {"note": str(error).strip().splitlines()[0][:80]})
            free(device)
    return rows


def run(
    config: EncoderBenchConfig,
    out: Path,
    device: torch.device,
    *,
    commit: str = "",
    say: Callable[[str], object] = print,
) -> dict[str, list[Row]]:
    """Measure and write encoder.json and .md to `out`. Raises ValueError for an unknown model, OSError for `out`."""
    machine = describe(commit) | ceilings(device)
    tables = {"throughput": throughput_rows(config, device, say)}
    if config.single:
        tables["one image"] = single_rows(config, device)
    if config.largest:
        tables["one pass at very high resolution"] = largest_rows(config, device)
    tables["linear peers"] = peer_rows(config, Shape(), device)
    write(out, "encoder", machine, tables)
    return tables
