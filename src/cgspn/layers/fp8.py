"""FP8 MLPs (float8_e4m3fn) for inference. Weights are quantised once, tokens in each call.

Each row of a weight and each token has its own scale. The scale of a hidden token is known before it is computed: no
channel can exceed |x| times the norm of the longest row of fc1 (Cauchy-Schwarz), and a scale that is too large costs no
precision, because floating-point precision is relative. So GELU and rounding are part of fc1, and the residual addition
is part of fc2. Devices without these kernels compute the same values in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
Model = TypeVar("Model", bound=nn.Module)


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """The reason why `device` cannot multiply FP8 matrices, so that FP8 is emulated in float32; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type!r} has no float8_e4m3fn products with hardware tile copies (TMA)"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has no hardware tile copies (TMA)"
    return backends.unsupported_reason("triton", torch.empty(0, device=device))


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] to FP8 [M, K] and row scales, float32 [M, 1]; their product approximates x."""
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True).clamp_min(TINY)
    return (wide * (LARGEST / most)).to(FP8), most / LARGEST


def activated(x: Tensor, act: Activation) -> Tensor:
    """The named activation of x, in the dtype of x."""
    out: Tensor = activation(act)(x)
    return out


def plain_product(x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, both FP8 with row scales [M, 1] and [N, 1], in float32."""
    return (x.float() @ weight.float().T) * scales * weight_scales.T


def _eight_bits_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format)


@torch.library.custom_op("cgspn::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor, steep: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x [M, K]: values, row scales and hidden scales (steep * norm(row) + offset) / LARGEST, [M, 1] each."""
    if unsupported_reason(x.device) is not None:
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


def _product(
    x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, ahead: Tensor | None,
    out: Tensor, act: str,
) -> None:  # fmt: skip
    """Launch a matrix product. With `act` its activation is written to `out`, otherwise it is added to `out`."""
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
    """The activation of a linear layer, in FP8 with the hidden scales `ahead` [M, 1]: [M, K] -> [M, N].

    x and weight are as in `plain_product`.
    """
    if unsupported_reason(x.device) is not None:
        hidden = plain_product(x, scales, weight, weight_scales) + bias.float()
        return (activated(hidden, act) * ahead.reciprocal()).to(FP8)  # type: ignore[arg-type]
    out = x.new_empty(x.shape[0], weight.shape[0])
    _product(x, scales, weight, weight_scales, bias, ahead, out, act)
    return out


@torch.library.custom_op("cgspn::fp8_linear_onto", mutates_args=("tokens",))
def fp8_linear_onto(tokens: Tensor, x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> None:
    """tokens [M, N] += the product of x and weight, in one launch."""
    if unsupported_reason(x.device) is not None:
        tokens += plain_product(x, scales, weight, weight_scales).to(tokens.dtype)
    else:
        _product(x, scales, weight, weight_scales, None, None, tokens, "")


def _fake_rows(x: Tensor, steep: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    row = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return _eight_bits_like(x), row, torch.empty_like(row)


fp8_rows.register_fake(_fake_rows)
fp8_linear_activate.register_fake(lambda x, _, weight, *__: x.new_empty(x.shape[0], weight.shape[0]))
_ops = torch.ops.cgspn
register_flops(lambda x, _, w, *__: 2 * x[0] * x[1] * w[0], _ops.fp8_linear_activate)
register_flops(lambda _, x, __, w, *___: 2 * x[0] * x[1] * w[0], _ops.fp8_linear_onto)


class Fp8Linear(nn.Module):
    """A linear layer with an FP8 weight and a scale for each row.

    It cannot be saved: `state_dict` raises RuntimeError.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """layer: [K] -> [N] with a bias. Raises ValueError for other layers and widths not divisible by 16."""
        super().__init__()
        if not is_plain(layer, nn.Linear):
            kind = type(layer).__name__
            raise ValueError(f"a layer of type {kind}, or with hooks; FP8 products accept nn.Linear")
        for width in layer.weight.shape:
            if width % UNIT:
                raise ValueError(f"a width of {width}; FP8 products accept multiples of {UNIT}")
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
        raise RuntimeError("an FP8 MLP is only for inference: save the encoder before `quantize_mlps`")


class Fp8Mlp(nn.Module):
    """An FP8 version of `Mlp`: [..., C] -> [..., C], in the dtype of its input, without gradients."""

    def __init__(self, mlp: Mlp) -> None:
        """mlp: with any activation except SwiGLU, which has no useful bound.

        Raises ValueError for SwiGLU, for layers that are not nn.Linear, and for widths that are not multiples of 16.
        """
        super().__init__()
        if not is_plain(mlp, Mlp):
            raise ValueError(f"an MLP of type {type(mlp).__name__}, or with hooks; accepted for FP8: a plain Mlp")
        if mlp.act_name == "swiglu":
            raise ValueError("the MLP has 'swiglu'; accepted for FP8: 'gelu', 'gelu_tanh', 'quick_gelu'")
        self.act_name: Activation = mlp.act_name
        self.fc1, self.fc2 = Fp8Linear(mlp.fc1), Fp8Linear(mlp.fc2)
        longest = (self.fc1.weight.float() * self.fc1.scales).norm(dim=1).max()
        self.steep, self.offset = LONGER * float(longest), float(self.fc1.bias.abs().max())

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]. Raises RuntimeError if a gradient is required."""
        out = self.fc2.bias.to(x.dtype).expand(x.shape[:-1].numel(), -1).clone()
        self.adder(x)(out)
        return out.unflatten(0, x.shape[:-1])

    def adder(self, x: Tensor) -> Callable[[Tensor], object]:
        """Like `Mlp.adder`: a function that adds the MLP of x [..., C], without its last bias, to tokens [M, C]."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("an FP8 MLP has no gradients: run it under torch.no_grad() or inference_mode()")
        first, second = self.fc1, self.fc2

        def add_(tokens: Tensor) -> None:
            values, scales, ahead = fp8_rows(x.flatten(0, -2), self.steep, self.offset)
            hidden = fp8_linear_activate(values, scales, first.weight, first.scales, first.bias, ahead, self.act_name)
            fp8_linear_onto(tokens, hidden, ahead, second.weight, second.scales)

        return add_


def quantize_mlps(model: Model) -> Model:
    """Quantise the MLP of every block of an encoder to FP8, in place, for inference. It cannot be saved.

    Works for attention and C-GSPN blocks. The MLP of a MAP head, which processes one token, is not changed.
    `unsupported_reason(device)` says why FP8 is not faster on a device: the kernels need Triton, and Hopper or later.

    Raises ValueError for an MLP that `Fp8Mlp` does not support, before anything is changed.
    """
    from .block import Block

    blocks = [block for block in model.modules() if isinstance(block, Block) and not is_plain(block.mlp, Fp8Mlp)]
    for block, mlp in [(block, Fp8Mlp(block.mlp)) for block in blocks]:
        block.mlp = mlp.train(block.training)  # type: ignore[assignment]
    return model
