"""Influence maps: the size of the derivative of an output position with respect to each input position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def influence_map(
    function: Callable[[Tensor], Tensor],
    grid_input: Tensor,
    position: tuple[int, int],
    *,
    probes: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute the norm of the derivative of the output at one position with respect to the input at every position.

    Entry (i, j) is the Frobenius norm of the Jacobian block d function(x)[p] / d x[i, j], where p is the position. It
    is exactly 0 if nothing flows from (i, j) to p. It makes no assumption about the function, so scans, attention and
    convolutions can be compared.

    Args:
        function: differentiable function from [1, H, W, C] to [1, h, w, C']; h, w may differ from H, W (pixels to
            tokens).
        grid_input: float [1, H, W, C].
        position: (row, column) of the output grid; negative numbers count from the end.
        probes: None for the exact norm, with one backward pass per output channel. A number n estimates it from n
            random sign vectors instead; the squared norm is unbiased, with a relative error of about sqrt(2 / n) or
            less.
        seed: random seed of the sign vectors.

    Returns:
        [H, W], with the dtype and device of grid_input.

    Raises:
        ValueError: a wrong shape, a position outside the output grid, probes below 1, or a function whose output does
            not depend on its input in a differentiable way.
    """
    if grid_input.ndim != 4 or grid_input.shape[0] != 1 or not grid_input.is_floating_point():
        raise ValueError(
            f"grid_input has shape {tuple(grid_input.shape)} and dtype {grid_input.dtype}; expected float [1, H, W, C]"
        )
    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes}; expected None or at least 1")
    # A differentiable copy, so that the caller's tensor and the function's parameters get no gradients.
    x = grid_input.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = function(x)
        if output.ndim != 4 or output.shape[0] != 1:
            raise ValueError(f"function returned shape {tuple(output.shape)}; expected [1, h, w, C]")
        h, w, channels = output.shape[1:]
        row, column = position
        if not (-h <= row < h and -w <= column < w):
            raise ValueError(f"position is {position}; expected a position of the output grid {h} x {w}")
        at_position = output[0, row, column]
    if not at_position.requires_grad:
        raise ValueError("function's output carries no gradient to its input; is it run under no_grad or detached?")

    if probes is None:
        directions = torch.eye(channels, dtype=output.dtype, device=output.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, channels), generator=generator) * 2 - 1
        # E|v J|^2 = |J|^2 for independent signs v; the factor makes the sum below a mean.
        directions = signs.to(output) / probes**0.5
    energy = torch.zeros(x.shape[1:3], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for direction in directions:
        (gradient,) = torch.autograd.grad(at_position, x, direction, retain_graph=True, allow_unused=True)
        if gradient is not None:
            energy += gradient[0].to(energy.dtype).square().sum(-1)
    return energy.sqrt().to(grid_input.dtype)
