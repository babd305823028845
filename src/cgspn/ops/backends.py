"""The choice of a backend, made once for each device, dtype and requested backend.

A backend is a module with the functions `forward`, `backward`, `line_scan_forward` and `line_scan_backward` (signatures
as in torch_scan.py). Unless it runs everywhere, it also has `unsupported_reason(device, dtype, gpu) -> str | None`. A
backend whose backward pass needs more than the inputs also has `forward_saving`, which returns the output and two
tensors of `saved_shapes`; its `backward` takes those two as its last arguments. To add a backend, add a module here and
a line in PREFERENCE; the tests then cover it.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, check_tensor
from .gpu import Gpu, gpu_of

# "auto" tries them in this order. The PyTorch backend is last because it runs everywhere.
PREFERENCE: dict[str, str] = {"cuda": "cuda.scan", "triton": "triton_scan", "torch": "torch_scan"}


class Choice(NamedTuple):
    """The result of `explain_backend`: the backend that runs, and why each faster one does not."""

    backend: str
    passed_over: dict[str, str]


@functools.cache
def _imported(name: str) -> ModuleType | str:
    """The module of a backend, or the reason why it cannot be imported. The import is tried once per process."""
    try:
        return importlib.import_module(f".{PREFERENCE[name]}", __package__)
    except ImportError as error:
        return f"not importable here: {error}"


def backend_module(name: str) -> ModuleType:
    """The module of a backend. Raises ImportError with the reason if it cannot be imported."""
    found = _imported(name)
    if isinstance(found, str):
        raise ImportError(found)
    return found


@functools.lru_cache(maxsize=256)
def _reason(name: str, device: torch.device, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    module = _imported(name)
    if isinstance(module, str):
        return module
    reason: str | None = getattr(module, "unsupported_reason", lambda *_: None)(device, dtype, gpu)
    return reason


def unsupported_reason(name: str, x: Tensor) -> str | None:
    """The reason why backend `name` cannot run on `x` ([B, H, W, C]), or None if it can."""
    return _reason(name, x.device, x.dtype, gpu_of(x.device))


def explain_backend(x: Tensor) -> Choice:
    """Say which backend `backend="auto"` runs for features `x` [B, H, W, C], and why the faster ones do not run.

    Raises TypeError if `x` is not a tensor or has an unsupported dtype, and RuntimeError for a CUDA tensor in a process
    that was forked after CUDA was initialised.
    """
    check_tensor(x)
    return _choose(x)


def _choose(x: Tensor) -> Choice:
    passed_over: dict[str, str] = {}
    for name in PREFERENCE:
        reason = unsupported_reason(name, x)
        if reason is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise AssertionError("the PyTorch backend runs everywhere")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or a name in PREFERENCE."""
    check_choice("backend", backend, ("auto", *PREFERENCE))


def backend_for(backend: str, x: Tensor) -> ModuleType:
    """The backend module for `x`: the requested one, or for "auto" the first in PREFERENCE that can run.

    Raises RuntimeError with the reason if the requested backend cannot run.
    """
    if backend == "auto":
        return backend_module(_choose(x).backend)
    reason = unsupported_reason(backend, x)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return backend_module(backend)
