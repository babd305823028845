"""Training of a C-GSPN block with recorded launches, as one autograd function with little CPU time.

Forward and backward are recorded once per shape, from the same functions as the fused path. Later calls only change
addresses. For second derivatives the block's layers run instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arguments import ProjectedScan
from ..ops.fused import linear_residual, local_norm, norm_linear, rows
from ..ops.gpu import Gpu
from ..ops.projected_library import projected_backward_now, projected_now
from ..ops.replay import ALIGNED, Replay, active, matmul, recorded
from .mixer import Grid

if TYPE_CHECKING:
    from .block import Block

PASSES = 5  # attempts to record; the first ones compile kernels and size the workspace


class Trained(NamedTuple):
    """The recorded forward and backward of a block for one token shape.

    places: offsets of the saved tensors in one buffer of `size` bytes per call.
    """

    gpu: Gpu
    stream: int
    forward: Replay
    backward: Replay
    places: list[int]
    size: int

    def holds(self) -> bool:
        """Whether the workspaces are still valid, and the current stream is the recorded one."""
        return self.forward.holds() and self.backward.holds() and self.gpu.stream() == self.stream

    def run_forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output for tokens of the recorded shape, and the buffer of saved tensors."""
        out, saved = torch.empty_like(tokens), torch.empty(self.size, dtype=torch.uint8, device=tokens.device)
        base = saved.data_ptr()
        with self.forward.workspace.lock:
            self.forward.run(tokens.data_ptr(), out.data_ptr(), *[base + place for place in self.places])
        return out, saved

    def run_backward(self, tokens: Tensor, saved: Tensor, dout: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of tokens and parameters."""
        grads = [torch.empty_like(t) for t in (tokens, *parameters)]
        base = saved.data_ptr()
        inputs = (tokens.data_ptr(), dout.data_ptr(), *[base + place for place in self.places])
        with self.backward.workspace.lock:
            self.backward.run(*inputs, *[g.data_ptr() for g in grads])
        return grads


def parameters_in_order(block: Block) -> list[Tensor]:
    """The parameters, in the order of the gradients of `backward`."""
    mixer: Any = block.mixer
    mlp: Any = block.mlp
    layers = [block.norm1, mixer.down, mixer.local, None, mixer.param_proj, None, mixer.up]
    layers += [block.norm2, mlp.fc1, mlp.fc2]
    norms = iter((mixer.norm, mixer.merge_norm))
    found: list[Tensor] = []
    for layer in layers:
        found += [next(norms).weight] if layer is None else [layer.weight, layer.bias]
    return found


def forward(block: Block, tokens: Tensor, grid: Grid, out: Tensor) -> list[Tensor]:
    """Run the block on tokens [B, N, C] into `out` while recording; returns the tensors that `backward` needs."""
    mixer: Any = block.mixer
    mlp: Any = block.mlp
    n1, n2, down, local, made, up = block.norm1, block.norm2, mixer.down, mixer.local, mixer.param_proj, mixer.up
    latent, statistics = norm_linear.forward(tokens, n1.weight, n1.bias, down.weight, down.bias, n1.eps, save=True)
    at = latent.view(tokens.shape[0], grid.height, grid.width, latent.shape[-1])
    x = local_norm.forward(at, local.weight, local.bias, mixer.norm.weight, mixer.norm.eps)
    y = projected_now(*ProjectedScan(x, made.weight, made.bias, None, mixer.config.codes, mixer.config.merge == "sum"))
    y = y.flatten(1, 2).flatten(2)
    norm = mixer.merge_norm
    mixed = linear_residual.forward(tokens, y, norm.weight, up.weight, up.bias, None, norm.eps)
    normal, _, of_norm2 = rows.forward(mixed, None, n2.weight, n2.bias, n2.eps, save=True)
    recording = active()
    assert recording is not None
    hidden = recording.product(normal.flatten(0, -2), mlp.fc1.weight.t(), bias=mlp.fc1.bias)
    act = rows.gelu(hidden, mlp.act.approximate)
    recording.product(act, mlp.fc2.weight.t(), out=out.flatten(0, -2), bias=mlp.fc2.bias, add=mixed.flatten(0, -2))
    saved = [latent, statistics, x, y, mixed, normal, of_norm2, hidden]
    return [t for t in saved if t is not None]


def backward(block: Block, tokens: Tensor, grid: Grid, saved: list[Tensor], dout: Tensor) -> list[Tensor]:
    """Compute the gradients of tokens and `parameters_in_order` while recording."""
    latent, statistics, x, y, mixed, normal, of_norm2, hidden = saved
    mixer: Any = block.mixer
    mlp: Any = block.mlp
    n1, n2, down, local, made, up = block.norm1, block.norm2, mixer.down, mixer.local, mixer.param_proj, mixer.up
    d, approximate = dout.flatten(0, -2), mlp.act.approximate
    dfc2 = matmul(d.t(), rows.gelu(hidden, approximate))
    dhidden = matmul(d, mlp.fc2.weight)
    dfc2_bias = rows.column_sums(d, dtype=d.dtype)
    dfc1_bias = rows.column_sums(dhidden, hidden, approximate, d.dtype)
    dfc1 = matmul(dhidden.t(), normal.flatten(0, -2))
    dnormal = matmul(dhidden, mlp.fc1.weight).view(dout.shape)
    dmixed, dgain2, dshift2 = rows.backward(dnormal, dout, mixed, n2.weight, of_norm2)
    norm = mixer.merge_norm
    dy, dmerge, dup, dup_bias, _ = linear_residual.backward(dmixed, y, norm.weight, up.weight, up.bias, None, norm.eps)
    maps = (*x.shape[:3], len(mixer.config.directions), x.shape[-1]) if mixer.config.merge == "concat" else x.shape
    assert dy is not None
    p = ProjectedScan(x, made.weight, made.bias, None, mixer.config.codes, mixer.config.merge == "sum")
    dx, dmade, dmade_bias = projected_backward_now(dy.view(maps), *p)
    at = latent.view(x.shape)
    dlatent, dlocal, dlocal_bias, dnorm = local_norm.backward(
        dx, at, local.weight, local.bias, mixer.norm.weight, mixer.norm.eps, None
    )
    assert dlatent is not None
    dtokens, dgain1, dshift1, ddown, ddown_bias = norm_linear.backward(
        dlatent.view(latent.shape), dmixed, tokens, latent, n1.weight, n1.bias, down.weight, down.bias, statistics
    )
    found = [dtokens, dgain1, dshift1, ddown, ddown_bias, dlocal, dlocal_bias, dnorm, dmade, dmade_bias, dmerge]
    found += [dup, dup_bias, dgain2, dshift2, dfc1, dfc1_bias, dfc2, dfc2_bias]
    return found  # type: ignore[return-value]


@torch.no_grad()
def record(block: Block, tokens: Tensor, grid: Grid, gpu: Gpu, stream: int) -> Trained | str:
    """Record forward and backward. Returns the reason if that fails."""
    reason = ""
    held, tokens = parameters_in_order(block), tokens.detach()
    for _ in range(PASSES):
        with recorded(gpu, tokens.device, stream) as recording:
            workspace = recording.workspace  # keeps the workspace alive for the next recording
            out = recording.empty(tokens.shape, tokens.dtype, tokens.device)
            saved = forward(block, tokens, grid, out)
            ahead = recording.replay(held, (tokens, out, *saved))
            kept, seen = [t.clone() for t in saved], out.clone()
        with recorded(gpu, tokens.device, stream) as recording:
            grads = backward(block, tokens, grid, kept, seen)
            back = recording.replay(held, (tokens, seen, *kept, *grads))
            wanted = [g.clone() for g in grads]
        if isinstance(ahead, str) or isinstance(back, str) or ahead.memory is not workspace.memory:
            reason = f"forward: {ahead}; backward: {back}"
            continue
        places = [0]
        for t in saved:
            places.append(places[-1] + -(-t.numel() * t.element_size() // 256) * 256)
        trained = Trained(gpu, stream, ahead, back, places[:-1], places[-1])
        # run again with new tensors, to find addresses that were not replaced
        again, memory = trained.run_forward(tokens)
        found = trained.run_backward(tokens, memory, again, held)
        pairs = enumerate(zip((again, *found), (seen, *wanted), strict=True))
        other = [n for n, (one, two) in pairs if not torch.equal(one, two)]
        return f"run again, outputs {other} differ" if other and gpu.computes else trained
    return reason


class TrainedBlock(torch.autograd.Function):
    """The autograd function of a block with recorded passes."""

    @staticmethod
    def forward(ctx: Any, block: Block, grid: Grid, trained: Trained, tokens: Tensor, *parameters: Tensor) -> Tensor:
        """tokens [B, N, C] -> [B, N, C]; parameters: those of `parameters_in_order`."""
        out, saved = trained.run_forward(tokens)
        ctx.rest = block, grid, trained
        ctx.save_for_backward(tokens, saved, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients. Second derivatives, or a pass that is no longer valid, go through the layers."""
        block, grid, trained = ctx.rest
        tokens, saved, *parameters = ctx.saved_tensors
        twice, dout = torch.is_grad_enabled(), dout.contiguous()
        # saved-tensor hooks may return other tensors
        kept = type(dout) is Tensor and dout.dtype == tokens.dtype and tokens.is_contiguous()
        kept = kept and len({t.get_device() for t in (dout, tokens, saved, *parameters)}) == 1
        kept = kept and not (dout.data_ptr() | saved.data_ptr() | tokens.data_ptr()) & ALIGNED
        if not twice and kept:
            with nullcontext() if trained.gpu.is_current() else trained.gpu.current():
                if trained.holds():
                    return None, None, None, *trained.run_backward(tokens, saved, dout, parameters)
        with torch.enable_grad():
            y = tokens + block.scale1(block.mixer(block.norm1(tokens), grid))
            y = y + block.scale2(block.mlp(block.norm2(y)))
            wanted = [t for t in (tokens, *parameters) if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dout, create_graph=twice))
        return None, None, None, *[next(found) if t.requires_grad else None for t in (tokens, *parameters)]
