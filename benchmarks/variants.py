"""Timings of all tile configs of the scan kernels, to find those that ops/cuda/plan.py and projected_plan.py should
choose.

    python -m benchmarks.variants --out results/operator

Writes variants.json and .md. Needs a CUDA GPU. The time of a config counts only if its result agrees with that of the
chosen config, which the tests compare with the reference. Kernels are compiled first, in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cgspn.bench.machine import copy_bandwidth
from cgspn.bench.operator import Row, inputs, size_of
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.ops.arguments import ProjectedScan, Scan, given_scan
from cgspn.ops.backends import unsupported_reason
from cgspn.ops.cuda import launch, projected, scan
from cgspn.ops.cuda.compile import cubin, macros
from cgspn.ops.cuda.plan import Problem, TileConfig, choose
from cgspn.ops.cuda.projected_plan import ProjectedTileConfig, cuts
from cgspn.ops.cuda.projected_plan import choose as choose_projected
from cgspn.ops.gpu import Machine, gpu_of

FLOAT32, BF16 = 0, 2  # of the kernels' DTYPE
SCANS = [(32, 74, 64), (32, 147, 64), (8, 74, 64), (8, 147, 64), (1, 74, 64), (1, 147, 64), (1, 294, 64)]
PROJECTED = [(32, 74, 64), (32, 147, 64), (8, 74, 64), (1, 74, 64)]
AGREE = 2e-2  # relative difference of two roundings of sums to bfloat16


def rival_cuts(p: Problem, machine: Machine) -> list[TileConfig]:
    """Tile configs to compare with the chosen one, for 16-byte alignment: lines split across clusters, with halos; for
    large batches also whole lines, in shorter and longer runs; for small batches runs of all lengths.
    """
    shapes: tuple[tuple[int, int], ...]
    splits: tuple[int, ...]
    stages: tuple[int, ...]
    halos = (4, 8, 16)
    if not p.normalise:
        shapes, splits, stages = ((4, 2), (2, 4)), (4, 8), (2, 3) if p.backward else (1, 2)
    elif p.batch >= 16:
        shapes, splits, stages = ((8, 8), (8, 4)), (1, 2, 4), (2,) if p.backward else (1, 2)
        halos = (2, 4, 8)
    else:
        shapes, splits, stages = ((4, 2), (8, 2), (4, 4), (8, 4), (4, 8), (8, 8)), (2, 4, 8), (2, 3)
    found = [
        TileConfig(vec, lanes, depth, split, halo if split > 1 else 1)
        for vec, lanes in shapes
        for split in splits
        for halo in halos
        for depth in stages
        if (split == 1 or p.longest // split >= 16)  # shorter parts are mostly halo
        and (p.batch >= 16 or halo in (4, 32 // split))
    ]
    return [cut for cut in dict.fromkeys(found) if cut.fits(p, machine)]


def compile_all(jobs: Iterable[tuple[str, dict[str, int]]], arch: str) -> None:
    """Compile kernels (source name, macros) into the cache on disk, in parallel."""
    unique = {(name, macros(defines)) for name, defines in jobs}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: cubin(job[0], job[1], arch), unique))


# The published benchmark of GSPN-2, one direction, float32
LINE_SCAN = Problem(False, False, 4, 16, 8, 1, 1024, 16)


def _scan_problem(b: int, n: int, c: int, backward: bool) -> Problem:
    return Problem(backward, True, 2, b, c, 4, n, 16)


def jobs(machine: Machine) -> Iterator[tuple[str, dict[str, int]]]:
    """The source names and macros of all kernels that this module times."""
    for size in SCANS:
        for backward in (False, True):
            p = _scan_problem(*size, backward)
            for cut in [choose(p, machine), *rival_cuts(p, machine)]:
                if cut is not None:
                    save = None if backward else False
                    yield p.name, launch.scan_defines(cut, p, BF16, masked=False, merged=True, save=save)
    for p in (LINE_SCAN, replace(LINE_SCAN, backward=True)):
        for cut in [choose(p, machine), *rival_cuts(p, machine)]:
            if cut is not None:
                save = None if p.backward else False
                yield p.name, launch.scan_defines(cut, p, FLOAT32, masked=False, merged=False, save=save)
    for _, n, c in PROJECTED:
        for projected_cut in cuts(n, c, machine):
            yield "projected_forward", projected.projected_defines(projected_cut, c, BF16, masked=False)


def _flat(result: Any) -> Tensor:
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cat([t.float().flatten() / t.float().norm() for t in tensors if t is not None])


def _timed(calls: dict[str, Callable[[], object]], *, graph: bool = True) -> Iterator[tuple[str, float, float]]:
    """Name, milliseconds and difference from the first call's result; no time for a call whose result differs.

    graph: replayed from CUDA graphs, each of which keeps the memory of its outputs.
    """
    want = _flat(next(iter(calls.values()))())
    agreed, differences = {}, {}
    for name, call in calls.items():
        difference = ((_flat(call()) - want).norm() / want.norm()).item()
        differences[name] = difference
        if difference <= AGREE:
            agreed[name] = call
    times = medians(agreed, graph=graph)
    for name in calls:
        yield name, times.get(name, float("nan")), differences[name]


def scan_rows(b: int, n: int, c: int, machine: Machine, copy: float) -> list[Row]:
    """Time forward and backward of `propagate_2d` with summed directions in bfloat16, with every config."""
    x, logits, lam, u = t = inputs(b, n, c, torch.bfloat16)
    arguments = Scan(x, logits, lam, u)
    _, h, _ = scan.forward_saving(arguments)
    runs: dict[bool, tuple[Callable[..., object], int]] = {
        False: (partial(scan.forward, arguments), size_of(*t, x)),
        True: (partial(scan.backward, x, arguments, h), size_of(*t, *t, x, h)),
    }
    rows: list[Row] = []
    for backward, (function, count) in runs.items():
        p = _scan_problem(b, n, c, backward)
        calls: dict[str, Callable[[], object]] = {"the plan's": function}
        calls |= {describe_cut(cut): partial(function, cut=cut) for cut in rival_cuts(p, machine)}
        for name, ms, difference in _timed(calls):
            size = {"B": b, "grid": n, "C": c, "pass": p.name, "cut": name}
            rows.append(size | {"ms": ms, "share of copy": count / copy / ms * 1e3, "difference": difference})
    return rows


def line_scan_rows(machine: Machine, copy: float) -> list[Row]:
    """Time `line_scan` on [16, 1024, 1024, 8] float32 with every config: forward down and right, backward down."""
    x, lam, dh = (torch.randn(16, 1024, 1024, 8, device="cuda") for _ in range(3))
    weights = torch.rand(16, 1024, 1024, 3, 8, device="cuda") / 3
    down = given_scan(x, weights, lam)
    h = scan.forward(down)
    forward, backward = size_of(x, weights, lam, h), size_of(x, weights, lam, dh, h, x, weights, lam)
    runs: dict[str, tuple[Callable[..., object], int]] = {
        "forward down": (partial(scan.forward, down), forward),
        "forward right": (partial(scan.forward, down._replace(directions=(2,))), forward),
        "backward down": (partial(scan.backward, dh, down, h), backward),
    }
    rows: list[Row] = []
    for kind, (function, count) in runs.items():
        p = replace(LINE_SCAN, backward=kind.startswith("backward"))
        calls: dict[str, Callable[[], object]] = {"the plan's": function}
        calls |= {describe_cut(cut): partial(function, cut=cut) for cut in rival_cuts(p, machine)}
        for name, ms, difference in _timed(calls, graph=False):
            size = {"B": 16, "grid": 1024, "C": 8, "pass": kind, "cut": name}
            rows.append(size | {"ms": ms, "share of copy": count / copy / ms * 1e3, "difference": difference})
    return rows


def projected_rows(b: int, n: int, c: int, machine: Machine) -> list[Row]:
    """Time `propagate_2d_projected` with parameters computed on chip, summed, in bfloat16, with every config."""
    x = torch.randn(b, n, n, c, device="cuda").bfloat16()
    weight = (torch.randn(20 * c, c, device="cuda") / c**0.5).bfloat16()
    bias = torch.randn(20 * c, device="cuda").bfloat16()
    p = ProjectedScan(x, weight, bias)
    function = partial(projected.forward, p)
    calls: dict[str, Callable[[], object]] = {f"the plan's, {choose_projected(b, n, c, 4, machine)}": function}
    calls |= {describe_cut(cut): partial(function, cut=cut) for cut in cuts(n, c, machine)}
    size = {"B": b, "grid": n, "C": c, "pass": "forward"}
    return [size | {"cut": name, "ms": ms, "difference": difference} for name, ms, difference in _timed(calls)]


def describe_cut(cut: TileConfig | ProjectedTileConfig) -> str:
    """The fields of a tile config as text for a table."""
    return " ".join(f"{name} {value}" for name, value in vars(cut).items())


def best(rows: list[Row]) -> list[Row]:
    """For every size and pass, the time of the chosen config, the best time, and the best config."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["B"], row["grid"], row["C"], row["pass"]), []).append(row)
    found = []
    for group in groups.values():
        fastest = min(group, key=lambda row: row["ms"] if row["ms"] == row["ms"] else float("inf"))
        wrong = sum(row["difference"] > AGREE or row["difference"] != row["difference"] for row in group)
        found.append(fastest | {"the plan's ms": group[0]["ms"], "variants": len(group), "that differ": wrong})
    return found


def run(out: Path, *, commit: str = "", say: Callable[[str], None] = print) -> None:
    """Time every variant and write variants.json and variants.md to `out`.

    Raises RuntimeError without a CUDA GPU or where the CUDA backend cannot run.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("benchmarks.variants needs a CUDA GPU, and PyTorch sees none")
    reason = unsupported_reason("cuda", torch.zeros(1, 1, 1, 1, device="cuda"))
    if reason is not None:
        raise RuntimeError(f"the CUDA backend cannot run here: {reason}")
    found = gpu_of(torch.device(torch.cuda.current_device()))
    assert found is not None
    gpu = found.machine
    compile_all(jobs(gpu), found.arch)
    copy = copy_bandwidth()
    say(f"kernels compiled; copy {copy / 1e12:.3f} TB/s")
    tables: dict[str, list[Row]] = {"scan": [], "projected": []}
    for size in PROJECTED:
        tables["projected"] += projected_rows(*size, gpu)
        say(f"projected {size}")
    for size in SCANS:
        tables["scan"] += scan_rows(*size, gpu, copy)
        torch.cuda.empty_cache()
        say(f"scan {size}")
    tables["line scan"] = line_scan_rows(gpu, copy)
    summary = {f"{name}: the best of each size": best(rows) for name, rows in tables.items()}
    for name, rows in summary.items():
        say(name)
        for row in rows:
            own = row["the plan's ms"]
            say(f"  {row['pass']} B {row['B']} {row['grid']}: {own:.4f} -> {row['ms']:.4f} ms, {row['cut']}")
    write(
        out,
        "variants",
        describe(commit, "python -m benchmarks.variants") | {"copy ceiling": f"{copy / 1e12:.3f} TB/s"},
        summary | tables,
    )


def main(out: Path = Path("runs/bench"), commit: str = "") -> None:
    """Measure and write.

    Args:
        out: folder for the results.
        commit: commit to record in the results; by default that of the working tree.
    """
    run(out, commit=commit)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
