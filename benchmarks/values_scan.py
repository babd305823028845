"""The cost of a normalised state, compared with an unnormalised scan and with two scans and a division.

    python -m benchmarks.values_scan --out results/operator

Needs a CUDA GPU.
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
from cgspn.bench.operator import Row, size_of
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.ops import propagate_2d

SIZES = [(32, 74), (8, 74), (8, 147), (1, 74), (1, 147)]


@torch.no_grad()
def _without_gradient(way: Callable[[], Tensor]) -> Tensor:
    return way()


def _with_gradients(way: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(), leaves, dy)


def values_rows(b: int, n: int, copy: float, c: int = 96) -> list[Row]:
    """Time the scan of `value_config(6)` in an SO400M (separate values in groups of eight, forget gate, bfloat16):
    unnormalised, normalised, and as two scans and a division."""
    packed = torch.randn(b, n, n, 4, 6, c // 8, device="cuda", dtype=torch.bfloat16)
    lam, u, logits, keep = packed.split([1, 1, 3, 1], 4)
    wide = torch.randn(b, n, n, 64 + 4 * c, device="cuda", dtype=torch.bfloat16)
    x = wide[..., 64:].unflatten(-1, (4, c))
    lam = torch.nn.functional.softplus(lam.squeeze(4))
    leaves = [t.detach().requires_grad_() for t in (x, logits, lam, u.squeeze(4), keep.squeeze(4))]
    dy = torch.randn(b, n, n, 4, c, device="cuda", dtype=torch.bfloat16)

    def scan(normalise_state: bool = False, x: Tensor = leaves[0], u: Tensor = leaves[3]) -> Tensor:
        options: dict[str, Any] = {"merge": "none", "backend": "cuda", "normalise_state": normalise_state}
        return propagate_2d(x, leaves[1], leaves[2], u, keep=leaves[4], **options)

    def apart() -> Tensor:
        ones = torch.ones_like(leaves[2])
        total = scan(x=ones, u=ones).clamp(min=1e-6)
        return (scan().unflatten(-1, (c // 8, 8)) / total.unsqueeze(-1)).flatten(-2)

    ways: dict[str, Callable[[], Tensor]] = {
        "state as it is": scan,
        "normalised": partial(scan, True),
        "two scans and a division": apart,
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        calls[f"forward: {name}"] = partial(_without_gradient, way)
        calls[f"forward + backward: {name}"] = partial(_with_gradients, way, leaves, dy)
    once = size_of(packed, x, dy)  # a backward reads it, the output's gradient and the state, and writes gradients
    rows = []
    for name, ms in medians(calls).items():
        count = once if name.startswith("forward:") else 4 * once
        row: Row = {"B": b, "grid": n, "channels": f"4 x {c}", "what": name, "ms": ms, "MB": count / 1e6}
        rows.append(row | {"share of copy": count / copy / ms * 1e3})
    return rows


def main(out: Path = Path("runs/operator")) -> None:
    """Measure and write values_scan.json and .md.

    Args:
        out: folder for the results.
    """
    copy = copy_bandwidth()
    rows = [row for b, n in SIZES for row in values_rows(b, n, copy)]
    machine = describe(program="python -m benchmarks.values_scan") | {"copy ceiling": f"{copy / 1e12:.3f} TB/s"}
    write(out, "values_scan", machine, {"values in groups of eight": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
