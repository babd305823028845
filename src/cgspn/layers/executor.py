"""How a block runs: layer by layer, or fused where nobody could tell the difference. This is the one place to decide.

A layer is read past, instead of called, only if it is plain (plain.py); then a kernel of `cgspn.ops.fused` may do its
work together with its neighbours'. Traced, transformed and intercepted programs keep the layers, which every compiler,
exporter and counter knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype
from ..ops.backends import unsupported_reason
from ..ops.eager import is_eager
from ..ops.fused import linear_residual, local_norm, norm_linear
from ..ops.fused.rows import CHANNELS_MOST, DTYPES
from ..ops.gpu import gpu_of
from .fp8 import Fp8Mlp
from .mixer import Grid
from .mlp import Mlp
from .norm import LayerNorm, RMSNorm, add_norm
from .plain import has_global_hooks, has_no_hooks, is_plain
from .propagation import PropagationMixer, check_grid

if TYPE_CHECKING:
    from .block import Block

LATENT_MOST = 256  # channels beyond which products are left to the libraries, which are then faster
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # GPUs with the 140 KB of shared memory that the latent's tiles want


class Fusion(NamedTuple):
    """What of a block runs fused: each norm with the sums beside it, the mixer up to its residual, the MLP onto it."""

    norm1: bool = False
    norm2: bool = False
    mixer: bool = False
    mlp: bool = False


NOTHING = Fusion()


def fusion_of(block: Block, tokens: Tensor) -> Fusion:
    """What runs fused for the state in which block, tokens and PyTorch are.

    Raises RuntimeError where `block.fusion_backend` asks for what cannot run.
    """
    wanted = block.fusion_backend
    if wanted == "torch" or (wanted == "auto" and tokens.is_cpu) or not is_eager(tokens):
        return NOTHING
    if tokens.dtype not in DTYPES or autocast_dtype(tokens) not in (None, tokens.dtype):
        return NOTHING  # nothing in more or less precision than the layers alone would have
    if has_global_hooks() or not tokens.numel():
        return NOTHING
    reason = unsupported_reason("triton", tokens)
    if reason is not None and wanted == "triton":
        raise RuntimeError(f"fusion_backend is 'triton', which cannot run here: {reason}")
    norm1, norm2 = (reason is None and can_fuse_norm(norm, tokens) for norm in (block.norm1, block.norm2))
    mixer = norm1 and can_fuse_mixer(block, tokens)
    return Fusion(norm1, norm2, mixer, can_fuse_mlp(block, tokens))


def can_fuse_norm(norm: nn.Module, tokens: Tensor) -> bool:
    """Whether kernels may take the place of a LayerNorm."""
    if not is_plain(norm, LayerNorm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    return norm.normalized_shape == tokens.shape[-1:] and tokens.shape[-1] <= CHANNELS_MOST


def can_fuse_mixer(block: Block, tokens: Tensor) -> bool:
    """Whether kernels may take the place of a C-GSPN sub-layer's norms, products and convolution.

    In 16 bits on GPUs with the shared memory of data centres, as the tiles are made for those.
    """
    mixer = block.mixer
    if not isinstance(mixer, PropagationMixer) or not mixer.keeps_its_parts or not has_no_hooks(mixer):
        return False
    if block.fusion_backend == "auto":
        gpu = gpu_of(tokens.device)
        if gpu is None or gpu.capability not in ROOMY or tokens.dtype.itemsize != 2:
            return False
    if not is_plain(mixer.down, nn.Linear) or not is_plain(mixer.up, nn.Linear):
        return False
    if mixer.up.in_features > LATENT_MOST or mixer.down.bias is None or mixer.up.bias is None:
        return False
    norms = (mixer.norm, mixer.merge_norm)
    parts = all(is_plain(n, RMSNorm, nn.Identity) and getattr(n, "eps", 0.0) is not None for n in norms)
    local = mixer.local is None or is_plain(mixer.local, nn.Conv2d)
    return parts and local and can_read_scale(block.scale1)


def can_read_scale(scale: nn.Module) -> bool:
    """Whether a LayerScale, or nothing, is all there is on a branch."""
    return isinstance(scale, nn.Identity) or (hasattr(scale, "gamma") and is_plain(scale, type(scale)))


def can_fuse_mlp(block: Block, tokens: Tensor) -> bool:
    """Whether the MLP's products may write onto the residual: in inference, as they know no gradients."""
    if torch.is_grad_enabled() or type(block.scale2) is not nn.Identity or not has_no_hooks(block.scale2):
        return False
    mlp = block.mlp
    if not is_plain(mlp, Mlp) or not mlp.is_bare() or mlp.act.approximate != "tanh":
        return is_plain(mlp, Fp8Mlp)
    return tokens.dtype in (autocast_dtype(tokens), mlp.fc1.weight.dtype)


def run_block(block: Block, tokens: Tensor, grid: Grid, tapped: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """tokens [B, N, C] -> the block's output, and if `tapped` its mixing branch, [B, N, C] each."""
    fusion = fusion_of(block, tokens)
    after = block.mlp.fc2.bias if fusion.mlp else None
    branch = None
    if fusion.mixer and not tapped:
        normal, mixed = fused_residual(block, tokens, grid, fusion, after)
    else:
        branch, past = run_branch(block, tokens, grid, fusion)
        normal, mixed = add_norm(block.norm2, past, branch, after, fused=fusion.norm2)
    out = block.mlp.add_to_residual_(normal, mixed) if fusion.mlp else mixed + block.scale2(block.mlp(normal))
    return out if branch is None or not tapped else (out, branch)


def run_branch(block: Block, tokens: Tensor, grid: Grid, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """The mixing branch of a block, and the tokens for what goes past it: [B, N, C] each."""
    mixer: Any = block.mixer
    if fusion.mixer:
        scanned, past = fused_scan(block, tokens, grid)
        branch = mixer.up(mixer.merge_norm(scanned))
    else:
        normal, past = add_norm(block.norm1, tokens, fused=fusion.norm1)
        branch = mixer(normal, grid)
    return block.scale1(branch), past


def fused_scan(block: Block, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """A C-GSPN sub-layer up to the merged directions [B, N, K], and the tokens for what goes past it."""
    check_grid(tokens, grid)
    mixer: Any = block.mixer
    norm = block.norm1
    trained = torch.is_grad_enabled()
    arguments = (tokens, norm.weight, norm.bias, mixer.down.weight, mixer.down.bias, norm.eps)
    if trained:
        latent, tokens = norm_linear.NormLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        latent, _ = norm_linear.forward(*arguments)
    x = latent.view(tokens.shape[0], grid.height, grid.width, latent.shape[-1])
    if mixer.local is None:
        x = mixer.norm(x)
    else:
        gain, eps = gain_of(mixer.norm)
        local = (x, mixer.local.weight, mixer.local.bias, gain, eps, grid.mask)
        x = local_norm.LocalNorm.apply(*local) if trained else local_norm.forward(*local)  # type: ignore[no-untyped-call]
    return mixer.scan(x, grid.mask)[1], tokens


def fused_residual(
    block: Block, tokens: Tensor, grid: Grid, fusion: Fusion, after: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The second norm of t = tokens + the mixing branch, and t + `after` (in inference): [B, N, C] each."""
    scanned, past = fused_scan(block, tokens, grid)
    mixer: Any = block.mixer
    norm = block.norm2
    gain, eps = gain_of(mixer.merge_norm)
    arguments = (past, scanned, gain, mixer.up.weight, mixer.up.bias, getattr(block.scale1, "gamma", None), eps)
    if after is not None and fusion.norm2:
        return linear_residual.forward_norm(*arguments, (norm.weight, norm.bias, norm.eps), after)
    if torch.is_grad_enabled():
        mixed = linear_residual.LinearResidual.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        mixed = linear_residual.forward(*arguments)
    return add_norm(norm, mixed, after=after, fused=fusion.norm2)


def run_mixing_half(block: Block, tokens: Tensor, grid: Grid) -> Tensor:
    """tokens + the mixing branch, [B, N, C]: a block without its MLP."""
    fusion = fusion_of(block, tokens)
    if fusion.mixer:
        return fused_residual(block, tokens, grid, fusion._replace(norm2=False), None)[1]
    branch, past = run_branch(block, tokens, grid, fusion)
    return past + branch


def gain_of(norm: nn.Module) -> tuple[Tensor | None, float]:
    """The gain and eps of an RMSNorm; no gain of a norm that is switched off."""
    return (norm.weight, norm.eps or 0.0) if isinstance(norm, nn.RMSNorm) else (None, 0.0)
