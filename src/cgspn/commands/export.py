"""`cgspn export`: export an encoder to a file for other runtimes, and compare it with the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from ..console import console, waiting
from ..teachers import load_model
from .checks import check_free, device_of, loaded
from .command import Command, Out, Source


@dataclass(frozen=True)
class Export(Command):
    """Export an encoder to ONNX, torch.export or AOTInductor, and compare the exported file with the encoder.

    The input is a batch of normalised images [B, channels, H, W]. The outputs are the tokens and the pooled vector, and
    the logits or image-text embedding if the model has them. OUT.json, written beside the file, describes both.

    Examples:
        cgspn export embedded teacher.onnx --max-size 56
        cgspn export runs/student student.pt2 --format torch --min-size 224 --max-size 1036
        cgspn export runs/student student.pt2 --format aot --max-batch 8 --device cuda
    """

    source: Source
    """A checkpoint (file, folder or hub id in any supported format), or "embedded"."""
    out: Out
    """Output file: .onnx for onnx, .pt2 for torch and aot."""
    format: Literal["onnx", "torch", "aot"] = "onnx"
    """"onnx": standard operators of opset 18, for ONNX Runtime and others. "torch": a torch.export program with the
    custom operators of this library. "aot": the same, compiled for this machine; needs a C++ compiler."""
    min_size: int | None = None
    """Smallest height and width in pixels, a multiple of the patch size. The default is one patch."""
    max_size: int | None = None
    """Largest height and width. The default is twice the native size."""
    size: int | None = None
    """Export for this height and width only, instead of a range."""
    max_batch: int = 32
    """Largest batch size."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that a torch or aot program runs on. ONNX files run on both."""

    overwrite: bool = False
    """Replace existing files."""

    def run(self) -> None:
        """Raises ValueError (ExportError if the file's outputs differ from the encoder's) or OSError."""
        from ..export import export_model

        check_free([self.out, self.out.with_name(f"{self.out.name}.json")], "out", self.overwrite)
        if self.size is not None and (self.min_size, self.max_size) != (None, None):
            raise ValueError(f"size is {self.size} beside min_size or max_size; accepted: one size, or bounds")
        bounds = (self.min_size, self.max_size) if self.size is None else (self.size, self.size)
        model = loaded(load_model, "source", self.source).to(device_of(self.device))
        with waiting(f"exporting {self.source}"):
            found = export_model(
                model,
                self.out,
                format=self.format,
                min_size=bounds[0],
                max_size=bounds[1],
                max_batch=self.max_batch,
                source=self.source,
                say=console.print,
            )
        table = Table("batch", "height", "width", *(f"{name}, relative error" for name in found[0].errors))
        for parity in found:
            table.add_row(
                *map(str, (parity.batch, parity.height, parity.width)), *map("{:.1e}".format, parity.errors.values())
            )
        console.print(table)
        console.print(f"wrote {self.out} and {self.out}.json")
