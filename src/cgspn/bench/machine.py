"""Peak rates of a machine."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from .timing import medians


def free(device: torch.device) -> None:
    """Free unreferenced GPU memory before the next measurement."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak gigabytes that one call allocates; None on a CPU.

    Raises torch.OutOfMemoryError if it does not fit.
    """
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def fitting(make: Callable[[int], Callable[[], object]], batch: int, device: torch.device) -> tuple[int, float | None]:
    """The largest batch, by halving, whose step fits, and the gigabytes that it allocates; 0 if none fits."""
    while batch:
        step = None
        try:
            step = make(batch)
            return batch, peak_memory(step, device)
        except torch.OutOfMemoryError:
            batch //= 2
        finally:
            step = None  # frees the model
            free(device)
    return 0, None


def copy_bandwidth(size: int = 1 << 30, device: str = "cuda") -> float:
    """Bandwidth in bytes/s of a copy of `size` bytes within a device's memory, counting reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2e3 * size / medians({"copy": lambda: target.copy_(source)}, graph=False)["copy"]


def matmul_rate(n: int = 8192, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, rounds: int = 9) -> float:
    """FLOP/s of a product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2e3 * n**3 / medians({"matmul": lambda: a @ b}, rounds=rounds, graph=False)["matmul"]


def ceilings(device: torch.device) -> dict[str, str]:
    """The peak rates of the device for the head of a table: copy bandwidth and matmul rate."""
    if device.type == "cuda":
        copy, matmul, kind = copy_bandwidth(), matmul_rate(), "bfloat16"
    else:
        copy, matmul, kind = copy_bandwidth(1 << 26, "cpu"), matmul_rate(1024, "cpu", torch.float32), "float32"
    return {"copy ceiling": f"{copy / 1e12:.3f} TB/s", "matmul ceiling": f"{matmul / 1e12:.3g} TFLOP/s, {kind}"}
