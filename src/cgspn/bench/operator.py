"""Benchmark of the operator, compared with memory bandwidth, attention and PyTorch.

Bytes count every input once and every output once. The backward's inputs include the saved state; its outputs are the
gradients of x, logits, lam and u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..environment import describe
from ..ops import DIRECTIONS, propagate_2d
from ..ops.arguments import Scan, given_scan
from ..ops.backends import backend_module, unsupported_reason
from .machine import copy_bandwidth, matmul_rate
from .results import write
from .timing import medians

FOUR = [0, 1, 2, 3]
Row = dict[str, Any]
# milliseconds of NVlabs/GSPN's kernel on an H100: four directions, C = 64, B = 32; then its line scan
PUBLISHED = {("forward", 74): 10.1, ("backward", 74): 23.1, ("forward", 147): 52.0, ("backward", 147): 119.2}
PUBLISHED_LINE = {"forward": 38.5, "backward": 95.1}


@dataclass(frozen=True)
class OperatorConfig:
    """Settings.

    Args:
        quick: skip the slowest baselines.
    """

    quick: bool = False


def inputs(b: int, n: int, c: int, dtype: torch.dtype, directions: int = 4) -> list[Tensor]:
    """Random x, logits, lam, u for a square grid."""
    shapes = [(b, n, n, c), (b, n, n, directions, 3, c), (b, n, n, directions, c), (b, n, n, directions, c)]
    return [torch.empty(s, device="cuda", dtype=dtype).normal_() for s in shapes]


def size_of(*tensors: Tensor) -> int:
    """Total bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def flop_of(tensors: Sequence[Tensor], codes: Sequence[int], backend: str) -> int:
    """FLOPs of `propagate_2d` of x, logits, lam and u with summed directions."""
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
) -> list[Row]:
    """Measure forward (merged or not) and backward at one size on the CUDA backend; on all backends if `with_torch`."""
    cuda, plain = backend_module("cuda"), backend_module("torch")
    t = inputs(b, n, c, dtype, len(codes))
    x, logits, lam, u = t
    summed = Scan(x, logits, lam, u, directions=codes)
    scans = {merge: summed._replace(merge_sum=merge == "sum") for merge in merges}
    calls: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {}
    for merge, scan in scans.items():
        count = size_of(*t, x if scan.merge_sum else u)
        calls[f"forward {merge}"] = (partial(cuda.forward, scan), partial(plain.forward, scan), count)
    _, *saved = cuda.forward_saving(summed)
    both = partial(cuda.backward, x, summed, *saved), partial(plain.backward, x, summed)
    calls["backward sum"] = (*both, size_of(*t, *t, x, *saved))
    times = medians({name: call[0] for name, call in calls.items()})
    rivals = medians({n_: call[1] for n_, call in calls.items()}, rounds=3, graph=False) if with_torch else {}
    portable: dict[str, float] = {}
    if with_torch and unsupported_reason("triton", x) is None:
        triton = backend_module("triton")  # its backward recomputes the forward
        runs: dict[str, Callable[[], object]] = {f"forward {m}": partial(triton.forward, s) for m, s in scans.items()}
        portable = medians({**runs, "backward sum": partial(triton.backward, x, summed)}, rounds=3)
    flop = flop_of(t, codes, "cuda")
    rows = []
    for name, (_, _, count) in calls.items():
        kind = name.split()[0]
        published = PUBLISHED.get((kind, n)) if (b, c, len(codes)) == (32, 64, 4) else None
        row: Row = {"B": b, "grid": n, "C": c, "dtype": str(dtype).removeprefix("torch."), "directions": len(codes)}
        row |= {"pass": name, "ms": times[name], "MB": count / 1e6, "GFLOP": flop / 1e9 if kind == "forward" else None}
        row["share of copy"] = count / copy / times[name] * 1e3
        for rival, ms in (("PyTorch", rivals.get(name)), ("Triton", portable.get(name)), ("NVlabs", published)):
            row[f"{rival} / this"] = ms / times[name] if ms else None
        rows.append(row)
    return rows


def line_scan_rows(copy: float) -> list[Row]:
    """Measure GSPN-2's published benchmark: [16, 1024, 1024, 8] float32, one direction."""
    cuda = backend_module("cuda")
    x, lam, dh = (torch.randn(16, 1024, 1024, 8, device="cuda") for _ in range(3))
    weights = torch.rand(16, 1024, 1024, 3, 8, device="cuda") / 3
    scan = given_scan(x, weights, lam)
    h = cuda.forward(scan)
    forward, backward = size_of(x, weights, lam, h), size_of(x, weights, lam, dh, h, x, weights, lam)
    calls: dict[str, Callable[[], object]] = {
        f"forward {name}": partial(cuda.forward, scan._replace(directions=(d,)))
        for d, name in enumerate(("down", "up", "right", "left"))
    }
    calls["backward down"] = partial(cuda.backward, dh, scan, h)
    rows = []
    for name, ms in medians(calls).items():
        kind = name.split()[0]
        count = forward if kind == "forward" else backward
        row: Row = {"pass": name, "ms": ms, "MB": count / 1e6, "share of copy": count / copy / ms * 1e3}
        rows.append(row | {"NVlabs / this": PUBLISHED_LINE[kind] / ms})
    return rows


def attention_rows(b: int, n: int, matmul: float) -> list[Row]:
    """Measure the forward of attention with 16 heads of 72 channels over the same grid, on both fused backends."""
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
        except RuntimeError as error:  # recorded if this backend does not support the inputs
            row |= {"ms": None, "share of matmul": None, "note": str(error).splitlines()[0][:80]}
        rows.append(row)
    return rows


def run(
    config: OperatorConfig, out: Path, device: torch.device, *, commit: str = "", say: Callable[[str], object] = print
) -> None:
    """Measure everything and write operator.json and operator.md to `out`.

    Raises RuntimeError without a CUDA GPU or if the CUDA backend cannot run.
    """
    if device.type != "cuda":
        raise RuntimeError("cgspn bench operator needs a CUDA GPU, and PyTorch sees none")
    reason = unsupported_reason("cuda", torch.zeros(1, 1, 1, 1, device="cuda"))
    if reason is not None:
        raise RuntimeError(f"the CUDA backend cannot run here: {reason}")
    copy, matmul, quick = copy_bandwidth(), matmul_rate(), config.quick
    ceilings = {"copy ceiling": f"{copy / 1e12:.3f} TB/s", "matmul ceiling": f"{matmul / 1e12:.0f} TFLOP/s"}
    say(", ".join(f"{name} {value}" for name, value in ceilings.items()))
    sizes = []
    for b, n in ((32, 74), (32, 147), (1, 74), (1, 147), (1, 294)):
        sizes += operator_rows(b, n, 64, copy, with_torch=not quick and n < 294)
        torch.cuda.empty_cache()
    for dtype in (torch.float16, torch.float32):
        sizes += operator_rows(32, 74, 64, copy, dtype=dtype)
    for codes in ([0], [2], [0, 1], [2, 3]):
        sizes += operator_rows(32, 74, 64, copy, codes=codes)
    torch.cuda.empty_cache()
    tables = {"sizes": sizes, "line scan [16, 1024, 1024, 8] float32": line_scan_rows(copy)}
    torch.cuda.empty_cache()
    pairs = ((32, 74), (1, 74), (1, 147)) if quick else ((32, 74), (32, 147), (1, 74), (1, 147))
    tables["attention, 16 heads of 72"] = [row for b, n in pairs for row in attention_rows(b, n, matmul)]
    write(out, "operator", describe(commit) | ceilings, tables)
