"""From the original GSPN layer to C-GSPN, one change at a time, and how the sub-layer grows with batch and width.

    python -m benchmarks.ablation --out results/efficiency/walk

Writes ablation.json, .md and .png. Takes minutes on a GPU; on a CPU only small images are feasible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cgspn.bench.checks import at_least, not_empty, tiled
from cgspn.bench.contenders import OURS, PLAIN, Shape, build, names, paper_config
from cgspn.bench.machine import ceilings, free
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.layers import GSPN_WALK, Grid, PropagationConfig, PropagationMixer
from cgspn.layers.block import Block
from cgspn.ops import line_scan
from cgspn.report.drawing import draw

Row = dict[str, Any]


@dataclass(frozen=True)
class AblationConfig:
    """Settings.

    Args:
        pixels: side length of the square images.
        batch: batch size of the ablation, halved until its first step fits in memory.
        batches: batch sizes of the sweep over the batch size.
        widths: numbers of channels of the sweep over the width, with the same latent width.
        shape: dimensions of the layers.
        rounds: number of interleaved timings of each.
    """

    pixels: int = 1036
    batch: int = 32
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    widths: tuple[int, ...] = (288, 576, 1152, 2304)
    shape: Shape = field(default_factory=Shape)
    rounds: int = 7

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be measured."""
        not_empty(self, "batches", "widths")
        at_least(self, 1, "batch", "batches", "widths", "rounds")
        tiled("pixels", self.pixels, self.shape.patch)


class SeparateNormalisation(PropagationMixer):
    """The scan without fusion: it writes normalised weights to memory, then scans and gates each direction."""

    def propagate(
        self, x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, keep: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`PropagationMixer.propagate` without a mask or a forget gate."""
        outs = []
        for d, direction in enumerate(self.config.directions):
            weights = self.weights(logits[..., d, :, :], direction in ("down", "up"))
            outs.append(u[..., d, :] * line_scan(x, weights, lam[..., d, :], direction))
        return torch.stack(outs, -2) if self.config.merge == "concat" else torch.stack(outs).sum(0)

    def weights(self, logits: Tensor, vertical: bool) -> Tensor:
        """Normalised weights [B, H, W, 3, C] from logits of the same shape, with a pass over memory for each step."""
        return neighbour_weights(logits, vertical)


class CompiledNormalisation(SeparateNormalisation):
    """`SeparateNormalisation` with the steps of the normalisation fused into one kernel, as in the paper."""

    def weights(self, logits: Tensor, vertical: bool) -> Tensor:
        """Normalised weights as in `SeparateNormalisation`, in one pass over memory."""
        return compiled_weights()(logits, vertical)


def neighbour_weights(logits: Tensor, vertical: bool) -> Tensor:
    """Sigmoid, sum over the neighbours that exist, clamp, division: [B, H, W, 3, C] -> the same."""
    length = logits.shape[2 if vertical else 1]
    there = torch.ones(length, 3, device=logits.device, dtype=logits.dtype)
    there[0, 0] = there[-1, 2] = 0
    weights = logits.sigmoid() * there.view([1, 1, length, 3, 1] if vertical else [1, length, 1, 3, 1])
    return weights / weights.sum(-2, keepdim=True).clamp(min=1e-7)


@functools.cache
def compiled_weights() -> Callable[[Tensor, bool], Tensor]:
    """`neighbour_weights`, compiled."""
    return torch.compile(neighbour_weights, dynamic=False)


def layers_of_the_walk(shape: Shape) -> dict[str, PropagationMixer]:
    """The layers of the ablation. Each is the previous one with one change; the first three differ in the
    normalisation."""
    width, first = shape.width, GSPN_WALK["GSPN"]
    steps: dict[str, PropagationMixer] = {
        "GSPN, normalisation in separate steps": SeparateNormalisation(width, first),
        "+ normalisation in one kernel": CompiledNormalisation(width, first),
        "+ normalisation inside the scan": PropagationMixer(width, first),
    }
    for name, config in GSPN_WALK.items():
        if config.compression is None and name != "GSPN":
            steps[name] = PropagationMixer(width, config)
    steps["+ latent space"] = PropagationMixer(width, replace(first_latent(shape)))
    steps["- local convolution and norms (the paper's C-GSPN)"] = PropagationMixer(width, paper_config(shape))
    steps["our default"] = PropagationMixer(width, PropagationConfig(compression=shape.compression))
    return steps


def first_latent(shape: Shape) -> PropagationConfig:
    """The layer of the first step in the latent space: the previous one behind P_down."""
    last = [config for config in GSPN_WALK.values() if config.compression is None][-1]
    return replace(last, compression=shape.compression)


def walk_rows(config: AblationConfig, device: torch.device) -> list[Row]:
    """Sub-layer latency of every step, measured one after the other, because the first ones fill the memory."""
    side = config.pixels // config.shape.patch
    grid = Grid(side, side)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch, tokens = config.batch, None
    while True:
        rows: list[Row] = []
        try:
            tokens = torch.randn(batch, grid.tokens, config.shape.width, device=device, dtype=dtype)
            for name, mixer in layers_of_the_walk(config.shape).items():
                ms = sublayer_ms(mixer, tokens, grid, config.rounds)
                before, first = (rows[-1]["ms"], rows[0]["ms"]) if rows else (ms, ms)
                rows.append({"layer": name, "B": batch, "ms": ms, "step": before / ms, "from the first": first / ms})
            return rows
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        tokens = None  # after the except clause, whose traceback holds what did not fit
        free(device)


def sublayer_ms(mixer: PropagationMixer, tokens: Tensor, grid: Grid, rounds: int) -> float:
    """Milliseconds of a sub-layer: norm, mixer and residual addition."""
    block = Block(tokens.shape[-1], mixer, 8, "gelu", 1e-6, None).to(tokens.device, tokens.dtype).eval()

    def run() -> Tensor:
        with torch.no_grad():
            return block.mixing_half(tokens, grid)

    ms = medians({"layer": run}, rounds=rounds, graph=False)["layer"]
    free(tokens.device)
    return ms


def sweep_rows(config: AblationConfig, device: torch.device) -> dict[str, list[Row]]:
    """The sub-layer of GSPN, of C-GSPN, and of C-GSPN without block fusion, over batch sizes and over widths."""
    side = config.pixels // config.shape.patch
    grid = Grid(side, side)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = ["GSPN", OURS, *([PLAIN] if PLAIN in names(device) else [])]
    cases = {
        "batch": [(b, config.shape) for b in config.batches],
        "width": [(min(8, config.batch), _of_width(config.shape, width)) for width in config.widths],
    }
    found: dict[str, list[Row]] = {}
    for over, points in cases.items():
        rows: list[Row] = []
        for batch, shape in points:
            calls: dict[str, Callable[[], object]] = {}
            row: Row = {"over": over, "B": batch, "C": shape.width}
            for name in wanted:
                try:
                    tokens = torch.randn(batch, grid.tokens, shape.width, device=device, dtype=dtype)
                    contender = build(name, shape, device, dtype)

                    def run(contender: Any = contender, tokens: Tensor = tokens) -> Tensor:
                        with torch.no_grad():
                            out: Tensor = contender.sublayer(tokens, grid)
                            return out

                    run()
                    calls[name] = run
                except torch.OutOfMemoryError:
                    row[f"{name}: ms"] = "OOM"
                free(device)
            row |= {f"{name}: ms": ms for name, ms in medians(calls, rounds=config.rounds, graph=False).items()}
            calls.clear()
            rows.append(row)
        found[f"sweep over {over}"] = rows
    return found


def _of_width(shape: Shape, width: int) -> Shape:
    """The settings for another width with the same latent width."""
    return replace(shape, width=width, compression=shape.compression * width / shape.width)


def run(
    config: AblationConfig,
    out: Path,
    device: torch.device,
    *,
    commit: str = "",
    say: Callable[[str], object] = print,
) -> dict[str, list[Row]]:
    """Measure and write ablation.json, .md and .png to `out`. Raises OSError if it cannot be written."""
    machine = describe(commit, "python -m benchmarks.ablation") | ceilings(device)
    tables = {"GSPN to C-GSPN": walk_rows(config, device)}
    for row in tables["GSPN to C-GSPN"]:
        say(f"{row['layer']}: {row['ms']:.3g} ms, {row['from the first']:.3g} x")
    tables |= sweep_rows(config, device)
    write(out, "ablation", machine, tables)
    plot(tables, out / "ablation.png")
    return tables


def plot(tables: dict[str, list[Row]], path: Path) -> None:
    """Plot the ablation as bars and the sweeps as curves."""

    def paint(axes: Any) -> None:
        steps = tables["GSPN to C-GSPN"]
        axes[0, 0].barh([row["layer"] for row in steps][::-1], [row["ms"] for row in steps][::-1])
        axes[0, 0].set(xscale="log", xlabel="ms, sub-layer")
        for ax, (over, key) in zip(axes[0, 1:], (("batch", "B"), ("width", "C"))):
            rows = tables[f"sweep over {over}"]
            for name in (k for k in dict.fromkeys(k for row in rows for k in row) if k.endswith(": ms")):
                points = [(row[key], row[name]) for row in rows if isinstance(row.get(name), float)]
                if points:
                    ax.plot(*zip(*points), "o-", label=name.removesuffix(": ms"))
            ax.set(xscale="log", yscale="log", xlabel=key, ylabel="ms, sub-layer")
            ax.legend(fontsize=8)

    draw(path, paint, columns=3, figsize=(15, 4.5))


def main(config: AblationConfig = AblationConfig(), out: Path = Path("runs/bench"), commit: str = "") -> None:
    """Measure and write.

    Args:
        config: settings.
        out: folder for the results: JSON, a table and a plot.
        commit: commit to record in the results; by default that of the working tree.
    """
    run(config, out, torch.device("cuda" if torch.cuda.is_available() else "cpu"), commit=commit)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
