"""The operator against the memory: times, bytes, share of the copy bandwidth; attention and PyTorch beside it.

Bytes: every input read once, every output written once. The backward's inputs include the state that the forward
saved; its outputs are the gradients to x, logits, lam and u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..environment import describe
from ..ops import DIRECTIONS, propagate_2d
from ..ops.arguments import Scan
from ..ops.backends import backend_module, unsupported_reason
from ..ops.cuda import projected
from ..ops.projected import propagate_2d_projected
from .drawing import draw
from .machine import copy_bandwidth, matmul_rate
from .results import write
from .timing import medians

FOUR = [0, 1, 2, 3]
Row = dict[str, Any]
PROJECTED = [(32, 74), (32, 147), (8, 74), (1, 74)]
# NVlabs/GSPN's kernel on an H100 in milliseconds, four directions, C = 64, B = 32; then its line scan
PUBLISHED = {("forward", 74): 10.1, ("backward", 74): 23.1, ("forward", 147): 52.0, ("backward", 147): 119.2}
PUBLISHED_LINE = {"forward": 38.5, "backward": 95.1}


def inputs(b: int, n: int, c: int, dtype: torch.dtype, directions: int = 4) -> list[Tensor]:
    """Random x, logits, lam, u for a square grid."""
    shapes = [(b, n, n, c), (b, n, n, directions, 3, c), (b, n, n, directions, c), (b, n, n, directions, c)]
    return [torch.empty(s, device="cuda", dtype=dtype).normal_() for s in shapes]


def size_of(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def flop_of(tensors: Sequence[Tensor], codes: Sequence[int], backend: str) -> int:
    """FLOP of a summed `propagate_2d` of x, logits, lam and u."""
    with FlopCounterMode(display=False) as counter:
        propagate_2d(*tensors, directions=[DIRECTIONS[code] for code in codes], backend=backend)
    return counter.get_total_flops()


def operator_rows(
    b: int,
    n: int,
    c: int,
    copy: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    codes: list[int] = FOUR,
    with_torch: bool = False,
    merges: tuple[str, ...] = ("sum", "none"),
    backward: bool = True,
) -> list[Row]:
    """Forward (merged and not) and backward of one size on the CUDA backend; `with_torch`: the others beside it."""
    cuda, plain = backend_module("cuda"), backend_module("torch")
    triton = (
        backend_module("triton")
        if with_torch and unsupported_reason("triton", torch.empty(0, device="cuda")) is None
        else None
    )
    t = inputs(b, n, c, dtype, len(codes))
    x, logits, lam, u = t
    summed = Scan(x, logits, lam, u, directions=codes)
    scans = {merge: summed._replace(merge_sum=merge == "sum") for merge in merges}
    calls: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {}
    for merge, scan in scans.items():
        count = size_of(*t, x if scan.merge_sum else u)
        calls[f"forward {merge}"] = (partial(cuda.forward, scan), partial(plain.forward, scan), count)
    if backward:
        _, *saved = cuda.forward_saving(summed)
        calls["backward sum"] = (
            partial(cuda.backward_saved, x, summed, *saved),
            partial(plain.backward, x, summed),
            size_of(*t, *t, x, *saved),
        )
    times = medians({name: call[0] for name, call in calls.items()})
    rivals = medians({n_: call[1] for n_, call in calls.items()}, rounds=3, graph=False) if with_torch else {}
    portable: dict[str, float] = {}
    if triton is not None:  # its backward has no saved state: it includes a forward
        runs: dict[str, Callable[[], object]] = {
            f"forward {merge}": partial(triton.forward, scan) for merge, scan in scans.items()
        }
        if backward:
            runs["backward sum"] = partial(triton.backward, x, summed)
        portable = medians(runs, rounds=3)
    flop = flop_of(t, codes, "cuda")
    rows = []
    for name, (_, _, count) in calls.items():
        kind = name.split()[0]
        published = PUBLISHED.get((kind, n)) if (b, c, len(codes)) == (32, 64, 4) else None
        rows.append(
            {
                "B": b,
                "grid": n,
                "C": c,
                "dtype": str(dtype).removeprefix("torch."),
                "directions": len(codes),
                "pass": name,
                "ms": times[name],
                "MB": count / 1e6,
                "GFLOP": flop / 1e9 if kind == "forward" else None,
                "share of copy": count / copy / times[name] * 1e3,
                "PyTorch / this": rivals[name] / times[name] if name in rivals else None,
                "Triton / this": portable[name] / times[name] if name in portable else None,
                "NVlabs / this": published / times[name] if published else None,
            }
        )
    return rows


@torch.no_grad()
def _without_gradient(way: Callable[[], Tensor]) -> Tensor:
    return way()


def _with_gradients(way: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(), leaves, dy)


def values_rows(b: int, n: int, copy: float, c: int = 96) -> list[Row]:
    """Values of each direction's own in groups of eight with a forget gate, bfloat16, directions apart: the scan of
    `value_config(6)` in an SO400M, with the state as it is and normalised, beside two scans and a division."""
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


def projected_rows(b: int, n: int, c: int = 64) -> list[Row]:
    """`propagate_2d_projected` beside the projection and the scan apart, bfloat16: forward, and forward + backward.

    "of apart": the time over that of the projection and the scan apart; "MB saved": what autograd keeps for the
    backward beside the weights.
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
        if projected.unsupported_reason(x, backward=True) is None:
            trained["chip in both passes"] = {"parameters": "chip"}
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
    """Bytes that autograd keeps of a `propagate_2d_projected`, weights and bias apart."""
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


def line_scan_rows(copy: float) -> list[Row]:
    """The published benchmark of GSPN-2: [16, 1024, 1024, 8] float32, one direction."""
    cuda = backend_module("cuda")
    x, lam, dh = (torch.randn(16, 1024, 1024, 8, device="cuda") for _ in range(3))
    weights = torch.rand(16, 1024, 1024, 3, 8, device="cuda") / 3
    h = cuda.line_scan_forward(x, weights, lam, 0, None)
    forward, backward = size_of(x, weights, lam, h), size_of(x, weights, lam, dh, h, x, weights, lam)
    calls: dict[str, Callable[[], object]] = {
        f"forward {name}": partial(cuda.line_scan_forward, x, weights, lam, d, None)
        for d, name in enumerate(("down", "up", "right", "left"))
    }
    calls["backward down"] = lambda: cuda.line_scan_backward_saved(dh, x, weights, lam, 0, None, h)
    rows = []
    for name, ms in medians(calls).items():
        kind = name.split()[0]
        count = forward if kind == "forward" else backward
        rows.append(
            {
                "pass": name,
                "ms": ms,
                "MB": count / 1e6,
                "share of copy": count / copy / ms * 1e3,
                "NVlabs / this": PUBLISHED_LINE[kind] / ms,
            }
        )
    return rows


def attention_rows(b: int, n: int, matmul: float) -> list[Row]:
    """Attention of 16 heads of 72 channels over the same grid, on both fused backends, forward."""
    q, k, v = (torch.randn(b, 16, n * n, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flop = 4 * b * 16 * (n * n) ** 2 * 72
    rows = []
    for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def run(kind: SDPBackend = kind) -> Tensor:
            with sdpa_kernel(kind), torch.no_grad():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        row: Row = {"B": b, "grid": n, "attention": name}
        try:
            ms = medians({name: run}, rounds=5, graph=False)[name]
            row |= {"ms": ms, "share of matmul": flop / matmul / ms * 1e3, "note": ""}
        except RuntimeError as error:  # this backend does not take these inputs here: said, not left out
            row |= {"ms": None, "share of matmul": None, "note": str(error).splitlines()[0][:80]}
        rows.append(row)
    return rows


def bent(rows: list[Row], over: str) -> list[Row]:
    """For every inner size of a sweep, its time over that on the straight line through its neighbours."""
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
    """Times of every sweep against what is swept, beside the time the bytes need at the copy bandwidth."""

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


def run(out: Path, *, quick: bool = False, commit: str = "", say: Callable[[str], None] = print) -> None:
    """Measure everything and write operator.json, operator.md and operator.png to `out`.

    Raises RuntimeError without a CUDA GPU or where the CUDA backend cannot run.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("cgspn bench operator needs a CUDA GPU, and PyTorch sees none")
    reason = unsupported_reason("cuda", torch.zeros(1, 1, 1, 1, device="cuda"))
    if reason is not None:
        raise RuntimeError(f"the CUDA backend cannot run here: {reason}")
    copy, matmul = copy_bandwidth(), matmul_rate()
    machine = describe(commit) | {
        "copy ceiling": f"{copy / 1e12:.3f} TB/s",
        "matmul ceiling": f"{matmul / 1e12:.0f} TFLOP/s",
    }
    say(f"copy {copy / 1e12:.3f} TB/s, matmul {matmul / 1e12:.0f} TFLOP/s")
    sizes = []
    for b, n in ((32, 74), (32, 147), (1, 74), (1, 147), (1, 294)):
        sizes += operator_rows(b, n, 64, copy, with_torch=not quick and n < 294)
        torch.cuda.empty_cache()
    for dtype in (torch.float16, torch.float32):
        sizes += operator_rows(32, 74, 64, copy, dtype=dtype)
    for codes in ([0], [2], [0, 1], [2, 3]):
        sizes += operator_rows(32, 74, 64, copy, codes=codes)
    torch.cuda.empty_cache()
    tables = {"sizes": sizes}
    tables["projected operator"] = [row for b, n in PROJECTED for row in projected_rows(b, n)]
    torch.cuda.empty_cache()
    tables["values in groups of eight"] = [
        row for b, n in ((32, 74), (8, 74), (8, 147), (1, 74)) for row in values_rows(b, n, copy)
    ]
    torch.cuda.empty_cache()
    tables |= {"line scan [16, 1024, 1024, 8] float32": line_scan_rows(copy)}
    torch.cuda.empty_cache()
    pairs = ((32, 74), (1, 74), (1, 147)) if quick else ((32, 74), (32, 147), (1, 74), (1, 147))
    tables["attention, 16 heads of 72"] = [row for b, n in pairs for row in attention_rows(b, n, matmul)]
    torch.cuda.empty_cache()
    sweeps: dict[str, list[Row]] = {}
    bends: list[Row] = []
    for title, (over, cases) in SWEEPS.items():
        rows = []
        for case in cases:
            rows += operator_rows(*case, copy, merges=("sum",))
            torch.cuda.empty_cache()
        sweeps[title] = rows
        for kind in ("forward sum", "backward sum"):
            bends += bent([row for row in rows if row["pass"] == kind], over)
        say(f"swept {title}")
    tables |= {f"sweep: {title}": rows for title, rows in sweeps.items()}
    tables["sweeps: time over the straight line through the neighbours"] = bends
    write(out, "operator", machine, tables)
    plot(sweeps, out / "operator.png")
