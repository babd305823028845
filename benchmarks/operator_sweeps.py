"""The operator over sweeps of single sizes, and the projected operator compared with a separate projection.

    python -m benchmarks.operator_sweeps --out results/operator

The sweeps show whether a size is slower than similar sizes. The second table shows the gain from computing the scan
parameters on chip. Both need a CUDA GPU. The results of `cgspn bench operator` are in the same folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cgspn.bench.machine import copy_bandwidth
from cgspn.bench.operator import Row, operator_rows
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.ops.cuda import projected
from cgspn.ops.projected import propagate_2d_projected
from cgspn.report.drawing import draw

PROJECTED = [(32, 74), (32, 147), (8, 74), (1, 74)]


def projected_rows(b: int, n: int, c: int = 64) -> list[Row]:
    """Time `propagate_2d_projected` and a separate projection and scan, in bfloat16: forward, and forward + backward.

    "of apart" is the time relative to a separate projection and scan. "MB saved" is the memory that autograd keeps for
    the backward, without the weights.
    """
    x = torch.randn(b, n, n, c, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(4 * 5 * c, c, device="cuda") / c**0.5).bfloat16().requires_grad_()
    bias = torch.zeros(4 * 5 * c, device="cuda", dtype=torch.bfloat16).requires_grad_()
    leaves = [x, weight, bias]
    dy = torch.randn_like(x)

    def both(options: dict[str, Any]) -> object:
        return torch.autograd.grad(propagate_2d_projected(*leaves, backend="cuda", **options), leaves, dy)

    @torch.no_grad()
    def forward(options: dict[str, Any]) -> object:
        return propagate_2d_projected(*leaves, backend="cuda", **options)

    @torch.no_grad()
    def projection() -> object:
        return torch.nn.functional.linear(x, weight, bias)

    apart: dict[str, Any] = {"parameters": "memory", "recompute": False}
    forwards: dict[str, dict[str, Any]] = {"projection + scan apart": apart, "auto": {}}
    trained = forwards | {"all in memory, made again": {"parameters": "memory"}}
    if projected.unsupported_reason(x) is None:
        forwards["chip"] = {"parameters": "chip"}
    calls: dict[str, Callable[[], object]] = {"projection alone": projection}
    calls |= {f"forward: {name}": partial(forward, options) for name, options in forwards.items()}
    calls |= {f"forward + backward: {name}": partial(both, options) for name, options in trained.items()}
    saved = {f"forward + backward: {name}": _saved_bytes(leaves, options) for name, options in trained.items()}
    rows = []
    times = medians(calls)
    for name, ms in times.items():
        base = times.get(f"{name.split(':')[0]}: projection + scan apart")
        row: Row = {"B": b, "grid": n, "C": c, "what": name, "ms": ms, "of apart": base and ms / base}
        rows.append(row | {"MB saved": saved[name] / 1e6 if name in saved else None})
    return rows


def _saved_bytes(leaves: list[Tensor], options: dict[str, Any]) -> int:
    """Bytes that autograd keeps for the backward of `propagate_2d_projected`, without weight and bias."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in {leaf.untyped_storage().data_ptr() for leaf in leaves[1:]}:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = propagate_2d_projected(*leaves, backend="cuda", **options)
    del y
    return sum(kept.values())


def bent(rows: list[Row], over: str) -> list[Row]:
    """For every inner size of a sweep, its time relative to the linear interpolation of its neighbours."""
    found = []
    for before, here, after in zip(rows, rows[1:], rows[2:]):
        a, b, c = (row[over] ** (2 if over == "grid" else 1) for row in (before, here, after))
        line = before["ms"] + (after["ms"] - before["ms"]) * (b - a) / (c - a)
        found.append({"over": over, over: here[over], "pass": here["pass"], "times the line": here["ms"] / line})
    return found


SWEEPS: dict[str, tuple[str, list[tuple[int, int, int]]]] = {
    "batch (74x74, C = 64)": ("B", [(b, 74, 64) for b in (1, 2, 4, 8, 16, 32, 64)]),
    "channels (B = 8, 74x74)": ("C", [(8, 74, c) for c in (32, 64, 128, 192, 256, 384, 576, 768, 1152)]),
    "grid (B = 1, C = 64)": ("grid", [(1, n, 64) for n in (16, 24, 37, 54, 74, 110, 147, 200, 294)]),
    "grid (B = 32, C = 64)": ("grid", [(32, n, 64) for n in (16, 24, 37, 54, 74, 110, 147, 200, 294)]),
}


def plot(sweeps: dict[str, list[Row]], path: Path) -> None:
    """Plot the times of every sweep, and the time that the bytes need at the copy bandwidth."""

    def paint(axes: Any) -> None:
        for ax, (title, rows) in zip(axes.flat, sweeps.items()):
            over = SWEEPS[title][0]
            for kind in dict.fromkeys(row["pass"] for row in rows):
                points = [row for row in rows if row["pass"] == kind]
                (line,) = ax.plot([r[over] for r in points], [r["ms"] for r in points], "o-", label=kind)
                floor = [r["ms"] * r["share of copy"] for r in points]
                ax.plot([r[over] for r in points], floor, ":", color=line.get_color(), label=f"{kind}: bytes / copy")
            ax.set(xscale="log", yscale="log", xlabel=over, ylabel="ms", title=title)
            ax.legend(fontsize=7)

    draw(path, paint, 2, 2, figsize=(11, 8))


def main(out: Path = Path("runs/operator")) -> None:
    """Measure and write operator_sweeps.json, .md and .png.

    Args:
        out: folder for the results.
    """
    copy = copy_bandwidth()
    found: dict[str, list[Row]] = {}
    bends: list[Row] = []
    for title, (over, cases) in SWEEPS.items():
        rows = []
        for case in cases:
            rows += operator_rows(*case, copy, merges=("sum",))
            torch.cuda.empty_cache()
        found[title] = rows
        for kind in ("forward sum", "backward sum"):
            bends += bent([row for row in rows if row["pass"] == kind], over)
    tables = {f"sweep: {title}": rows for title, rows in found.items()}
    tables["sweeps: time over the straight line through the neighbours"] = bends
    tables["projected operator"] = [row for b, n in PROJECTED for row in projected_rows(b, n)]
    machine = describe(program="python -m benchmarks.operator_sweeps") | {"copy ceiling": f"{copy / 1e12:.3f} TB/s"}
    write(out, "operator_sweeps", machine, tables)
    plot(found, out / "operator_sweeps.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
