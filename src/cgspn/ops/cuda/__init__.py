"""The CUDA backend: kernels shipped as source, compiled at first use (compile.py), cut for the shape (plan.py)."""

from .scan import (
    backward,
    backward_saved,
    forward,
    forward_saving,
    line_scan_backward,
    line_scan_backward_saved,
    line_scan_forward,
    saved_shapes,
    unsupported_reason,
)

__all__ = [
    "backward",
    "backward_saved",
    "forward",
    "forward_saving",
    "line_scan_backward",
    "line_scan_backward_saved",
    "line_scan_forward",
    "saved_shapes",
    "unsupported_reason",
]
