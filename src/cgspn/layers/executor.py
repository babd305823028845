"""The choice of how a block runs: layer by layer, or fused if the result is the same. No other module decides this.

Only a plain layer (plain.py) may be replaced by a kernel of `cgspn.ops.fused` that also does the work of its
neighbours. Traced, transformed and intercepted programs call the layers, which compilers, exporters and counters know.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype
from ..ops.backends import unsupported_reason
from ..ops.eager import is_eager
from ..ops.fused import linear_residual, local_norm, norm_linear, rows
from ..ops.fused.rows import CHANNELS_MOST, DTYPES
from ..ops.gpu import gpu_of, on_accelerator
from ..ops.replay import ALIGNED, Replay, linear, matmul, recorded
from .mixer import Grid
from .mlp import Mlp
from .norm import RMSNorm, add_norm
from .plain import has_global_hooks, is_plain
from .propagation import PropagationMixer, check_grid
from .state import State, state_of
from .training import Trained, TrainedBlock, parameters_in_order, record

if TYPE_CHECKING:
    from .block import Block

LATENT_MOST = 256  # with more latent channels, library kernels are faster
ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # GPUs with the 140 KB of shared memory that the latent's tiles need


class Fusion(NamedTuple):
    """The fused parts of a block: each norm with its additions, the mixer and the MLP with their residual additions."""

    norm1: bool = False
    norm2: bool = False
    mixer: bool = False
    mlp: bool = False


NOTHING, EVERYTHING = Fusion(), Fusion(norm1=True, norm2=True, mixer=True, mlp=True)
FEW = 1 << 22  # elements; below this the CPU is the bottleneck, and PyTorch's norms need less CPU time
TRIES = 4  # attempts to keep launches; the first ones compile kernels and size the workspace
NO_MEMORY = "too little memory to keep launches"
ALIKE = 3e-2  # relative error that rounding to 16 bits may cause
SHAPES_MOST = 64  # most token shapes for which a block keeps launches
KEPT_MOST = 1 << 25  # elements; above this the GPU is the bottleneck, and the workspace would exceed about 1 GB


def fusion_of(block: Block, tokens: Tensor) -> Fusion:
    """The parts that run fused for the current state of block, tokens and PyTorch.

    Raises RuntimeError if `block.fusion_backend` requests something that cannot run.
    """
    wanted = block.fusion_backend
    if wanted == "torch" or (wanted == "auto" and not on_accelerator(tokens)) or not is_eager(tokens):
        return NOTHING
    if tokens.dtype not in DTYPES or autocast_dtype(tokens) not in (None, tokens.dtype):
        return NOTHING  # a fused kernel would not have the precision of the layers
    if has_global_hooks() or not tokens.numel():
        return NOTHING
    reason = unsupported_reason("triton", tokens)
    if reason is not None and wanted == "triton":
        raise RuntimeError(f"fusion_backend is 'triton', which cannot run here: {reason}")
    state = state_of(block)
    few = wanted == "auto" and not state.latent and tokens.numel() < FEW
    if few and not (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):  # launches in a graph are free
        return NOTHING
    channels = tokens.shape[-1]
    by_rows = reason is None and channels <= CHANNELS_MOST and state.widths == {tokens.shape[-1:]}
    mixer = by_rows and state.latent and (wanted == "triton" or has_room(tokens))
    if mixer:  # the latent and the merged directions must fit in a tile of rows
        parts: Any = block.mixer
        mixer = max(parts.down.out_features, parts.up.in_features) <= LATENT_MOST
    mlp = state.mlp and not torch.is_grad_enabled() and has_dtype_of(block.mlp, tokens)
    return Fusion(by_rows and state.norm1, by_rows and state.norm2, mixer, mlp)


def has_room(tokens: Tensor) -> bool:
    """Whether a tile with all channels of the latent fits on chip: in 16 bits, on GPUs with enough shared memory."""
    gpu = gpu_of(tokens.device)
    return gpu is not None and gpu.capability in ROOMY and tokens.dtype.itemsize == 2


def has_dtype_of(mlp: nn.Module, tokens: Tensor) -> bool:
    """Whether the MLP's products run in the dtype of the tokens, and its GELU can be fused."""
    if not isinstance(mlp, Mlp):
        return True
    return mlp.act.approximate == "tanh" and tokens.dtype in (autocast_dtype(tokens), mlp.fc1.weight.dtype)


def run_block(block: Block, tokens: Tensor, grid: Grid, tapped: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """tokens [B, N, C] -> the block's output, and if `tapped` its mixing branch, [B, N, C] each."""
    state = block._state
    if not tapped and state is not None and state.plans:
        kept = run_kept(block, state, tokens, grid)
        if kept is not None:
            return kept
    fusion = fusion_of(block, tokens)
    if not tapped and fusion.norm1 and fusion.norm2 and tokens.numel() <= KEPT_MOST and state_of(block).latent:
        with suppress(torch.OutOfMemoryError):  # keeping launches needs extra memory
            kept = keep(block, tokens, grid, fusion)
            if kept is not None:
                return kept
    out: Tensor | tuple[Tensor, Tensor] = run_fused(block, tokens, grid, fusion, tapped)
    return out


class Plan(NamedTuple):
    """The recorded launches up to the second norm, and a function that adds the MLP to tokens [M, C] in place."""

    replay: Replay
    add_mlp: Callable[[Tensor], object]

    def run(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """The block's output; None if the workspace has been replaced."""
        with self.replay.workspace.lock:
            if not self.replay.holds():
                return None
            out = torch.empty_like(tokens)
            self.replay.run(tokens.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr())
            self.add_mlp(out.view(-1, out.shape[-1]))
        return out


def plan_key(block: Block, tokens: Tensor, grid: Grid, stream: int) -> tuple[Any, ...]:
    """The cache key of recorded launches: all that they depend on except for the block's state and tensors."""
    mask = grid.mask
    masked = None if mask is None else (mask.shape, mask.dtype, mask.device)
    trained = torch.is_grad_enabled()
    return tokens.shape, tokens.dtype, tokens.device, block.fusion_backend, stream, trained, *grid[:3], masked


def run_kept(block: Block, state: State, tokens: Tensor, grid: Grid) -> Tensor | None:
    """Run a block with its recorded launches; None if there are none for its state and these shapes."""
    if has_global_hooks() or not is_eager(tokens) or not state.holds():
        return None
    gpu, mask = gpu_of(tokens.device), grid.mask
    stream = None if gpu is None else gpu.stream()
    if gpu is None or stream is None:
        return None
    plan = state.plans.get(plan_key(block, tokens, grid, stream))
    if (
        not isinstance(plan, Plan | Trained)
        or state.look() != state.seen
        or autocast_dtype(tokens) not in (None, tokens.dtype)
    ):
        return None
    here, there = tokens.data_ptr(), 0 if mask is None else mask.data_ptr()
    if (here | there) & ALIGNED or not tokens.is_contiguous() or not (mask is None or mask.is_contiguous()):
        return None
    if not gpu.is_current():
        with gpu.current():
            return run_kept(block, state, tokens, grid)
    if isinstance(plan, Trained):
        if not plan.holds() or not all([t.requires_grad for t in state.tensors]):  # noqa: C419 (faster)
            return None
        out: Tensor = TrainedBlock.apply(block, grid, plan, tokens, *parameters_in_order(block))  # type: ignore[no-untyped-call]
        return out
    kept: Tensor | None = plan.run(tokens, mask)
    return kept


def keep(block: Block, tokens: Tensor, grid: Grid, fusion: Fusion) -> Tensor | None:
    """Run a block, and record and store its launches; None if they cannot be recorded."""
    gpu, state = gpu_of(tokens.device), state_of(block)
    stream = None if gpu is None else gpu.stream()
    if gpu is None or stream is None or not (is_plain(block.mixer, PropagationMixer) and is_plain(block.mlp, Mlp)):
        return None
    if not gpu.is_current():
        with gpu.current():
            return keep(block, tokens, grid, fusion)
    if state.look() != state.seen:
        state.plans.clear()
        state.seen = state.look()
    key = plan_key(block, tokens, grid, stream)
    tried = state.plans.get(key, 0)
    # weights in another dtype would be cast, and the casts kept
    if isinstance(tried, str) or state.seen[1] != [tokens.dtype] * len(state.tensors) or not all(state.seen[3]):
        return None
    while len(state.plans) >= SHAPES_MOST:
        state.plans.pop(next(iter(state.plans)))
    if torch.is_grad_enabled():
        if fusion.mixer and can_keep_training(block, tokens, grid):
            state.plans[key] = NO_MEMORY
            state.plans[key] = record(block, tokens, grid, gpu, stream)
        return run_kept(block, state, tokens, grid)
    if fusion._replace(mixer=True) != EVERYTHING or not (fusion.mixer or can_keep_wide(block, tokens)):
        return None
    mlp: Any = block.mlp
    state.plans[key] = NO_MEMORY
    with recorded(gpu, tokens.device, stream) as recording:
        state.workspace = recording.workspace
        if fusion.mixer:
            normal, mixed = fused_residual(block, tokens, grid, EVERYTHING, mlp.fc2.bias)
        else:
            normal, mixed = wide_residual(block, tokens, grid, mlp.fc2.bias)
        replay = recording.replay(state.tensors, (tokens, grid.mask, mixed))
        prepared = recording.mlp(normal.flatten(0, -2), mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight)
    out: Tensor = run_fused(block, tokens, grid, fusion)
    tries = tried + 1 if isinstance(tried, int) else 1
    state.plans[key] = replay if isinstance(replay, str) and tries >= TRIES else tries
    if not isinstance(replay, str):
        plan = Plan(replay, prepared or mlp.adder(normal))
        found = plan.run(tokens, grid.mask)
        alike = found is not None and bool((found - out).float().norm() <= ALIKE * out.float().norm())
        state.plans[key] = plan if alike or not gpu.computes else "the kept launches give a different result"
    return out


def can_keep_wide(block: Block, tokens: Tensor) -> bool:
    """Whether `wide_residual` supports a sub-layer that scans more channels than fit in a tile of the fused kernels."""
    mixer: Any = block.mixer
    norms = isinstance(mixer.norm, RMSNorm) and isinstance(mixer.merge_norm, RMSNorm)
    few = tokens.numel() <= KEPT_MOST // 2  # for more, library kernels are faster
    return few and norms and has_room(tokens) and mixer.local is not None and is_plain(block.scale1, nn.Identity)


def wide_residual(block: Block, tokens: Tensor, grid: Grid, after: Tensor) -> tuple[Tensor, Tensor]:
    """`fused_residual` for such a sub-layer, with matrix products from cuBLAS instead of fused kernels."""
    check_grid(tokens, grid)
    mixer: Any = block.mixer
    n1, n2 = block.norm1, block.norm2
    normal, _, _ = rows.forward(tokens, None, n1.weight, n1.bias, n1.eps)
    latent = linear(normal, mixer.down.weight, mixer.down.bias)
    x = latent.view(tokens.shape[0], grid.height, grid.width, latent.shape[-1])
    (gain, eps), local = gain_of(mixer.norm), mixer.local
    x = local_norm.forward(x, local.weight, local.bias, gain, eps, grid.mask)
    merged, norm = mixer.scan(x, grid.mask)[1].contiguous(), mixer.merge_norm
    unit = rows.rms_forward(merged, norm.weight, norm.eps)
    flat, into = unit.flatten(0, -2), mixer.up.weight.t()
    mixed = matmul(flat, into, tokens.flatten(0, -2), mixer.up.bias).view(tokens.shape)
    return rows.forward(mixed, None, n2.weight, n2.bias, n2.eps, after)[:2]


def can_keep_training(block: Block, tokens: Tensor, grid: Grid) -> bool:
    """Whether training.py can record a block with fused norms and mixer. Every parameter must require a gradient."""
    mixer: Any = block.mixer
    mlp: Any = block.mlp
    parts = mixer.local is not None and mlp.is_bare() and is_plain(mixer.param_proj, nn.Linear)
    parts = parts and isinstance(mixer.norm, RMSNorm) and isinstance(mixer.merge_norm, RMSNorm)
    scales = is_plain(block.scale1, nn.Identity) and is_plain(block.scale2, nn.Identity)
    inside = grid.mask is None and mixer.config.value_expansion is None and mixer.can_project_inside(tokens)
    return parts and scales and inside and tokens.is_contiguous() and all(t.requires_grad for t in block.parameters())


def run_fused(block: Block, tokens: Tensor, grid: Grid, fusion: Fusion, tapped: bool = False) -> Any:
    """`run_block` with the given fusion."""
    after = block.mlp.fc2.bias if fusion.mlp else None
    branch = None
    if fusion.mixer and not tapped:
        normal, mixed = fused_residual(block, tokens, grid, fusion, after)
    else:
        branch, past = run_branch(block, tokens, grid, fusion)
        normal, mixed = add_norm(block.norm2, past, branch, after, fused=fusion.norm2)
    if fusion.mlp:
        out = mixed.contiguous()
        block.mlp.adder(normal)(out.view(-1, out.shape[-1]))
    else:
        out = mixed + block.scale2(block.mlp(normal))
    return out if branch is None or not tapped else (out, branch)


def run_branch(block: Block, tokens: Tensor, grid: Grid, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """The mixing branch of a block, and the tokens for the residual addition: [B, N, C] each."""
    mixer: Any = block.mixer
    if fusion.mixer:
        scanned, past = fused_scan(block, tokens, grid)
        branch = mixer.up(mixer.merge_norm(scanned))
    else:
        normal, past = add_norm(block.norm1, tokens, fused=fusion.norm1)
        branch = mixer(normal, grid)
    return block.scale1(branch), past


def fused_scan(block: Block, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """A C-GSPN sub-layer up to the merged directions [B, N, K], and the tokens for the residual addition."""
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
    """The gain and eps of an RMSNorm; the gain is None if the norm is disabled."""
    return (norm.weight, norm.eps or 0.0) if isinstance(norm, nn.RMSNorm) else (None, 0.0)
