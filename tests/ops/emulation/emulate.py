"""The CUDA backend on the host: its kernels compiled by g++, one fiber a CUDA thread, behind the launches of gpu.py.

Everything from the public function down to the packed arguments is what runs on a GPU; only hardware.cuh differs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cgspn.ops.cuda import compile as compiling
from cgspn.ops.cuda import scan
from cgspn.ops.cuda.compile import Macros
from cgspn.ops.gpu import Launch, Machine, registered

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SMALL_HOPPER = Machine(4, 227 * 1024, True)  # few SMs, so that small tests see what fills a large machine
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
    """A kernel of ops/cuda/kernels for the host."""

    def __init__(self, name: str, entry: str, defines: Macros) -> None:
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


kernel = functools.cache(Kernel)


class Schedule:
    """The order of threads and the moment at which copies land, which must not matter."""

    order = 0
    eager = False


class EmulatedGpu:
    """Stands for gpu.Gpu: kernels are those of g++, a launch runs them at once."""

    index, capability, arch, machine, runs_triton = -1, (9, 0), "host", SMALL_HOPPER, False
    computes = True

    def load(self, name: str, entry: str, defines: Macros, shared: int) -> Kernel:
        assert shared <= SMALL_HOPPER.shared_bytes
        return kernel(name, entry, defines)

    def compiler_reason(self) -> None:
        return None

    def product(self, *arguments: object, **options: object) -> None:
        return None

    def is_current(self) -> bool:
        return True

    def stream(self) -> int:
        return 0

    def submission(self, launch: Launch, stream: int) -> Callable[[], None]:
        return functools.partial(self.submit, launch)

    def submit(self, launch: Launch) -> None:
        grid, _, _, threads, _, _, shared = launch.shape
        k = launch.function
        arguments = [ctypes.c_int(grid), ctypes.c_int(threads), ctypes.c_int(k.parts), ctypes.c_longlong(shared)]
        done = k.run(*arguments, launch.params, ctypes.c_int(Schedule.order), ctypes.c_int(Schedule.eager))
        assert done, "threads wait for ever"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `backend="cuda"` run on the CPU, in memory that starts as NaN."""
    monkeypatch.setattr(scan, "empty", lambda shape, like: torch.full(tuple(shape), float("nan"), dtype=like.dtype))
    with registered(torch.device("cpu"), EmulatedGpu()):
        yield
    Schedule.order, Schedule.eager = 0, False
