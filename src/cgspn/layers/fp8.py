"""FP8 MLPs (float8_e4m3fn) for inference. Weights are quantised once, tokens in each call.

Each row of a weight and each token has its own scale. The scale of a hidden token is known before it is computed: no
channel can exceed |x| times the norm of the longest row of fc1 (Cauchy-Schwarz), and a scale that is too large costs no
precision, because floating-point precision is relative. So GELU and rounding take one pass, or are part of fc1. CPUs
and GPUs without FP8 products compute the same values in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..compat import private
from ..ops import backends
from ..ops.library import register_flops
from .mlp import Activation, Mlp, activation
from .plain import is_plain

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-30  # scale of a row of zeros
LONGER = 1 + 2.0**-4  # most growth of a token's norm by rounding to four significant bits
UNIT = 16  # widths must be multiples of this
TILE = (128, 256, 128)  # rows, columns and depth of the Triton products; these do not spill registers
Products = Literal["library", "triton"]
Model = TypeVar("Model", bound=nn.Module)


def unsupported_reason(device: torch.device) -> str | None:
    """The reason why `device` has no FP8 products, so that rounded values are multiplied in float32; None if it has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type!r} has no products of float8_e4m3fn in PyTorch that scale rows"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no products of 8 bits"
    return None


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] to FP8 [M, K] and row scales, float32 [M, 1]; their product approximates x."""
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True).clamp_min(TINY)
    return (wide * (LARGEST / most)).to(FP8), most / LARGEST


def activated(x: Tensor, act: Activation) -> Tensor:
    """The named activation of x, in the dtype of x."""
    out: Tensor = activation(act)(x)
    return out


def _no_kernels(x: Tensor) -> str | None:
    return unsupported_reason(x.device) or backends.unsupported_reason("triton", x.new_empty(0, dtype=torch.float32))


def _eight_bits_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format)


@torch.library.custom_op("cgspn::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor, steep: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x [M, K]: FP8 values, row scales [M, 1], and the scales (steep |row| + offset) / LARGEST, [M, 1]."""
    if _no_kernels(x) is not None:
        reach = x.float().norm(dim=1, keepdim=True) * steep + offset
        return *rounded_rows(x), reach.clamp_min(TINY) / LARGEST
    from . import fp8_kernels

    x = x.contiguous()
    (rows, width), values = x.shape, _eight_bits_like(x)
    scales, ahead = (x.new_empty(rows, 1, dtype=torch.float32) for _ in range(2))
    wide = 1 << (width - 1).bit_length()
    tile = max(1, 4096 // wide)
    with torch.cuda.device(x.device):
        fp8_kernels.quantize_rows[((rows + tile - 1) // tile,)](
            x, values, scales, ahead, rows, width, steep, offset, ROWS=tile, CHANNELS=wide, num_warps=4
        )
    return values, scales, ahead


@torch.library.custom_op("cgspn::fp8_activate", mutates_args=())
def fp8_activate(x: Tensor, scales: Tensor, act: str) -> Tensor:
    """The activation of x [M, K] in FP8 with the given scales [M, 1]."""
    if _no_kernels(x) is not None:
        return (activated(x.float(), act) * scales.reciprocal()).to(FP8)  # type: ignore[arg-type]
    from . import fp8_kernels

    x = x.contiguous()
    (rows, width), out = x.shape, _eight_bits_like(x)
    with torch.cuda.device(x.device):
        fp8_kernels.activate[((rows + 7) // 8, (width + 511) // 512)](
            x, scales, out, rows, width, ROWS=8, CHANNELS=512, ACT=act, num_warps=4
        )
    return out


@torch.library.custom_op("cgspn::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [M, K] times weight [N, K] transposed, both FP8 with row scales [M, 1] and [N, 1]."""
    if unsupported_reason(x.device) is not None:
        out = (x.float() @ weight.float().T) * scales * weight_scales.T
        return (out if bias is None else out + bias.float()).to(dtype)
    short = torch.bfloat16  # the only output dtype for row scales in every version
    options = {"bias": None if bias is None else bias.to(short), "out_dtype": short, "use_fast_accum": True}
    return private("_scaled_mm")(x, weight.T, scale_a=scales, scale_b=weight_scales.T, **options).to(dtype)


def _product(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, ahead: Tensor | None,
    out: Tensor, act: str,
) -> None:  # fmt: skip
    """Launch a product that writes its activation to `out`, or without `act` adds to it."""
    reason = _no_kernels(x)
    if reason is None and torch.cuda.get_device_capability(x.device) < (9, 0):
        reason = f"{torch.cuda.get_device_name(x.device)} has no engine that copies tiles"
    if reason is not None:
        raise RuntimeError(f"products 'triton' cannot run here: {reason}")
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-not-found,unused-ignore]

    from . import fp8_kernels

    rows, columns, depth = TILE
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    a, b = TensorDescriptor.from_tensor(x, [rows, depth]), TensorDescriptor.from_tensor(weight, [columns, depth])
    target = TensorDescriptor.from_tensor(out, [rows, columns]) if act else out
    with torch.cuda.device(x.device):
        fp8_kernels.product[(programs,)](
            a, b, scales, weight_scales, bias, ahead, target, x.shape[0], weight.shape[0], x.shape[1], *TILE, programs,
            ACT=act, ONTO=not act, num_warps=8, num_stages=3,
        )  # fmt: skip


@torch.library.custom_op("cgspn::fp8_linear_activate", mutates_args=())
def fp8_linear_activate(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor, ahead: Tensor, act: str
) -> Tensor:
    """`fp8_activate` of `fp8_linear` in one launch. Hidden tokens are written only in FP8."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _product(x, scales, weight, weight_scales, bias, ahead, out, act)
    return out


@torch.library.custom_op("cgspn::fp8_linear_onto", mutates_args=("tokens",))
def fp8_linear_onto(tokens: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> None:
    """tokens [M, N] += `fp8_linear` without a bias, in one launch."""
    _product(x, scales, weight, weight_scales, None, None, tokens, "")


def _fake_rows(x: Tensor, steep: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    row = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return _eight_bits_like(x), row, torch.empty_like(row)


fp8_rows.register_fake(_fake_rows)
fp8_activate.register_fake(lambda x, *_: _eight_bits_like(x))
fp8_linear.register_fake(lambda x, _, weight, *rest: x.new_empty(x.shape[0], weight.shape[0], dtype=rest[-1]))
fp8_linear_activate.register_fake(lambda x, _, weight, *__: x.new_empty(x.shape[0], weight.shape[0]))
_ops = torch.ops.cgspn
register_flops(lambda x, _, w, *__: 2 * x[0] * x[1] * w[0], _ops.fp8_linear, _ops.fp8_linear_activate)
register_flops(lambda _, x, __, w, *___: 2 * x[0] * x[1] * w[0], _ops.fp8_linear_onto)


class Fp8Linear(nn.Module):
    """A linear layer with an FP8 weight and a scale for each row.

    It cannot be saved: `state_dict` raises RuntimeError.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """layer: [K] -> [N] with a bias. Raises ValueError for any other layer, or for widths that are no multiples of
        16."""
        super().__init__()
        if not is_plain(layer, nn.Linear):
            kind = type(layer).__name__
            raise ValueError(f"a layer of type {kind}, or with hooks; products of 8 bits take nn.Linear")
        for width in layer.weight.shape:
            if width % UNIT:
                raise ValueError(f"a width of {width}; products of 8 bits take multiples of {UNIT}")
        weight, scales = rounded_rows(layer.weight.detach())
        for name, value in (("weight", weight), ("scales", scales), ("bias", layer.bias.detach().clone())):
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Apply device changes but not dtype changes: a cast would round the scales and dequantise the weight."""
        weight, scales = self.weight, self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight, self.scales = weight.to(self.weight.device), scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RuntimeError("an MLP in 8 bits is for inference alone: save the encoder before `quantize_mlps`")

    def forward(self, x: Tensor, scales: Tensor, dtype: torch.dtype, bias: bool = True) -> Tensor:
        """FP8 [M, K] with scales [M, 1] -> [M, N] in `dtype`."""
        out: Tensor = fp8_linear(x, scales, self.weight, self.scales, self.bias if bias else None, dtype)
        return out


class Fp8Mlp(nn.Module):
    """An FP8 version of `Mlp`: [..., C] -> [..., C], in the dtype of its input, without gradients."""

    def __init__(self, mlp: Mlp, products: Products = "library") -> None:
        """mlp: with any activation except SwiGLU, which has no useful bound; products: as in `quantize_mlps`.

        Raises ValueError for SwiGLU, for layers that are not nn.Linear, and for widths that are no multiples of 16.
        """
        super().__init__()
        if not is_plain(mlp, Mlp):
            raise ValueError(f"an MLP of type {type(mlp).__name__}, or with hooks; accepted in 8 bits: a plain Mlp")
        if mlp.act_name == "swiglu":
            raise ValueError("the MLP has 'swiglu'; accepted in 8 bits: 'gelu', 'gelu_tanh', 'quick_gelu'")
        self.act_name: Activation = mlp.act_name
        self.products: Products = products
        self.fc1, self.fc2 = Fp8Linear(mlp.fc1), Fp8Linear(mlp.fc2)
        longest = (self.fc1.weight.float() * self.fc1.scales).norm(dim=1).max()
        self.steep, self.offset = LONGER * float(longest), float(self.fc1.bias.abs().max())

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]. Raises RuntimeError if a gradient is required."""
        return self._through(x, bias=True).unflatten(0, x.shape[:-1])

    def adder(self, x: Tensor) -> Callable[[Tensor], object]:
        """Like `Mlp.adder`: a function that adds the MLP of x [..., C], without its last bias, to tokens [M, C]."""

        def add_(tokens: Tensor) -> None:
            if self.products == "library":
                tokens.add_(self._through(x, bias=False))
            else:
                fp8_linear_onto(tokens, *self._hidden(x), self.fc2.weight, self.fc2.scales)

        return add_

    def _through(self, x: Tensor, bias: bool) -> Tensor:
        out: Tensor = self.fc2(*self._hidden(x), x.dtype, bias)
        return out

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("an MLP in 8 bits has no gradients: run it under torch.no_grad() or inference_mode()")
        values, scales, ahead = fp8_rows(x.flatten(0, -2), self.steep, self.offset)
        if self.products == "library":
            return fp8_activate(self.fc1(values, scales, x.dtype), ahead, self.act_name), ahead
        first = self.fc1
        return fp8_linear_activate(values, scales, first.weight, first.scales, first.bias, ahead, self.act_name), ahead


def quantize_mlps(model: Model, *, products: Products = "library") -> Model:
    """Quantise the MLP of every block of an encoder to FP8 in place and return the encoder, for inference without
    saving.

    Works for attention and C-GSPN blocks. The MLP of a MAP head, which processes one token, is not changed.
    `unsupported_reason(device)` says why FP8 is not faster on a device.

    Args:
        model: an encoder, or any module that contains blocks.
        products: "library" uses torch._scaled_mm and a separate GELU. "triton" fuses GELU and the residual addition
            into the matrix products; it is faster and needs Hopper or later. Both give the same numbers up to the order
            of sums and one rounding to 16 bits.

    Raises ValueError for other `products` or an MLP that `Fp8Mlp` does not support, before anything is changed.
    """
    from .block import Block

    if products not in get_args(Products):
        raise ValueError(f"products is {products!r}; accepted: 'library', 'triton'")
    blocks = [block for block in model.modules() if isinstance(block, Block) and not is_plain(block.mlp, Fp8Mlp)]
    for block, mlp in [(block, Fp8Mlp(block.mlp, products)) for block in blocks]:
        block.mlp = mlp.train(block.training)  # type: ignore[assignment]
    return model
