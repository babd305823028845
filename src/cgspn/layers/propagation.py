"""The C-GSPN mixer, and with other settings the original GSPN layer (docs/paper.md).

    tokens -> [projection] -> [expansion] -> P_down -> [local convolution] -> [norm] -> latent [and values] x
    latent -> lam, u, three logits [and a forget gate] for each direction
    x -> propagate_2d -> [norm] -> [+ x] -> P_up -> [projection]

Parts in brackets are options of `PropagationConfig`. `GSPN_WALK` lists the steps from GSPN to C-GSPN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..ops import DIRECTIONS, replay
from ..ops.arguments import ProjectedScan, Scan, split_parameters
from ..ops.gpu import on_accelerator
from ..ops.projected import projected_unchecked
from ..ops.propagate import scan_unchecked
from .mixer import Grid, Mixer
from .norm import RMSNorm
from .plain import has_global_hooks, is_plain

EPS = 1e-6  # of the RMSNorms


MOST_EXPANSION, MOST_KERNEL = 64, 63


@dataclass(frozen=True)
class PropagationConfig:
    """Settings of a propagation mixer. The defaults are C-GSPN.

    Args:
        compression: s in the paper; the scan runs on Cc = floor(C / s) channels. None scans all C channels, without
            P_down.
        directions: the scan directions.
        merge: "sum" adds the directions before P_up (as in the paper); "concat" concatenates them.
        latent_norm: RMSNorm on the latent, before the parameters and the scan.
        merge_norm: RMSNorm on the merged scan, which keeps features bounded on long lines.
        value_expansion: number of scanned channels over all directions, as a multiple of Cc. Each direction scans its
            own channels, and the latent is only used to compute the parameters. None: all directions scan the latent
            (as in the paper).
        channels_per_group: number of channels that share scan parameters; 1 in the paper.
        forget_gate: add a forget gate, which scales the previous line for each position and parameter group.
        normalise_state: divide the state by the same scan over ones, y = u * h / n. The state is then a weighted mean
            and does not grow with the number of lines. lam is computed with a softplus.
        local_kernel: kernel size of a depthwise convolution on the latent, added to it; 0 for none.
        projections: add GSPN's outer linear projections C -> C.
        expansion: factor of GSPN's channel expansion before propagation; 1 for none.
        inner_residual: add GSPN's residual connection around the scan.
    """

    compression: float | None = 18
    directions: tuple[str, ...] = DIRECTIONS
    merge: Literal["sum", "concat"] = "concat"
    value_expansion: float | None = None
    channels_per_group: int = 1
    forget_gate: bool = False
    latent_norm: bool = True
    merge_norm: bool = True
    normalise_state: bool = False
    local_kernel: int = 3
    projections: bool = False
    expansion: float = 1
    inner_residual: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for settings that are invalid for every width."""
        if not 0 < self.expansion <= MOST_EXPANSION:
            raise ValueError(f"expansion is {self.expansion}; accepted: more than 0, at most {MOST_EXPANSION}")
        if not 0 <= self.local_kernel <= MOST_KERNEL:
            raise ValueError(f"local_kernel is {self.local_kernel}; accepted: 0 to {MOST_KERNEL}")
        if not self.directions or len({*self.directions}) < len(self.directions) or {*self.directions} - {*DIRECTIONS}:
            raise ValueError(f"directions is {self.directions}; accepted: one or more of {DIRECTIONS}, each once")
        if self.channels_per_group < 1:
            raise ValueError(f"channels_per_group is {self.channels_per_group}; accepted: 1 or more")
        if self.value_expansion is not None and (self.compression is None or not self.value_expansion > 0):
            raise ValueError(
                f"value_expansion is {self.value_expansion}; accepted: None, or with a compression more than 0"
            )

    @property
    def codes(self) -> list[int]:
        """Indices of the directions in DIRECTIONS."""
        return [DIRECTIONS.index(name) for name in self.directions]

    def latent_width(self, width: int) -> int:
        """The latent width Cc. Raises ValueError if it is 0 or not a multiple of the group size."""
        latent = self._latent_width(width)
        if self.value_expansion is None and latent % self.channels_per_group:
            raise ValueError(
                f"channels_per_group is {self.channels_per_group}; a latent of {latent} channels accepts its divisors"
            )
        return latent

    def own_width(self, width: int) -> int:
        """Number of channels that each direction scans, in whole groups, for tokens of `width` channels."""
        latent = self.latent_width(width)
        if self.value_expansion is None:
            return latent
        group = self.channels_per_group
        return math.ceil(self.value_expansion * latent / len(self.directions) / group) * group

    def _latent_width(self, width: int) -> int:
        expanded = int(width * self.expansion)
        if self.compression is None:
            return expanded
        if not self.compression >= 1 / MOST_EXPANSION or int(width / self.compression) < 1:
            raise ValueError(
                f"compression is {self.compression}; a width of {width} accepts {1 / MOST_EXPANSION} to {width}"
            )
        return int(width / self.compression)


def value_config(values: float | None) -> PropagationConfig:
    """Return the settings of C-GSPN with separate values: `value_expansion` times the latent width, in groups of eight
    channels, with a forget gate and a normalised state. None returns the default C-GSPN.

    A sub-layer with these settings is closest to attention (results/quality). A normalised state is better at every
    size, most at sizes that were not used in training (results/resolution).
    """
    if values is None:
        return PropagationConfig()
    return PropagationConfig(value_expansion=values, channels_per_group=8, forget_gate=True, normalise_state=True)


# The published GSPN layer (no compression, the whole shell, summed directions), and the steps from it to C-GSPN.
GSPN = PropagationConfig(
    compression=None, merge="sum", latent_norm=False, projections=True, expansion=2, inner_residual=True
)
GSPN_WALK: dict[str, PropagationConfig] = {
    "GSPN": GSPN,
    "- inner residual": replace(GSPN, inner_residual=False),
    "- linear projections": replace(GSPN, inner_residual=False, projections=False),
    "- channel expansion": replace(GSPN, inner_residual=False, projections=False, expansion=1),
    "+ latent space (C-GSPN)": replace(PropagationConfig(), merge="sum"),
    "+ concatenated directions": PropagationConfig(),
}


class PropagationMixer(Mixer):
    """Four-direction line scan in a compressed latent space: tokens [B, h*w, C] -> [B, h*w, C].

    Its cost is linear in the number of tokens. It works on any grid, but not with class or register tokens.
    Paper: propagation in the latent space; docs/paper.md.
    """

    def __init__(self, width: int, config: PropagationConfig | None = None) -> None:
        """width: C, the number of channels per token. Raises ValueError if the compression leaves no channel."""
        super().__init__()
        self.config = config = config or PropagationConfig()
        expanded, latent = int(width * config.expansion), config.latent_width(width)
        self.latent = latent
        self.project_in = nn.Linear(width, width) if config.projections else nn.Identity()
        self.expand = nn.Linear(width, expanded) if config.expansion != 1 else nn.Identity()
        self.value_width = own = config.own_width(width)
        count = len(config.directions)
        narrow = latent if config.value_expansion is None else latent + count * own
        self.down = nn.Linear(expanded, narrow) if config.compression is not None else nn.Identity()
        self.local = (
            nn.Conv2d(narrow, narrow, config.local_kernel, padding=config.local_kernel // 2, groups=narrow)
            if config.local_kernel
            else None
        )
        self.norm = RMSNorm(narrow, eps=EPS) if config.latent_norm else nn.Identity()
        # per position: [D, 5 or 6, own / share] = lam, u, the three logits and the forget gate of each direction
        self.params_per_direction = 5 + config.forget_gate
        self.param_proj = nn.Linear(latent, count * self.params_per_direction * (own // config.channels_per_group))
        merged = own * (count if config.merge == "concat" else 1)
        self.merge_norm = RMSNorm(merged, eps=EPS) if config.merge_norm else nn.Identity()
        self.up = nn.Linear(merged, width)
        self.project_out = nn.Linear(width, width) if config.projections else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights for a small, bounded output.

        lam and u start near 0.5 and the neighbours have nearly equal weights. P_up starts near zero, so that the
        sub-layer adds almost nothing at first and distillation does not diverge (docs/paper.md, "Initialisation").
        Without `merge_norm`, the output grows with the number of lines.
        """
        for module in (self.project_in, self.expand, self.down, self.project_out):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        if self.local is not None:
            nn.init.normal_(self.local.weight, std=0.02)
            if self.local.bias is not None:
                nn.init.zeros_(self.local.bias)
        nn.init.normal_(self.param_proj.weight, std=0.1 * self.latent**-0.5)
        with torch.no_grad():
            bias = self.param_proj.bias.view(len(self.config.directions), self.params_per_direction, -1)
            bias.zero_()
            bias[:, :2] = 0.5
            if self.config.forget_gate:  # some groups forget after one line, others remember fifty
                bias[:, 5] = torch.linspace(4, -1, bias.shape[-1])
        nn.init.normal_(self.up.weight, std=0.02 * self.up.in_features**-0.5)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, h*w, C] -> [B, h*w, C]. Raises ValueError for prefix tokens or a count that is not h*w."""
        check_grid(tokens, grid)
        latent = self.down(self.expand(self.project_in(tokens)))
        x = self.localise(latent.view(tokens.shape[0], grid.height, grid.width, latent.shape[-1]), grid.mask)
        x, y = self.scan(x, grid.mask)
        y = self.merge_norm(y)
        if self.config.inner_residual:
            y = y + self.as_merged(x)
        out: Tensor = self.project_out(self.up(y))
        return out

    @property
    def keeps_its_parts(self) -> bool:
        """Whether the mixer is only P_down, convolution, norm, scan and P_up, in the usual order."""
        config = self.config
        shell = config.projections or config.inner_residual or config.expansion != 1 or config.compression is None
        kind = type(self)
        own = kind.forward is PropagationMixer.forward and kind.localise is PropagationMixer.localise
        return own and not shell

    def scan(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalised latent [B, h, w, K] -> the scanned features [B, h*w, Cc or D * value_width], and the merged
        directions before their norm [B, h*w, ...]."""
        batch, height, width, channels = x.shape
        if self.config.value_expansion is None:
            values, y = x, self.scan_latent(x, mask)
        else:
            maker, values = x.flatten(0, 2).split([self.latent, channels - self.latent], -1)
            if torch.compiler.is_exporting():  # slices would add guards on sizes of 1
                maker, values = (t.clone(memory_format=torch.contiguous_format) for t in (maker, values))
            own = values.view(batch, height, width, len(self.config.directions), self.value_width)
            # a slice of a matrix needs no copy
            made = replay.project(self.param_proj, maker)
            made = made.view(batch, height, width, made.shape[-1])
            y = self.propagate(own, *self.split(made), mask=mask)
        return values.reshape(batch, height * width, values.shape[-1]), y.flatten(1, 2).flatten(2)

    def scan_latent(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Scan x [B, H, W, Cc] in all directions: [B, H, W, D, Cc], or their sum [B, H, W, Cc]."""
        if not self.can_project_inside(x):
            return self.propagate(x, *self.split(replay.project(self.param_proj, x)), mask=mask)
        made, config = self.param_proj, self.config
        return projected_unchecked(ProjectedScan(x, made.weight, made.bias, mask, config.codes, config.merge == "sum"))

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Split the output of `param_proj`, [B, H, W, D * (5 or 6) * groups], into logits, lam, u and keep."""
        if not self.config.forget_gate:
            return *split_parameters(packed, len(self.config.directions)), None
        each = packed.unflatten(-1, (len(self.config.directions), self.params_per_direction, -1))
        lam, u, logits, keep = each.split([1, 1, 3, 1], -2)
        return logits, lam.squeeze(-2), u.squeeze(-2), keep.squeeze(-2)

    def as_merged(self, x: Tensor) -> Tensor:
        """The scanned features [B, N, Cc or D * value_width] in the layout of the merged directions."""
        count = len(self.config.directions)
        if self.config.value_expansion is not None:
            return x if self.config.merge == "concat" else x.unflatten(-1, (count, self.value_width)).sum(-2)
        return torch.cat([x] * count, -1) if self.config.merge == "concat" else x

    def can_project_inside(self, x: Tensor) -> bool:
        """Whether the operator may compute the parameters: on GPUs, with a plain `param_proj`, not in export."""
        config = self.config
        plain = config.channels_per_group == 1 and not config.forget_gate and not config.normalise_state
        inside = plain and on_accelerator(x) and type(self).propagate is PropagationMixer.propagate
        inside = inside and not torch.compiler.is_exporting()
        return inside and is_plain(self.param_proj, nn.Linear) and not has_global_hooks()

    def localise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The local convolution, added to its input, then the norm: [B, H, W, Cc] -> the same."""
        if self.local is not None:
            if mask is not None:
                x = x.masked_fill(~mask[..., None], 0.0)
            x = x + self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = self.norm(x)
        return out

    def propagate(
        self, x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, keep: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`propagate_2d` with the config's directions and merge: [B, H, W, (D,) value_width]."""
        if self.config.normalise_state:
            lam = replay.pointwise(softplus, torch.ops.aten.softplus.out, lam).to(x.dtype)  # autocast gives float32
        config, summed = self.config, self.config.merge == "sum"
        scan = Scan(x, logits, lam, u, keep, mask, config.codes, summed, normalise_state=config.normalise_state)
        return scan_unchecked(scan)


def check_grid(tokens: Tensor, grid: Grid) -> None:
    """Raise ValueError unless tokens [B, N, C] match the grid and have no class or register tokens."""
    if grid.prefix or tokens.shape[1] != grid.tokens:
        raise ValueError(
            f"tokens has {tokens.shape[1]} tokens with {grid.prefix} before the grid; "
            f"propagation accepts exactly {grid.height} x {grid.width} grid tokens"
        )
