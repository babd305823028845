"""The C-GSPN mixer, and with other settings the original GSPN layer (source, "Key Designs" 1 and 2; design, section 3).

    tokens -> [projection] -> [expansion] -> P_down -> [local convolution] -> [norm] -> latent [and values] x
    latent -> lam, u, three logits [and a forget gate] for each direction
    x -> propagate_2d -> [norm] -> [+ x] -> P_up -> [projection]

Parts in brackets are switches of `PropagationConfig`. GSPN -> C-GSPN is a walk through them (`GSPN_WALK`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..ops import DIRECTIONS, fused, propagate_2d, propagate_2d_projected
from ..ops.autocast import lowered
from ..ops.projected_library import split_parameters
from .mixer import Grid, Mixer
from .mlp import unheard
from .norm import RMSNorm

EPS = 1e-6  # of the RMSNorms


MOST_EXPANSION, MOST_KERNEL = 64, 63


@dataclass(frozen=True)
class PropagationConfig:
    """What a propagation sub-layer contains. The defaults are C-GSPN.

    Args:
        compression: s; the scan runs on Cc = floor(C / s) channels. None scans in the raw space, without P_down.
        directions: which of the four scans run.
        merge: "sum" adds the directions before P_up (the source); "concat" gives P_up all of them.
        latent_norm: RMSNorm on the latent, before the parameters and the scan.
        merge_norm: RMSNorm on the merged scan; keeps features bounded however long the lines are.
        value_expansion: channels that carry values beside the latent, in units of Cc, dealt out to the directions: each
            scans its own, and the latent is left to make their parameters. None: all directions scan the latent (the
            source).
        channels_per_group: channels that have one set of parameters between them: 1 for a set each (the source).
        forget_gate: a forget gate: how much stays of the line before, for each position and set.
        normalise_state: divide the state by the same scan of ones: y = u * h / n, a weighted mean of what the scan has
            seen in place of a sum, so that it does not grow with the number of lines. lam then passes a softplus.
        local_kernel: size of a depthwise convolution on the latent, added to it; 0 for none.
        projections: GSPN's linear projections C -> C around everything.
        expansion: GSPN's channel expansion before propagation; 1 for none.
        inner_residual: GSPN's path around the scan.
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
        """Raise ValueError for settings that no width could have."""
        if not 0 < self.expansion <= MOST_EXPANSION:
            raise ValueError(f"expansion is {self.expansion}; accepted: more than 0, at most {MOST_EXPANSION}")
        if not 0 <= self.local_kernel <= MOST_KERNEL:
            raise ValueError(f"local_kernel is {self.local_kernel}; accepted: 0 to {MOST_KERNEL}")
        if self.channels_per_group < 1:
            raise ValueError(f"channels_per_group is {self.channels_per_group}; accepted: 1 or more")
        if self.value_expansion is not None and (self.compression is None or not self.value_expansion > 0):
            raise ValueError(
                f"value_expansion is {self.value_expansion}; accepted: None, or with a compression more than 0"
            )

    def latent_width(self, width: int) -> int:
        """Cc for tokens of `width` channels. Raises ValueError if nothing is left, or `channels_per_group` does not
        divide it."""
        latent = self._latent_width(width)
        if self.value_expansion is None and latent % self.channels_per_group:
            raise ValueError(
                f"channels_per_group is {self.channels_per_group}; a latent of {latent} channels accepts its divisors"
            )
        return latent

    def own_width(self, width: int) -> int:
        """Channels that a direction scans, for tokens of `width`: of values of its own, as many as whole sets need."""
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
    """C-GSPN with so many values for each channel of its latent, in sets of eight with a forget gate; None for none.

    What came closest to attention in results/quality: values want channels, parameters do not.
    """
    if values is None:
        return PropagationConfig()
    return PropagationConfig(value_expansion=values, channels_per_group=8, forget_gate=True)


# The published GSPN layer: raw space, the whole shell, directions summed. And the changes that lead from it to C-GSPN.
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


class Scans(TypedDict):
    """Arguments of `propagate_2d` that a config decides."""

    directions: tuple[str, ...]
    merge: str


class PropagationMixer(Mixer):
    """Four-direction line scan in a compressed latent space: tokens [B, h*w, C] -> [B, h*w, C], without positions.

    Linear in the number of tokens, any grid. Class or register tokens have no place in it.
    Source: design, section 3.

    Attributes:
        pieces: what runs around the scan, a backend of `cgspn.ops.fused`: "torch" for gradients of gradients.
    """

    pieces: Literal["auto", "triton", "torch"] = "auto"

    def __init__(self, width: int, config: PropagationConfig | None = None) -> None:
        """width: C. Raises ValueError if the compression leaves no channel."""
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
        self.scans_itself = type(self).propagate is not PropagationMixer.propagate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a small, bounded, slowly varying mixer.

        lam and u start near 0.5 and the neighbours near equal weight, whatever the input; P_up starts near zero, so
        that the first steps of distillation begin at "adds nothing" instead of exploding (design, "Quality is the
        open risk"). The scan adds up L lines, so without `merge_norm` its output grows with the grid.
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
            if self.config.forget_gate:  # sets that forget after a line beside sets that keep fifty
                bias[:, 5] = torch.linspace(4, -1, bias.shape[-1])
        nn.init.normal_(self.up.weight, std=0.02 * self.up.in_features**-0.5)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens [B, h*w, C] -> [B, h*w, C]. Raises ValueError for prefix tokens or a count that is not h*w."""
        _check_grid(tokens, grid)
        x, y = self.scan(self.down(self.expand(self.project_in(tokens))), grid)
        y = self.merge_norm(y)
        if self.config.inner_residual:
            y = y + self.as_merged(x)
        out: Tensor = self.project_out(self.up(y))
        return out

    def branch(self, tokens: Tensor, norm: nn.Module, grid: Grid) -> tuple[Tensor, Tensor]:
        """As in `Mixer`; where the fused pieces run, norm + P_down read the tokens once."""
        nothing = nn.Identity()
        if not self.fuses(norm, nothing, tokens):
            return super().branch(tokens, norm, grid)
        past, y, *_ = self.before_up(tokens, norm, nothing, grid)
        return self.up(self.merge_norm(y)), past

    def residual(self, tokens: Tensor, norm: nn.Module, scale: nn.Module, grid: Grid) -> Tensor:
        """As in `Mixer`; where the fused pieces run, norm + P_down and P_up + residual read the tokens once each."""
        if not self.fuses(norm, scale, tokens):
            return super().residual(tokens, norm, scale, grid)
        return fused.linear_residual(*self.before_up(tokens, norm, scale, grid), backend=self.pieces)

    def residual_norm(
        self, tokens: Tensor, norm: nn.Module, scale: nn.Module, grid: Grid, following: nn.Module, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As in `Mixer`, at the end of `residual` where the fused pieces run."""
        if not self.fuses(norm, scale, tokens) or not isinstance(following, nn.LayerNorm):
            return super().residual_norm(tokens, norm, scale, grid, following, after)
        affine = (following.weight, following.bias, following.eps)
        parts = self.before_up(tokens, norm, scale, grid)
        return fused.linear_residual_norm(*parts, affine, after, backend=self.pieces)

    def before_up(
        self, tokens: Tensor, norm: nn.LayerNorm, scale: nn.Module, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float]:
        """Everything up to P_up: tokens, the merged directions and what `fused.linear_residual` makes of them."""
        _check_grid(tokens, grid)
        down, up = self.down, self.up
        assert isinstance(down, nn.Linear)
        latent, tokens = fused.norm_linear_past(
            tokens, norm.weight, norm.bias, down.weight, down.bias, norm.eps, backend=self.pieces
        )
        _, y = self.scan(latent, grid)
        return tokens, y, gain_of(self.merge_norm), up.weight, up.bias, getattr(scale, "gamma", None), EPS

    def fuses(self, norm: nn.Module, scale: nn.Module, tokens: Tensor) -> TypeGuard[nn.LayerNorm]:
        """Whether the fused pieces are wanted, and the sub-layer holds nothing but what they know.

        "auto" wants them where they suit the tokens and stand for plain layers that nobody listens to.
        """
        config = self.config
        shell = config.projections or config.inner_residual or config.expansion != 1 or config.compression is None
        known = not shell and isinstance(norm, nn.LayerNorm)
        known = known and (isinstance(scale, nn.Identity) or hasattr(scale, "gamma"))
        if self.pieces != "auto" or not known:
            return self.pieces == "triton" and known
        plain = type(self.down) is nn.Linear and type(self.up) is nn.Linear
        parts = (self, norm, scale, self.down, self.up, self.merge_norm)
        kept = lowered(tokens) in (None, tokens.dtype)  # not to run in more precision than autocast would
        return plain and kept and unheard(*parts) and fused.suits(tokens, self.up.in_features)

    def scan(self, latent: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """latent, what P_down makes [B, h*w, K] -> what is scanned [B, h*w, Cc or D * own], and the merged directions
        before their norm."""
        batch, count, channels = latent.shape
        x = latent.view(batch, grid.height, grid.width, channels)
        x = self.localise(x, grid.mask)
        if self.config.value_expansion is None:
            values, y = x, self.scan_latent(x, grid.mask)
        else:
            maker, values = x.flatten(0, 2).split([self.latent, channels - self.latent], -1)
            if torch.compiler.is_exporting():  # which would ask of slices whether sizes are 1
                maker, values = (t.clone(memory_format=torch.contiguous_format) for t in (maker, values))
            own = values.unflatten(0, x.shape[:3]).unflatten(-1, (len(self.config.directions), self.value_width))
            # a slice of a matrix is multiplied where it lies
            made = self.param_proj(maker).unflatten(0, x.shape[:3])
            y = self.propagate(own, *self.split(made), mask=grid.mask)
        return values.reshape(batch, count, -1), y.reshape(batch, count, -1)

    def scan_latent(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All directions over x [B, H, W, Cc]: [B, H, W, D, Cc], or their sum [B, H, W, Cc]."""
        if self.shows_parameters(x):
            return self.propagate(x, *self.split(self.param_proj(x)), mask=mask)
        return propagate_2d_projected(x, self.param_proj.weight, self.param_proj.bias, mask=mask, **self.scans())

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits, lam, u and keep of what the projection makes: [B, H, W, D * made * own / share]."""
        if not self.config.forget_gate:
            return *split_parameters(packed, len(self.config.directions)), None
        each = packed.unflatten(-1, (len(self.config.directions), self.params_per_direction, -1))
        lam, u, logits, keep = each.split([1, 1, 3, 1], -2)
        return logits, lam.squeeze(-2), u.squeeze(-2), keep.squeeze(-2)

    def as_merged(self, x: Tensor) -> Tensor:
        """What was scanned, [B, N, Cc or D * own], laid out as the merged directions."""
        count = len(self.config.directions)
        if self.config.value_expansion is not None:
            return x if self.config.merge == "concat" else x.unflatten(-1, (count, self.value_width)).sum(-2)
        return torch.cat([x] * count, -1) if self.config.merge == "concat" else x

    def shows_parameters(self, x: Tensor) -> bool:
        """Whether `param_proj` has to be called: for a hook on it, a subclass with a `propagate` of its own, an
        exported program, and where x is not on a GPU, which alone can keep them from memory."""
        hooked = self.param_proj._forward_pre_hooks or self.param_proj._forward_hooks
        config = self.config
        plain = not x.is_cuda or self.scans_itself or config.channels_per_group > 1 or config.forget_gate
        return plain or config.normalise_state or bool(hooked) or torch.compiler.is_exporting()

    def localise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The local convolution, added to its input, then the norm: [B, H, W, Cc] -> the same."""
        kernel, bias = (None, None) if self.local is None else (self.local.weight, self.local.bias)
        return fused.local_norm(x, kernel, bias, gain_of(self.norm), EPS, mask, backend=self.pieces)

    def propagate(
        self, x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, keep: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`propagate_2d` in the config's directions, merged by its rule: [B, H, W, own] or [B, H, W, D, own]."""
        if self.config.normalise_state:
            return propagate_mean(x, logits, lam, u, keep, mask, **self.scans())
        return propagate_2d(x, logits, lam, u, keep=keep, mask=mask, **self.scans())

    def scans(self) -> Scans:
        """The config's directions, and how the operator merges them."""
        return {"directions": self.config.directions, "merge": "none" if self.config.merge == "concat" else "sum"}


def propagate_mean(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    directions: tuple[str, ...],
    merge: str,
) -> Tensor:
    """u * h / n: h the scan of softplus(lam) * x, n that of softplus(lam) alone, with the same logits and gates.

    Shapes as in `propagate_2d`.
    """
    lam = softplus(lam)
    ones = torch.ones_like(lam)
    total = propagate_2d(ones, logits, lam, ones, keep=keep, mask=mask, directions=directions, merge="none")
    y = propagate_2d(x, logits, lam, u, keep=keep, mask=mask, directions=directions, merge="none")
    # padding has no total; its y is 0 too
    y = (y.unflatten(-1, (lam.shape[-1], -1)) / total.clamp(min=1e-6).unsqueeze(-1)).flatten(-2)
    return y if merge == "none" else y.sum(-2)


def gain_of(norm: nn.Module) -> Tensor | None:
    """The gain of an RMSNorm; None of a norm that is switched off."""
    return norm.weight if isinstance(norm, nn.RMSNorm) else None


def _check_grid(tokens: Tensor, grid: Grid) -> None:
    if grid.prefix or tokens.shape[1] != grid.tokens:
        raise ValueError(
            f"tokens has {tokens.shape[1]} tokens with {grid.prefix} before the grid; "
            f"propagation accepts exactly {grid.height} x {grid.width} grid tokens"
        )
