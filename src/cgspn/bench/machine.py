"""What a measurement ran on, and what that machine can do at best."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime

import torch

from .. import __version__
from .timing import medians


def commit() -> str:
    """The commit of the working tree, "+" if it has changes, or "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(commit_name: str = "") -> dict[str, str]:
    """Command, machine, versions, commit and time of a measurement."""
    return {
        "command": shlex.join(["cgspn", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "cgspn": __version__,
        "commit": commit_name or commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second of a device-to-device copy of `size` bytes, read and written counted."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2e3 * size / medians({"copy": lambda: target.copy_(source)}, graph=False)["copy"]


def matmul_rate(n: int = 8192) -> float:
    """Floating-point operations a second of a bfloat16 product of two n x n matrices."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * n**3 / medians({"matmul": lambda: a @ b}, graph=False)["matmul"]
