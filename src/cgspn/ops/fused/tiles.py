"""Helpers of the fused ops: cached launches, tile sizes, and second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu import Gpu, gpu_of
from ..triton_launch import TritonLaunch

ROWS = 64  # rows of a tile of norm and P_down; fewer are slower even if most of the GPU is idle
PARTS = 264  # programs that share the reduction over rows: two per SM of the largest GPUs


@functools.lru_cache(maxsize=4096)
def _prepared(
    name: str, gpu: Gpu | None, grid: tuple[int, ...], numbers: tuple[int | float, ...], constants: tuple[Any, ...],
    dtypes: tuple[torch.dtype | None, ...],
) -> TritonLaunch:  # fmt: skip
    from . import kernels, row_kernels

    kernel = getattr(kernels, name, None) or getattr(row_kernels, name)
    return TritonLaunch(kernel, gpu, grid, numbers, **dict(constants))


def launch(
    name: str, tensors: Sequence[Tensor | None], grid: tuple[int, ...], numbers: tuple[int | float, ...],
    **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel of kernels.py or row_kernels.py. The prepared launch is cached for calls with the same dtypes.

    The kernel's arguments are the tensors, then the numbers, then the constants, which include Triton's options.
    """
    assert tensors[0] is not None
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    _prepared(name, gpu_of(tensors[0].device), grid, numbers, tuple(constants.items()), dtypes)(*tensors)


def tile(size: int, least: int = 16) -> int:
    """The next power of two that is not less than `size`."""
    return max(least, 1 << (size - 1).bit_length())


def weight_channels(latent: int, dtype: torch.dtype, most: int) -> int:
    """Channels of a weight tile [channels, latent] of at most `most` bytes, so that several tiles fit on chip."""
    return max(16, min(64, most // (tile(latent) * dtype.itemsize)))


def is_large(gpu: Gpu | None, dtype: torch.dtype, generations: tuple[int, ...] = (9, 10)) -> bool:
    """Whether tiles have 16-bit elements and the GPU gives a program 200 KB of shared memory."""
    return gpu is not None and dtype.itemsize < 4 and gpu.capability[0] in generations


def plain_gradients(plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor) -> list[Tensor | None]:
    """Gradients of `plain` at `inputs` that can be differentiated again; None for an input without gradient."""
    with torch.enable_grad():
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        y = plain(*inputs)
        found = iter(torch.autograd.grad(y, wanted, dout.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
