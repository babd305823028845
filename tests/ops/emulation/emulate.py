"""The CUDA backend on the host: its kernels compiled by g++, one fiber a CUDA thread, behind the launches of launch.py.

Everything from the public function down to the packed arguments is what runs on a GPU; only hardware.cuh differs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cgspn.ops.cuda import compile as compiling
from cgspn.ops.cuda import launch, projected, scan
from cgspn.ops.cuda.compile import Macros
from cgspn.ops.cuda.plan import Machine

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SMALL_HOPPER = Machine(4, 227 * 1024, True)  # few processors, so that small tests see what fills a large machine
HERE = Path(__file__).parent


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where libraries are built; removed when Python ends."""
    return tempfile.TemporaryDirectory(prefix="cgspn-emulation-")


def source(name: str) -> str:
    """kernels/`name`.cu with the host's hardware.cuh in the place of the GPU's."""
    text = compiling.source(name)
    real = (Path(compiling.__file__).parent / "kernels" / "hardware.cuh").read_text()
    assert text.count(real) == 1
    return text.replace(real, (HERE / "hardware.cuh").read_text())


class Kernel:
    """Stands for compile.Kernel."""

    def __init__(self, name: str, entry: str, defines: Macros, arch: str) -> None:
        self.parts = dict(defines).get("SPLIT", 1)
        text = source(name) + f"\nEMULATE({entry})\n"
        flags = [f"-D{key}={value}" for key, value in defines]
        stem = Path(folder().name) / hashlib.sha256((text + repr(flags)).encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(text)
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
        command = ["g++", *options, *flags, str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[:4000]
        self.run = ctypes.CDLL(str(stem.with_suffix(".so"))).emulate

    def allow_shared(self, amount: int, device: int) -> None:
        assert amount <= SMALL_HOPPER.shared_bytes


kernel = functools.cache(Kernel)


class Schedule:
    """The order of threads and the moment at which copies land, which must not matter."""

    order = 0
    eager = False


def launch_kernel(k: Kernel, grid: int, threads: int, shared: int, stream: int, *values: ctypes.Array) -> None:
    """Stands for launch.launch_kernel."""
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    arguments = [ctypes.c_int(grid), ctypes.c_int(threads), ctypes.c_int(k.parts), ctypes.c_longlong(shared), pointers]
    assert k.run(*arguments, ctypes.c_int(Schedule.order), ctypes.c_int(Schedule.eager)), "threads wait for ever"


@contextmanager
def no_stream(device: int) -> Iterator[int]:
    yield 0


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `backend="cuda"` run on the CPU, in memory that starts as NaN."""
    for module in (launch, projected):
        monkeypatch.setattr(module, "kernel", kernel)
        monkeypatch.setattr(module, "launch_kernel", launch_kernel)
        monkeypatch.setattr(module, "current_stream", no_stream)
        monkeypatch.setattr(module, "machine", lambda device: SMALL_HOPPER)
        monkeypatch.setattr(module, "architecture", lambda device: "host")
    monkeypatch.setattr(scan, "unsupported_reason", lambda x: None)
    monkeypatch.setattr("cgspn.ops.cuda.unsupported_reason", lambda x: None)
    monkeypatch.setattr(scan, "empty", lambda shape, like: torch.full(tuple(shape), float("nan"), dtype=like.dtype))
    launch.prepare.cache_clear()
    yield
    Schedule.order, Schedule.eager = 0, False
    launch.prepare.cache_clear()
