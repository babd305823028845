"""Export of encoders to ONNX with standard operators, torch.export programs and AOTInductor packages."""

from .bounds import Bounds, bounds_for
from .export import ExportError, Parity, export_model, load_exported
from .formats import Format

__all__ = ["Bounds", "ExportError", "Format", "Parity", "bounds_for", "export_model", "load_exported"]
