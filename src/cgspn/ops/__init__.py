"""The operator: reference.py defines it, and `backend=` selects an implementation."""

from .backends import PREFERENCE, Choice, explain_backend
from .projected import propagate_2d_projected
from .propagate import line_scan, propagate_2d, propagate_2d_normalised
from .reference import DIRECTIONS, line_scan_reference, propagate_2d_reference

__all__ = [
    "DIRECTIONS", "PREFERENCE", "Choice", "explain_backend", "line_scan", "line_scan_reference", "propagate_2d",
    "propagate_2d_normalised", "propagate_2d_projected", "propagate_2d_reference",
]  # fmt: skip
