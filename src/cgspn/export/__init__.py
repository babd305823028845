"""Encoders as files that run elsewhere: ONNX in plain operators, torch.export programs, AOTInductor packages."""

from .bounds import Bounds, bounds_for
from .export import ExportError, Parity, export_model, load_exported
from .formats import Format

__all__ = ["Bounds", "ExportError", "Format", "Parity", "bounds_for", "export_model", "load_exported"]
