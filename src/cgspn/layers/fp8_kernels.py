"""Triton kernels of FP8 MLPs: quantisation, and products with an activation or residual addition.

Shape letters: M rows (tokens), K channels in, N channels out. Sums are float32. Row offsets are 64 bits wide, so that
tensors may exceed 2^31 elements. 448 is the largest number of float8_e4m3fn.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(x, ACT: tl.constexpr):
    """The named activation in float32."""
    if ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    # x * sigmoid(s) with exp2(-s log2(e)); the tanh form of GELU has s = 2 sqrt(2 / pi) (x + ...)
    s = 2.302208198 * (x + 0.044715 * x * x * x) if ACT == "gelu_tanh" else 2.455466945 * x
    return x / (1 + tl.exp2(-s))


@triton.jit
def _eight_bits(x, inverse, kind):
    return (x * inverse[:, None]).to(kind)  # scales cover every value, so no clamp is needed


@triton.jit(do_not_specialize=["rows", "steep", "offset"])
def quantize_rows(x, out, scales, ahead, rows, K, steep, offset, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [M, K] -> FP8, the scale of each row, and `ahead`: a scale for each row of the layer's output."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHANNELS)
    inside = m < rows
    at, here = m[:, None] * K + k[None, :], inside[:, None] & (k < K)[None, :]
    tile = tl.load(x + at, mask=here, other=0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(tile), 1), 1e-30)
    tl.store(out + at, _eight_bits(tile, 448.0 / most, out.dtype.element_ty), mask=here)
    tl.store(scales + m, most / 448.0, mask=inside)
    reach = tl.sqrt(tl.sum(tile * tile, 1)) * steep + offset
    tl.store(ahead + m, tl.maximum(reach, 1e-30) / 448.0, mask=inside)


@triton.jit(do_not_specialize=["M"])
def product(
    a, b, a_scales, b_scales, bias, ahead, out, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
    ACT: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """a [M, K] b [N, K]^T of FP8 operands; ACT: activate and quantise again; ONTO: add to `out` in place.

    a, b and an FP8 output are TMA descriptors, which pad with zeros. Each program takes every PROGRAMS-th tile. The
    tiles of one row are consecutive, so that a is read once.
    """
    across = tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * across, PROGRAMS, flatten=True):
        row, column = (tile // across) * ROWS, (tile % across) * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        m, n = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        total *= tl.load(a_scales + m, mask=m < M, other=0)[:, None]
        total *= tl.load(b_scales + n, mask=n < N, other=0)[None, :]
        if ONTO:
            # rounded like PyTorch's product, which halves the bytes to rearrange for the sum
            at, here = m.to(tl.int64)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
            before = tl.load(out + at, mask=here, other=0)
            tl.store(out + at, before + total.to(before.dtype), mask=here)
        else:
            total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
            inverse = 1 / tl.load(ahead + m, mask=m < M, other=1)
            out.store([row, column], _eight_bits(_activated(total, ACT), inverse, out.dtype))
