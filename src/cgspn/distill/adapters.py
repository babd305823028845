"""Adapters: small MLPs on the student's side of each tap, only for training."""

from torch import Tensor, nn

from ..layers import LayerNorm, Mlp
from ..layers.norm import add_norm
from ..layers.plain import is_plain
from ..ops.fused.rows import can_use_rows


class Adapter(nn.Module):
    """x + MLP(norm(x)), initialised as the identity: [B, N, C] -> [B, N, C]. Paper: adapters (docs/paper.md)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, width)
        nn.init.zeros_(self.mlp.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        normal, x = add_norm(self.norm, x, fused=can_use_rows(x) and is_plain(self.norm, LayerNorm))
        out: Tensor = x + self.mlp(normal)
        return out


class Adapters(nn.Module):
    """One adapter per tap of an encoder with `depth` blocks, or the identity for disabled taps.

    The last block has none at its output, because that is the input of the encoder's final norm.
    """

    def __init__(self, depth: int, width: int, *, sublayers: bool, blocks: bool) -> None:
        """depth: number of blocks; width: C; sublayers, blocks: whether PP and PB taps have adapters."""
        super().__init__()

        def make(n: int) -> nn.ModuleList:
            return nn.ModuleList(Adapter(width) if i < n else nn.Identity() for i in range(depth))

        self.sublayers, self.blocks = make(depth if sublayers else 0), make(depth - 1 if blocks else 0)
