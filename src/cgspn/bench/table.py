"""Benchmark of the paper's efficiency table: latency of sub-layer and block, throughput and memory.

All contenders have the same width, MLP and images. Timings of one size are interleaved. They use CUDA graphs if kernels
may be shorter than their launches (inference up to 2^18 tokens), so that they give the GPU's time. "launched" is the
time of a block in eager mode. A contender that runs out of memory gets a row that says so. Published figures (one A100)
are listed too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..environment import describe
from ..layers import Grid
from ..report.drawing import draw_sizes
from ..settings import Listed
from .checks import at_least, not_empty, tiled
from .contenders import OURS, Contender, Shape, build, names
from .machine import ceilings, dtype_of, fitting, free, peak_memory
from .results import write
from .timing import launched, medians

Row = dict[str, Any]
Mode = Literal["inference", "training"]
SIZES = (378, 518, 756, 1036, 1512, 2058, 4116)
CAPTURED = 1 << 18  # up to this many tokens kernels may be shorter than their launches
# milliseconds of sub-layer and block on one A100, B = 32, C = 1152 (the paper's efficiency table)
PUBLISHED = {
    ("attention, math", 1036): (205.90, 238.18),
    ("attention, flash", 1036): (32.81, 68.93),
    ("GSPN", 1036): (9.95, 133.12),
    (OURS, 1036): (0.18, 36.60),
    ("attention, flash", 2058): (504.73, 631.63),
    (OURS, 2058): (0.46, 147.52),
}


@dataclass(frozen=True)
class TableConfig:
    """Settings of the efficiency table.

    Args:
        sizes: side lengths of the square images in pixels.
        batches: batch sizes. A batch size is halved for all contenders until C-GSPN fits in memory.
        modes: "inference" or "training" (forward and backward pass of the block).
        contenders: names of the implementations to compare; empty for all that run on the device.
        shape: dimensions of the blocks.
        rounds: number of interleaved timings.
    """

    sizes: tuple[int, ...] = SIZES
    batches: tuple[int, ...] = (32, 1)
    modes: tuple[Mode, ...] = ("inference", "training")
    contenders: Listed[str] = ()
    shape: Shape = field(default_factory=Shape)
    rounds: int = 7

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        not_empty(self, "sizes", "batches", "modes")
        at_least(self, 1, "batches", "rounds")
        tiled("sizes", self.sizes, self.shape.patch)


def steps(contender: Contender, tokens: Tensor, grid: Grid, mode: Mode) -> dict[str, Callable[[], object]]:
    """The timed functions of one contender: "sub-layer" and "block"."""
    trained = mode == "training"
    leaf = tokens.detach().requires_grad_(trained)
    direction = torch.randn_like(tokens) if trained else None

    def step(run: Callable[[Tensor, Grid], Tensor], module: torch.nn.Module) -> object:
        with torch.set_grad_enabled(trained):
            out = run(leaf, grid)
            wanted = [leaf, *module.parameters()]
            return torch.autograd.grad(out, wanted, direction, allow_unused=True) if trained else out

    whole, mixer = contender.block, contender.block.mixer
    return {"sub-layer": lambda: step(contender.sublayer, mixer), "block": lambda: step(contender.whole, whole)}


def our_step(config: TableConfig, pixels: int, mode: Mode, device: torch.device, batch: int) -> Callable[[], object]:
    """A call of C-GSPN's block, whose memory determines the batch size."""
    side = pixels // config.shape.patch
    tokens = torch.randn(batch, side * side, config.shape.width, device=device, dtype=dtype_of(device))
    return steps(build(OURS, config.shape, device, tokens.dtype), tokens, Grid(side, side), mode)["block"]


def size_rows(config: TableConfig, pixels: int, batch: int, mode: Mode, device: torch.device) -> list[Row]:
    """Measure all contenders at one size, batch and mode, interleaved."""
    side = pixels // config.shape.patch
    grid = Grid(side, side)
    tokens = torch.randn(batch, grid.tokens, config.shape.width, device=device, dtype=dtype_of(device))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for name in config.contenders or names(device):
        row: Row = {"px": pixels, "B": batch, "mode": mode, "mixer": name}
        rows[name] = row
        calls |= {(name, part): call for part, call in tried(row, config, tokens, grid).items()}
        free(device)  # free what did not fit
    for part in ("sub-layer", "block"):
        wanted = {name: call for (name, of), call in calls.items() if of == part}
        # use graphs for all contenders if kernels may be shorter than their launches
        graph = mode == "inference" and batch * grid.tokens <= CAPTURED
        for name, ms in measured(wanted, config.rounds, graph).items():
            rows[name][f"{part} ms"] = ms
        if part == "block" and mode == "inference":
            for name, (ms, _) in launched(wanted, rounds=config.rounds).items():
                rows[name]["block launched ms"] = ms
    return compared(list(rows.values()))


def tried(row: Row, config: TableConfig, tokens: Tensor, grid: Grid) -> dict[str, Callable[[], object]]:
    """Run a row's contender once, and record in the row its memory or the reason why it cannot run."""
    try:
        contender = build(row["mixer"], config.shape, tokens.device, tokens.dtype)
        mine = steps(contender, tokens, grid, row["mode"])
        row["peak GB"] = peak_memory(mine["block"], tokens.device)
        mine["sub-layer"]()
    except torch.OutOfMemoryError:
        row["note"] = "OOM"
    except RuntimeError as error:  # recorded if attention kernels do not support this shape
        row["note"] = str(error).strip().splitlines()[0][:80]
    else:
        return mine
    return {}


def measured(calls: dict[str, Callable[[], object]], rounds: int, graph: bool) -> dict[str, float]:
    """Median times, from CUDA graphs if all fit in memory together, otherwise in eager mode."""
    if graph:
        try:
            return medians(calls, rounds=rounds)
        except (torch.OutOfMemoryError, RuntimeError):
            pass
    return medians(calls, rounds=rounds, graph=False)


def compared(rows: list[Row]) -> list[Row]:
    """Add ratios to the fastest attention of the same size, throughput, and the published figures, in a fixed order."""
    attention = [r for r in rows if r["mixer"].startswith("attention") and "block ms" in r]
    best: Row = min(attention, key=lambda row: row["block ms"], default={})
    quickest = min((r["block launched ms"] for r in attention if "block launched ms" in r), default=None)
    out = []
    for row in rows:
        published = PUBLISHED.get((row["mixer"], row["px"])) if (row["B"], row["mode"]) == (32, "inference") else None
        full: Row = {key: row.get(key) for key in ("px", "B", "mode", "mixer", "sub-layer ms", "block ms")}
        for part in ("sub-layer", "block"):
            ms = row.get(f"{part} ms")
            full[f"{part}: attention / this"] = best[f"{part} ms"] / ms if best and ms else None
        if quickest and (ms := row.get("block launched ms")):
            full |= {"block launched ms": ms, "launched: attention / this": quickest / ms}
        if row.get("block ms") and row.get("sub-layer ms"):
            full["sub-layer share"] = row["sub-layer ms"] / row["block ms"]
            full["blocks x images / s"] = 1e3 * row["B"] / row["block ms"]
        full["peak GB"] = row.get("peak GB")
        full["published sub-layer, block ms"] = f"{published[0]}, {published[1]}" if published else None
        full["note"] = row.get("note")
        out.append(full)
    return out


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """For each batch and mode, the smallest size from which on C-GSPN is faster than the fastest attention."""
    found = []
    for batch, mode in dict.fromkeys((row["B"], row["mode"]) for row in rows):
        for part in ("sub-layer", "block"):
            key = f"{part}: attention / this"
            ratios = sorted(
                (r["px"], r[key]) for r in rows if (r["B"], r["mode"], r["mixer"]) == (batch, mode, OURS) and r[key]
            )
            loses = [px for px, ratio in ratios if ratio <= 1]
            wins = [px for px, _ in ratios if px > max(loses, default=0)]
            row: Row = {"B": batch, "mode": mode, "part": part}
            row["slower at px"] = ", ".join(map(str, loses)) or "none measured"
            found.append(row | {"faster from px": wins[0] if wins else "nowhere measured"})
    return found


def run(
    config: TableConfig, out: Path, device: torch.device, *, commit: str = "", say: Callable[[str], object] = print
) -> list[Row]:
    """Run the benchmark and write table.json, table.md and table.png to `out` after each size.

    Raises ValueError for a contender that is unknown or does not support the shape, OSError if `out` is not writable.
    """
    for name in config.contenders or names(device):
        with torch.device("meta"):  # raise errors before the first measurement
            build(name, config.shape, torch.device("meta"), torch.float32)
    machine = describe(commit) | ceilings(device)
    rows: list[Row] = []
    for pixels in config.sizes:
        for mode in config.modes:
            step = partial(our_step, config, pixels, mode, device)
            for batch in dict.fromkeys(fitting(step, wanted, device)[0] or 1 for wanted in config.batches):
                rows += size_rows(config, pixels, batch, mode, device)
                free(device)
                best = next((r for r in rows[::-1] if r["mixer"] == OURS), None)
                if best and best["block ms"]:  # rows that ran out of memory have no time
                    ratio = best["block: attention / this"] or float("nan")
                    say(f"{pixels} px, B = {batch}, {mode}: block {best['block ms']:.3g} ms, {ratio:.3g} x")
        write(out, "table", machine, {"blocks": rows, "crossover": crossovers(rows)})
    panels = list(dict.fromkeys((row["mode"], row["B"]) for row in rows))
    shown = [
        (f"{part}, {mode}, B = {batch}", [r for r in rows if (r["mode"], r["B"]) == (mode, batch)], f"{part} ms")
        for part in ("sub-layer", "block")
        for mode, batch in panels
    ]
    draw_sizes(out / "table.png", shown, columns=len(panels), name="mixer")
    return rows
