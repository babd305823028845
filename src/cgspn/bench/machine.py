"""Peak rates of a machine."""

from __future__ import annotations

import gc

import torch

from .timing import medians


def free(device: torch.device) -> None:
    """Free unreferenced GPU memory before the next measurement."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


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
