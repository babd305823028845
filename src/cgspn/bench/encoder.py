"""Whole encoders: images/s, memory, one image under CUDA graphs and torch.compile, FP8 MLPs.

Encoders are as `create_model` makes them, with random weights, in bfloat16 on a GPU.
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
        """Raise ValueError for what cannot be measured, or a model that does not exist."""
        not_empty(self, "models", "sizes", "modes", "tables")
        at_least(self, 1, "batch", "largest", "rounds")
        models = [with_options(name)[0] for name in self.models]
        known("models", models)
        tiled_by("sizes", self.sizes, models)
        tiled_by("largest", tuple(pixels for pixels, _ in self.largest), models)


def with_options(name: str) -> tuple[str, dict[str, Any], bool]:
    """A model's name without what follows a "+", fields of its config, and whether its MLPs are in FP8.

    Raises ValueError for another ending.
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
    """One forward pass, or one forward and backward of the sum of the pooled vector."""

    def step() -> object:
        with torch.set_grad_enabled(mode == "training"):
            out = encoder(images)
            if mode == "inference":
                return out
            loss = out.pooled.float().sum() + out.tokens.float().mean()
            return torch.autograd.grad(loss, [p for p in encoder.parameters() if p.requires_grad], allow_unused=True)

    return step


def fitted(name: str, pixels: int, batch: int, mode: Mode, device: torch.device) -> Row:
    """The largest batch up to `batch` at which a step of one model fits, and the memory that the step adds."""
    row: Row = {"px": pixels, "mode": mode, "model": name}
    if with_options(name)[2] and mode == "training":
        return row | {"note": "8 bits are for inference"}
    batch, peak = fitting(lambda tried: model_step(name, pixels, tried, mode, device), batch, device)
    return row | ({"B": batch, "peak GB": peak} if batch else {"note": "OOM at B = 1"})


def model_step(name: str, pixels: int, batch: int, mode: Mode, device: torch.device) -> Callable[[], object]:
    """`encoder_step` of a fresh model on random images; blocks checkpointed in training."""
    encoder = make(name, pixels, device)
    encoder.set_grad_checkpointing(mode == "training")
    shape, dtype = (batch, encoder.config.channels, pixels, pixels), next(encoder.parameters()).dtype
    return encoder_step(encoder, torch.randn(shape, device=device, dtype=dtype), mode)


def timed(rows: list[Row], device: torch.device, rounds: int) -> list[Row]:
    """Rows of `fitted` with their times: interleaved if the memory holds all steps at once, else one after the other.

    Steps that share too little memory would make the allocator give back and ask again within the timing.
    """
    fitting = {row["model"]: row for row in rows if "B" in row}
    together = device.type != "cuda" or sum(r["peak GB"] for r in fitting.values()) < 0.8 * free_memory(device)
    times: dict[str, float] = {}
    for names in [list(fitting)] if together else [[name] for name in fitting]:
        steps = {n: model_step(n, fitting[n]["px"], fitting[n]["B"], fitting[n]["mode"], device) for n in names}
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
    """Gigabytes of a GPU that nothing holds."""
    return torch.cuda.mem_get_info(device)[0] / 1e9


def make(name: str, pixels: int, device: torch.device) -> Encoder:
    """A model with random weights and native size `pixels`, so that no table of positions is resized in the timing.

    Raises ValueError for a name that does not exist, with or without its options.
    """
    base, fields, fp8 = with_options(name)
    with torch.device(device):
        encoder = create_model(base, image_size=(pixels, pixels), **fields)
    encoder = encoder.to(dtype_of(device)).eval()
    return quantize_mlps(encoder) if fp8 else encoder


def throughput_rows(config: EncoderBenchConfig, device: torch.device, say: Say) -> list[Row]:
    """Every model, size and mode."""
    rows = []
    for pixels in config.sizes:
        for mode in config.modes:
            fitting = [fitted(name, pixels, config.batch, mode, device) for name in config.models]
            found = with_ratios(timed(fitting, device, config.rounds), "images / s")
            rows += found
            rates = (f"{r['model']} {r.get('images / s', float('nan')):.3g} images/s" for r in found)
            say(f"{pixels} px, {mode}: " + ", ".join(rates))
    return rows


def with_ratios(rows: list[Row], key: str) -> list[Row]:
    """Add the ratio of each row's rate to that of the first row."""
    first = rows[0].get(key)
    return [row | {"x the first": row[key] / first if first and key in row else None} for row in rows]


def single_rows(config: EncoderBenchConfig, device: torch.device) -> list[Row]:
    """One image at a time, all models interleaved: launched, from a CUDA graph, and compiled if asked for."""
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
    """Very large images in one pass, at batches that must fit whole."""
    rows = []
    for pixels, batch in config.largest:
        found = timed([fitted(name, pixels, batch, "inference", device) for name in config.models], device, 1)
        rows += [row | {"wanted B": batch, "fits": row.get("B") == batch} for row in found]
    return rows


def run(
    config: EncoderBenchConfig, out: Path, device: torch.device, *, commit: str = "", say: Say = print
) -> dict[str, list[Row]]:
    """Measure and write encoder.json, .md and, of the throughput, .png to `out`; finished tables as they come.

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
