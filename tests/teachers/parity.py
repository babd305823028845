"""What the parity tests share."""

import torch


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def shaken(model):
    """Every weight far from zeros, ones and its neighbours, so that a mixed-up key shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.2 if parameter.ndim < 2 else 0.5 * parameter.shape[-1] ** -0.5))
    return model.eval()
