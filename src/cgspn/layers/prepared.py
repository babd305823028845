"""A C-GSPN block in inference with its launches prepared: what the host does for one image is then a few comparisons,
one piece of memory for all that lies between, and the launches.

Made of what the fused path launched when it ran with tensors of the same shapes. Only addresses change.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..compat import addmm_activation
from ..ops.gpu import Launch
from .mixer import Grid
from .mlp import Mlp
from .norm import RMSNorm
from .plain import is_plain
from .propagation import PropagationMixer

if TYPE_CHECKING:
    from .block import Block

LAUNCHES = 7  # two foldings of weights, norm and P_down, convolution, scan, P_up and residual, norm
INSIDE = 5  # tensors of a scan that makes its parameters itself; another has nine


def can_prepare(block: Block) -> bool:
    """Whether a block whose state allows all fusions has the parts that a `PreparedBlock` knows: the default ones."""
    mixer: Any = block.mixer
    config = mixer.config
    groups = config.channels_per_group == 1 and config.value_expansion is None and config.merge == "concat"
    gates = config.forget_gate or config.normalise_state
    own = type(mixer).propagate is PropagationMixer.propagate and type(mixer).scan is PropagationMixer.scan
    norms = is_plain(mixer.norm, RMSNorm) and is_plain(mixer.merge_norm, RMSNorm)
    parts = norms and mixer.local is not None and is_plain(mixer.param_proj, nn.Linear) and is_plain(block.mlp, Mlp)
    return groups and not gates and own and parts and len(config.directions) > 1


class PreparedBlock:
    """Launches for tokens of one shape. `run` gives what the block gives, or None where something has changed."""

    def __init__(self, block: Block, tokens: Tensor, grid: Grid, launches: list[Launch]) -> None:
        """launches: those of a pass with the same tokens and grid."""
        mixer: Any = block.mixer
        mlp: Any = block.mlp
        self.launches, self.inside = launches, len(launches[3].slots) == INSIDE
        latent, channels, merged = int(mixer.latent), tokens.shape[-1], mixer.up.in_features
        rows, size = tokens.numel() // channels, tokens.element_size()
        self.shape, self.latent, self.step = tokens.shape, latent, latent * size
        sizes = [latent * channels * size, 8 * latent, rows * latent * size, rows * latent * size * self.inside]
        sizes += [rows * merged * size, channels * merged * size, 4 * channels]
        self.offsets: list[int] = []
        self.bytes = 0
        for amount in sizes:
            self.offsets.append(self.bytes)
            self.bytes += -(-amount // 256) * 256
        modules = (block.norm1, mixer.down, mixer.local, mixer.norm, mixer.param_proj, mixer.merge_norm, mixer.up)
        held = [[m.weight, m.bias] for m in (*modules, block.norm2, mlp.fc1, mlp.fc2) if not isinstance(m, RMSNorm)]
        gamma = getattr(block.scale1, "gamma", None)
        self.tensors: list[Any] = [*chain.from_iterable(held), mixer.norm.weight, mixer.merge_norm.weight]
        self.tensors += [] if gamma is None else [gamma]
        self.scaled, self.dtype, self.device = gamma is not None, tokens.dtype, tokens.device
        # what is in another dtype or place, or not contiguous, never looks like this
        self.looks = [(t.shape, tokens.dtype, tokens.device, True) for t in self.tensors]

    def _look(self) -> list[Any]:
        return [(t.shape, t.dtype, t.device, t.is_contiguous()) for t in self.tensors]

    def run(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """tokens of the shape and dtype of those at preparation, contiguous -> the block's output."""
        if self._look() != self.looks or not tokens.is_contiguous() or (mask is not None and not mask.is_contiguous()):
            return None
        addresses = [t.data_ptr() for t in self.tensors]
        here, within = tokens.data_ptr(), 0 if mask is None else mask.data_ptr()
        bits = here
        for address in addresses:
            bits |= address
        if bits & 15:
            return None
        gain1, shift1, down, down_bias, kernel, kernel_bias, made, made_bias, up, up_bias = addresses[:10]
        gain2, shift2, _, _, _, after, gain, merged_gain = addresses[10:18]
        scale = addresses[18] if self.scaled else 0
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        base = memory.data_ptr()
        folded, sums, latent, x_here, y, folded_up, offset = [base + o for o in self.offsets]
        out, normal = torch.empty_like(tokens), torch.empty_like(tokens)
        out_here, normal_here = out.data_ptr(), normal.data_ptr()
        fold, project, local, scan, fold_up, residual, norm = self.launches
        fold((gain1, shift1, down, down_bias, folded, sums))
        project((here, folded, sums, latent, 0))
        if self.inside:
            local((latent, kernel, kernel_bias, gain, within, x_here))
            scan((x_here, made, made_bias, within, y))
        else:
            weight, bias = self.tensors[6], self.tensors[7]
            x = torch.empty((tokens.numel() // self.shape[-1], self.latent), dtype=self.dtype, device=self.device)
            local((latent, kernel, kernel_bias, gain, within, x.data_ptr()))
            packed = linear(x, weight, bias)
            lam, step = packed.data_ptr(), self.step
            scan((x.data_ptr(), lam, lam + step, lam + 2 * step, 0, y, 0, within, 0))
        fold_up((up, merged_gain, up_bias, scale, after, folded_up, offset))
        residual((here, y, folded_up, offset, out_here))
        norm((out_here, gain2, shift2, after, normal_here))
        del memory
        first, bias1, second = self.tensors[12], self.tensors[13], self.tensors[14]
        channels = self.shape[-1]
        hidden = addmm_activation(bias1, normal.view(-1, channels), first.t(), use_gelu=True)
        out.view(-1, channels).addmm_(hidden, second.t())
        return out
