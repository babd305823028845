"""Compile and load kernels with NVRTC (through cuda.core), with a cache of cubins on disk.

This needs no nvcc, headers or host compiler. A cubin's file name is a hash of everything it depends on (source,
options, architecture, compiler version). Files are created by an atomic rename, so two processes that start together
compile the same kernel twice at worst.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import ModuleType

DIGEST = 32  # bytes of a SHA-256
Macros = tuple[tuple[str, int], ...]
_importing = threading.Lock()


def macros(values: Mapping[str, int]) -> Macros:
    """Macros as a sorted, hashable tuple, the form that `kernel` takes."""
    return tuple(sorted(values.items()))


def cuda_core() -> ModuleType:
    """Import cuda.core under a lock, because concurrent first imports fail. Raises ImportError."""
    with _importing:
        import cuda.core

        return cuda.core


@functools.cache
def source(name: str) -> str:
    """The text of kernels/`name`.cu with its includes expanded."""
    folder = files(__package__) / "kernels"

    def expand(file: str) -> str:
        text = (folder / file).read_text()
        return re.sub(r'^#include "(.+)"$', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(f"{name}.cu")


@functools.cache
def compiler_version() -> str:
    """NVRTC's version. Raises ImportError without cuda.core, and RuntimeError if NVRTC does not load."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"NVRTC does not load: {status}")
    return f"{major}.{minor}"


@functools.cache
def supported_architectures() -> frozenset[str]:
    """The architectures that NVRTC can compile for, such as "sm_90". Raises the errors of `compiler_version`."""
    from cuda.bindings import nvrtc

    compiler_version()
    status, found = nvrtc.nvrtcGetSupportedArchs()
    if int(status) != 0:
        raise RuntimeError(f"NVRTC does not report its architectures: {status}")
    return frozenset(f"sm_{number}" for number in found)


def cache_folder() -> Path:
    """Folder of compiled kernels: $XDG_CACHE_HOME/cgspn/kernels, by default ~/.cache/cgspn/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cgspn" / "kernels"


def compile_cubin(name: str, defines: Macros, arch: str) -> tuple[bytes, str]:
    """Compile kernels/`name`.cu for `arch` ("sm_90"). Returns the cubin and the report on registers and spills.

    Needs NVRTC but no GPU or driver. Raises cuda.core's NVRTCError with the log if the source does not compile.
    """
    core = cuda_core()
    given = [(key, str(value)) for key, value in defines]
    options = core.ProgramOptions(f"{name}.cu", arch, std="c++17", define_macro=given, ptxas_options=["-v"])
    report = io.StringIO()
    code = core.Program(source(name), "c++", options).compile("cubin", logs=report).code
    assert isinstance(code, bytes)
    return code, report.getvalue()


def cubin(name: str, defines: Macros, arch: str) -> bytes:
    """`compile_cubin` with the cache on disk.

    A file begins with the SHA-256 of the code after it; a damaged file is compiled again. If the folder is not
    writable, the next process compiles again.
    """
    key = "\n".join([source(name), repr(defines), arch, compiler_version()])
    path = cache_folder() / f"{name}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    with suppress(OSError):
        if path.is_file():
            digest, code = (content := path.read_bytes())[:DIGEST], content[DIGEST:]
            if digest == hashlib.sha256(code).digest():
                return code
    code, _ = compile_cubin(name, defines, arch)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:  # write a temporary file and rename it
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return code


class Kernel:
    """A kernel loaded on every device of one architecture; `handle` is the driver's function handle."""

    def __init__(self, name: str, entry: str, defines: Macros, arch: str) -> None:
        core = cuda_core()
        self._object = core.ObjectCode.from_cubin(cubin(name, defines, arch))  # keeps the library loaded
        self.handle = int(self._object.get_kernel(entry).handle)
        self._shared: dict[int, int] = {}

    def allow_shared(self, amount: int, device: int) -> None:
        """Allow blocks of this kernel `amount` bytes of dynamic shared memory on a device."""
        from cuda.bindings import driver

        if amount <= max(48 * 1024, self._shared.get(device, 0)):
            return
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, amount, driver.CUkernel(self.handle), device)
        if int(status) != 0:
            raise RuntimeError(f"CUDA driver: {status!r}")
        self._shared[device] = amount


@functools.cache
def kernel(name: str, entry: str, defines: Macros, arch: str) -> Kernel:
    """The loaded kernel, compiled at its first use. Thread-safe: at worst it is loaded twice."""
    return Kernel(name, entry, defines, arch)
