"""What stands around the scan in a sub-layer, each piece reading and writing its tokens once (design, section 5).

What layers call (pieces.py), definitions in plain PyTorch (definition.py), Triton kernels (kernels.py) and their
registration (library.py).
"""

from .pieces import (
    linear_residual,
    linear_residual_norm,
    local_norm,
    norm_linear,
    norm_linear_past,
    suits,
    unsupported_reason,
)

__all__ = [
    "linear_residual",
    "linear_residual_norm",
    "local_norm",
    "norm_linear",
    "norm_linear_past",
    "suits",
    "unsupported_reason",
]
