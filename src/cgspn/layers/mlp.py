"""The MLP half of a block, the same for every mixer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x * (1.702 * x).sigmoid()


class SwiGLU(nn.Module):
    """silu(a) * b of the two halves of the channels: [..., 2 hidden] -> [..., hidden]. In DINOv2's largest."""

    def forward(self, x: Tensor) -> Tensor:
        """The gate comes first."""
        gate, value = x.chunk(2, -1)
        return silu(gate) * value


def activation(name: Activation) -> nn.Module:
    """The module behind an activation's name. Raises ValueError for an unknown one."""
    if name == "gelu":
        return nn.GELU()
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if name == "quick_gelu":
        return QuickGELU()
    if name == "swiglu":
        return SwiGLU()
    raise ValueError(f"activation is {name!r}; accepted: 'gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'")


class Mlp(nn.Module):
    """Two linear layers with an activation between: [..., C] -> [..., out or C]."""

    def __init__(self, width: int, hidden: int, act: Activation = "gelu", out: int | None = None) -> None:
        """width: C; hidden: inner width; out: output width, C if None. Raises ValueError for an unknown activation."""
        super().__init__()
        self.act_name = act
        self.fc1 = nn.Linear(width, 2 * hidden if act == "swiglu" else hidden)  # both halves of a gate in one
        self.act = activation(act)
        self.fc2 = nn.Linear(hidden, out or width)
        nn.init.normal_(self.fc1.weight, std=width**-0.5)
        nn.init.normal_(self.fc2.weight, std=0.5 * hidden**-0.5)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] (or `out`)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out

    def onto(self, x: Tensor, tokens: Tensor) -> Tensor:
        """`tokens` [..., C] + the MLP of x without its last bias, in place: the products do bias, GELU and sum.

        Without gradients, for a GELU by tanh, the one that the product's epilogue knows.
        """
        hidden = gelu_linear(x.flatten(0, -2), self.fc1)
        tokens.flatten(0, -2).addmm_(hidden, self.fc2.weight.T)
        return tokens


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU (tanh) of a linear layer, x [M, C] -> [M, K]: in one launch where cuBLAS has the epilogue for it."""
    if x.is_cuda:
        fused: Tensor = torch._addmm_activation(layer.bias, x, layer.weight.T, use_gelu=True)
        return fused
    return gelu(layer(x), approximate="tanh")
