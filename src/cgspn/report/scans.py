"""The influence on chosen patches in single layers: per scan direction of a propagation layer, or as attention rows.

Nothing here has size tokens x tokens, so it works at any resolution at which the encoder works.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from ..layers import AttentionMixer, Grid, PropagationMixer
from ..models.encoder import Encoder, to_map
from ..ops import propagate_2d

ATTENTION, TOGETHER = "attention", "together"
Positions = Sequence[tuple[int, int]]


class Look(NamedTuple):
    """The features of one image for the page.

    tokens: after the last norm, float32 [h, w, C] on the CPU.
    block_inputs: by block index, the normalised tokens [1, N, C] that enter its mixer.
    grid: the grid of the tokens.
    """

    tokens: Tensor
    block_inputs: dict[int, Tensor]
    grid: Grid


@torch.no_grad()
def look(encoder: Encoder, image: Tensor, layers: Collection[int]) -> Look:
    """Run one normalised image [1, channels, H, W] through the encoder and keep the inputs of the blocks `layers`.

    Raises ValueError for a size that is not a multiple of the patch size.
    """
    tokens, grid = encoder.embed(image)
    block_inputs = {}
    for index, block in enumerate(encoder.each_block()):
        if index in layers:
            block_inputs[index] = block.norm1(tokens)
        tokens = encoder.run_block(block, tokens, grid)
    return Look(to_map(encoder.norm(tokens), grid)[0].float().cpu(), block_inputs, grid)


def layer_maps(encoder: Encoder, seen: Look, layer: int, positions: Positions) -> dict[str, Tensor]:
    """The contribution of every position to each position in one layer.

    seen: from `look`, with the input of `layer`, the index of a block. positions: (row, column) of P patches.

    Returns non-negative maps [P, h, w] on the CPU: "attention" for an attention layer; for a propagation layer one per
    direction, and "together".
    """
    mixer, entry = encoder.each_block()[layer].mixer, seen.block_inputs[layer]
    if isinstance(mixer, AttentionMixer):
        return {ATTENTION: attention_rows(mixer, entry, seen.grid, positions)}
    if isinstance(mixer, PropagationMixer):
        return scan_maps(mixer, entry, seen.grid, positions)
    raise TypeError(f"layer {layer} mixes by {type(mixer).__name__}; accepted: attention, propagation")


def attention_rows(mixer: AttentionMixer, entry: Tensor, grid: Grid, positions: Positions) -> Tensor:
    """Attention from each position to the grid tokens, averaged over heads: [P, h, w] on the CPU."""
    rows = torch.tensor([grid.prefix + row * grid.width + column for row, column in positions], device=entry.device)
    weights = mixer.weights(entry, grid, rows).mean(1)[0, :, grid.prefix :]
    return weights.unflatten(1, (grid.height, grid.width)).float().cpu()


def scan_maps(mixer: PropagationMixer, entry: Tensor, grid: Grid, positions: Positions) -> dict[str, Tensor]:
    """The influence of every input position on the gated output of each scan at the given positions.

    It is the exact Frobenius norm of the derivative with respect to the latent and the values, including the derivative
    through the scan parameters, which are computed from the latent. "together" is the norm over all scans. A scan does
    not mix channels, so one backward pass per direction gives all rows of the derivative. A row is the gradient of the
    channel's own input plus those of its parameters, multiplied by the weights that compute them.

    entry: the mixer's normalised input tokens [1, h*w, C] on `grid`. positions: (row, column) of P patches.

    Returns maps [P, h, w] on the CPU by direction, and "together". They are exactly 0 where a scan has no influence.
    """
    config, width, made = mixer.config, mixer.value_width, mixer.params_per_direction
    directions, latent, values = config.directions, *scanned(mixer, entry, grid)
    apart = config.value_expansion is not None
    # repeat shared parameters for each channel
    weight, bias = (
        t.detach().unflatten(0, (len(directions), made, -1)).repeat_interleave(config.channels_per_group, 2)
        for t in (mixer.param_proj.weight, mixer.param_proj.bias)
    )
    count = range(len(positions))
    rows, columns = [list(index) for index in zip(*positions)]
    maps = {}
    for d, (name, direction_weight, direction_bias) in enumerate(zip(directions, weight, bias)):
        x = values[..., d * width : (d + 1) * width] if apart else values
        packed = linear(latent, direction_weight.flatten(0, 1), direction_bias.flatten())
        lam, u, logits, *keep = packed.unflatten(-1, (1, made, width)).split([1, 1, 3, 1][: 3 + config.forget_gate], -2)
        # a batch of equal images, one per position
        maps_in = (x, lam.squeeze(-2), u.squeeze(-2), logits, *(t.squeeze(-2) for t in keep))
        inputs = [t.expand(len(positions), *t.shape[1:]).contiguous().requires_grad_() for t in maps_in]
        with torch.enable_grad():
            gate = inputs[4] if config.forget_gate else None
            lam_in = softplus(inputs[1]) if config.normalise_state else inputs[1]
            mean = config.normalise_state
            y = propagate_2d(
                inputs[0], inputs[3], lam_in, inputs[2], keep=gate, directions=(name,), normalise_state=mean
            )
            asked = y[list(count), rows, columns].sum()
        in_x, in_lam, in_u, in_logits, *in_keep = torch.autograd.grad(asked, inputs)
        gradient = torch.cat([in_x[..., None, :], in_lam, in_u, in_logits.squeeze(3), *in_keep], -2)
        gradient = gradient.to(torch.promote_types(x.dtype, torch.float32))  # [P, h, w, 1 + made, own]
        # the weights from which each channel's value and parameters are computed
        makers = direction_weight.to(gradient.dtype).transpose(0, 1)  # [own, made, Cc]
        gram = gradient.new_zeros(width, 1 + made, 1 + made)
        gram[:, 0, 0] = 1
        gram[:, 1:, 1:] = makers @ makers.mT
        if not apart:
            gram[:, 0, 1:] = gram[:, 1:, 0] = makers.diagonal(dim1=0, dim2=2).T
        energy = (torch.einsum("phwkc,ckl->phwlc", gradient, gram) * gradient).sum((-2, -1))
        maps[name] = energy.clamp(min=0).sqrt().cpu()
    maps[TOGETHER] = torch.stack([values.square() for values in maps.values()]).sum(0).sqrt()
    return maps


@torch.no_grad()
def scanned(mixer: PropagationMixer, entry: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """A mixer's latent [1, h, w, Cc], and its scanned features: the latent, or values [1, h, w, D * own]."""
    narrow = mixer.down(mixer.expand(mixer.project_in(entry))).unflatten(1, (grid.height, grid.width))
    x = mixer.localise(narrow, grid.mask)
    return x[..., : mixer.latent], x if mixer.config.value_expansion is None else x[..., mixer.latent :]
