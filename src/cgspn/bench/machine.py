"""What a measurement ran on, and what that machine can do at best."""

from __future__ import annotations

import gc
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from .. import __version__
from .timing import medians


def commit() -> str:
    """The commit of the checkout this package runs from, "+" if it has changes, or "unknown" outside one."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a repository around an installed package is no source
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(commit_name: str = "") -> dict[str, str]:
    """Command, machine, versions, commit and time of a measurement."""
    return {
        "command": shlex.join(["cgspn", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "cgspn": __version__,
        "commit": commit_name or commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The processor's name and how many threads PyTorch uses."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def free(device: torch.device) -> None:
    """Give back what is no longer referred to, so that the next measurement finds the memory empty."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_bandwidth(size: int = 1 << 30, device: str = "cuda") -> float:
    """Bytes a second of a copy of `size` bytes within the memory of a device, read and written counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2e3 * size / medians({"copy": lambda: target.copy_(source)}, graph=False)["copy"]


def matmul_rate(n: int = 8192, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations a second of a product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2e3 * n**3 / medians({"matmul": lambda: a @ b}, graph=False)["matmul"]


def ceilings(device: torch.device) -> dict[str, str]:
    """What the device can do at best, for the head of a table: copy bandwidth and matmul rate."""
    if device.type == "cuda":
        copy, matmul, kind = copy_bandwidth(), matmul_rate(), "bfloat16"
    else:
        copy, matmul, kind = copy_bandwidth(1 << 26, "cpu"), matmul_rate(1024, "cpu", torch.float32), "float32"
    return {
        "copy ceiling": f"{copy / 1e12:.3f} TB/s",
        "matmul ceiling": f"{matmul / 1e12:.3g} TFLOP/s, {kind}",
    }
