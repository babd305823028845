"""Benchmark of whole encoders: images/s, memory, one image with CUDA graphs and torch.compile, FP8 MLPs.

Encoders come from `create_model`, with random weights, in bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..environment import describe
from ..layers import quantize_mlps
from ..models.encoder import Encoder
from ..models.registry import create_model
from ..report.drawing import draw_sizes
from .checks import at_least, known, not_empty, tiled_by
from .machine import ceilings, dtype_of, fitting, free
from .results import write
from .table import Mode, measured
from .timing import medians

Row = dict[str, Any]
Say = Callable[[str], object]
Table = Literal["throughput", "one image", "very high resolution"]
EVERY: tuple[Table, ...] = ("throughput", "one image", "very high resolution")


@dataclass(frozen=True)
class EncoderBenchConfig:
    """Settings.

    Args:
        models: model names from `cgspn.list_models()`. Ratios are relative to the first one. The suffix "+fp8"
            uses FP8 MLPs (`cgspn.layers.quantize_mlps`) for inference; "+window18" uses windows of 18 x 18 tokens.
        sizes: side lengths of the square images in pixels.
        batch: batch size, halved for each model until it fits in memory.
        modes: "inference" or "training" (forward and backward pass with activation checkpointing).
        tables: tables to measure; "one image" compares eager mode with a CUDA graph.
        compile: measure "one image" also with torch.compile(mode="max-autotune"), which takes minutes.
        largest: pairs of image size and batch size for "very high resolution".
        rounds: number of interleaved timings.
    """

    models: tuple[str, ...] = (
        "vit_so400m_patch14_378",
        "window_so400m_patch14_378",
        "window_so400m_patch14_378+window18",
        "cgspn_so400m_patch14_378",
        "hybrid_so400m_patch14_378",
    )
    sizes: tuple[int, ...] = (1036, 2058)
    batch: int = 32
    modes: tuple[Mode, ...] = ("inference", "training")
    tables: tuple[Table, ...] = EVERY
    compile: bool = False
    largest: tuple[tuple[int, int], ...] = ((4116, 1), (4116, 4))
    rounds: int = 3

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings or an unknown model."""
        not_empty(self, "models", "sizes", "modes", "tables")
        at_least(self, 1, "batch", "largest", "rounds")
        models = [with_options(name)[0] for name in self.models]
        known("models", models)
        tiled_by("sizes", self.sizes, models)
        tiled_by("largest", tuple(pixels for pixels, _ in self.largest), models)


def with_options(name: str) -> tuple[str, dict[str, Any], bool]:
    """Split a name with "+" options into the model's name, config fields, and whether its MLPs are in FP8.

    Raises ValueError for an unknown option.
    """
    base, *options = name.split("+")
    fields: dict[str, Any] = {}
    fp8 = False
    for option in options:
        side = option.removeprefix("window")
        if option == "fp8":
            fp8 = True
        elif side != option and side.isdecimal():
            fields["window"] = int(side)
        else:
            raise ValueError(f"{name!r} ends in {option!r}; accepted after '+': 'fp8', 'window18'")
    return base, fields, fp8


def encoder_step(encoder: Encoder, images: Tensor, mode: Mode) -> Callable[[], object]:
    """A function that runs a forward pass, or forward and backward of the pooled vector's sum."""

    def step() -> object:
        with torch.set_grad_enabled(mode == "training"):
            out = encoder(images)
            if mode == "inference":
                return out
            loss = out.pooled.float().sum() + out.tokens.float().mean()
            return torch.autograd.grad(loss, [p for p in encoder.parameters() if p.requires_grad], allow_unused=True)

    return step


def fitted(name: str, pixels: int, batch: int, mode: Mode, device: torch.device) -> Row:
    """The largest batch up to `batch` at which a step of a model fits, and the step's memory."""
    row: Row = {"px": pixels, "mode": mode, "model": name}
    if with_options(name)[2] and mode == "training":
        return row | {"note": "8 bits are for inference"}
    batch, peak = fitting(lambda tried: model_step(name, pixels, tried, mode, device), batch, device)
    return row | ({"B": batch, "peak GB": peak} if batch else {"note": "OOM at B = 1"})


def model_step(name: str, pixels: int, batch: int, mode: Mode, device: torch.device) -> Callable[[], object]:
    """`encoder_step` of a new model on random images, with activation checkpointing in training."""
    encoder = make(name, pixels, device)
    encoder.set_grad_checkpointing(mode == "training")
    shape, dtype = (batch, encoder.config.channels, pixels, pixels), next(encoder.parameters()).dtype
    return encoder_step(encoder, torch.randn(shape, device=device, dtype=dtype), mode)


def timed(rows: list[Row], device: torch.device, rounds: int) -> list[Row]:
    """Add times to rows of `fitted`: interleaved if all steps fit in memory together, otherwise one after the other.

    If they did not fit together, the allocator would free and allocate memory during the timing.
    """
    held = {row["model"]: row for row in rows if "B" in row}
    together = device.type != "cuda" or sum(r["peak GB"] for r in held.values()) < 0.8 * free_memory(device)
    times: dict[str, float] = {}
    for names in [list(held)] if together else [[name] for name in held]:
        steps = {n: model_step(n, held[n]["px"], held[n]["B"], held[n]["mode"], device) for n in names}
        times |= medians(steps, rounds=rounds, graph=False) if steps else {}
        del steps
        free(device)
    found = []
    for row in rows:
        ms = times.get(row["model"])
        speed = {} if ms is None else {"ms": ms, "images / s": 1e3 * row["B"] / ms}
        found.append(row | speed | ({} if ms is None or together else {"note": "timed alone"}))
    return found


def free_memory(device: torch.device) -> float:
    """Free memory of a GPU in gigabytes."""
    return torch.cuda.mem_get_info(device)[0] / 1e9


def make(name: str, pixels: int, device: torch.device) -> Encoder:
    """Create a model with random weights and native size `pixels`, so that the timing includes no resize of positions.

    Raises ValueError for an unknown name or option.
    """
    base, fields, fp8 = with_options(name)
    with torch.device(device):
        encoder = create_model(base, image_size=(pixels, pixels), **fields)
    encoder = encoder.to(dtype_of(device)).eval()
    return quantize_mlps(encoder) if fp8 else encoder


def throughput_rows(config: EncoderBenchConfig, device: torch.device, say: Say) -> list[Row]:
    """Measure every model, size and mode."""
    rows = []
    for pixels in config.sizes:
        for mode in config.modes:
            held = [fitted(name, pixels, config.batch, mode, device) for name in config.models]
            found = with_ratios(timed(held, device, config.rounds), "images / s")
            rows += found
            rates = (f"{r['model']} {r.get('images / s', float('nan')):.3g} images/s" for r in found)
            say(f"{pixels} px, {mode}: " + ", ".join(rates))
    return rows


def with_ratios(rows: list[Row], key: str) -> list[Row]:
    """Add the ratio of each row's rate to that of the first row."""
    first = rows[0].get(key)
    return [row | {"x the first": row[key] / first if first and key in row else None} for row in rows]


def single_rows(config: EncoderBenchConfig, device: torch.device) -> list[Row]:
    """Measure one image with all models interleaved: eager, with a CUDA graph, and optionally compiled."""
    rows = []
    for pixels in config.sizes:
        encoders = {name: make(name, pixels, device) for name in config.models}
        ways: dict[str, dict[str, Any]] = {"launched": encoders}
        if device.type == "cuda":
            ways["CUDA graph"] = encoders
        if config.compile:
            compiled = {name: torch.compile(model, mode="max-autotune") for name, model in encoders.items()}
            ways["torch.compile, max-autotune"] = compiled
        image = torch.randn(1, 3, pixels, pixels, device=device, dtype=dtype_of(device))
        for way, models in ways.items():
            calls = {name: encoder_step(model, image, "inference") for name, model in models.items()}
            times = measured(calls, max(config.rounds, 5), way == "CUDA graph")
            first = times[config.models[0]]
            rows += [
                {"px": pixels, "way": way, "model": name, "ms": ms, "the first / this": first / ms}
                for name, ms in times.items()
            ]
        del encoders, ways
        free(device)
    return rows


def largest_rows(config: EncoderBenchConfig, device: torch.device) -> list[Row]:
    """Measure very large images in one pass, with fixed batch sizes."""
    rows = []
    for pixels, batch in config.largest:
        found = timed([fitted(name, pixels, batch, "inference", device) for name in config.models], device, 1)
        rows += [row | {"wanted B": batch, "fits": row.get("B") == batch} for row in found]
    return rows


def run(
    config: EncoderBenchConfig, out: Path, device: torch.device, *, commit: str = "", say: Say = print
) -> dict[str, list[Row]]:
    """Run the benchmark and write encoder.json, .md and .png (of the throughput) to `out` after each table.

    Raises ValueError for an unknown model, OSError for `out`.
    """
    machine = describe(commit) | ceilings(device)
    parts: dict[Table, Callable[[], list[Row]]] = {
        "throughput": lambda: throughput_rows(config, device, say),
        "one image": lambda: single_rows(config, device),
        "very high resolution": lambda: largest_rows(config, device),
    }
    tables: dict[str, list[Row]] = {}
    for part in config.tables:
        tables[part] = parts[part]()
        free(device)
        write(out, "encoder", machine, tables)
    if "throughput" in tables:
        rows = tables["throughput"]
        shown = {mode: [row for row in rows if row["mode"] == mode] for mode in config.modes}
        draw_sizes(out / "encoder.png", [(mode, part, "images / s") for mode, part in shown.items()], name="model")
    return tables
