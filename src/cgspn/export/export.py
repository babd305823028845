"""Export with a check: the file is written, loaded, compared with the encoder, and only then renamed."""

import copy
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import write_atomically
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from .bounds import Bounds, bounds_for
from .formats import LOADER, SUFFIXES, WRITERS, Format, Runner, Say, check_onnx, open_file
from .trace import ImageSide

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


class ExportError(ValueError):
    """Raised if the outputs of an exported file differ from the encoder's. The file is deleted."""


@dataclass(frozen=True)
class Parity:
    """Relative error ||a - b|| / ||b|| of each output at one size: `errors` holds name -> error."""

    batch: int
    height: int
    width: int
    errors: dict[str, float]


def export_model(
    model: Encoder | DualEncoder,
    out: str | Path,
    *,
    format: Format = "onnx",
    min_size: int | None = None,
    max_size: int | None = None,
    max_batch: int = 32,
    tolerance: float = 1e-4,
    source: str = "",
    say: Say = lambda text: None,
) -> list[Parity]:
    """Export the image encoder of a model, compare the file with it, and write it with a JSON description.

    The exported program takes normalised images [B, channels, H, W]. It returns the tokens [B, h, w, C] and the pooled
    vector, the logits if there is a classifier, and the normalised embedding if the model has a text tower.

    Args:
        model: an encoder or image-text model; it is not modified.
        out: the output file, .onnx or .pt2 depending on the format. `out`.json describes inputs, outputs,
            normalisation, bounds, versions and the measured errors.
        format: "onnx" (standard operators), "torch" (torch.export) or "aot" (AOTInductor).
        min_size, max_size: bounds of height and width in pixels, multiples of the patch size; None for one patch and
            twice the native size. Outside the bounds, torch programs and `load_exported` raise an error.
        max_batch: largest batch size.
        tolerance: largest accepted relative error ||a - b|| / ||b||; 16-bit weights need more, such as 2e-2.
        source: origin of the model, for the description.
        say: called with a line for each step.

    Returns the errors at every compared size. Raises ExportError if one is above `tolerance` and writes no file then;
    ValueError for wrong arguments or missing packages; OSError if `out` cannot be written.
    """
    if format not in WRITERS:
        raise ValueError(f"format is {format!r}; accepted: {', '.join(map(repr, WRITERS))}")
    out = Path(out)
    if out.suffix != SUFFIXES[format]:
        raise ValueError(f"out is {out}; a file of format {format!r} ends in {SUFFIXES[format]}")
    if format == "onnx":
        check_onnx()
    side = ImageSide(model)
    weight = side.encoder.input_weight
    if format == "onnx":
        if weight.dtype != torch.float32:
            raise ValueError(f"model is {weight.dtype}; the ONNX form is float32: give it model.float()")
        side = side if weight.device.type == "cpu" else copy.deepcopy(side).cpu()
    bounds = bounds_for(side.encoder.config, min_size, max_size, max_batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        WRITERS[format](side, bounds, Path(folder) / out.name, say)
        say("opening the file")
        runner = open_file(Path(folder) / out.name, format)
        found = []
        for batch, height, width in bounds.sizes(side.encoder.config.image_size):
            say(f"comparing the outputs for {batch} x {height} x {width} (batch x height x width)")
            found.append(compare(side, runner, batch, height, width))
        worst = max(error for parity in found for error in parity.errors.values())
        if not worst <= tolerance:
            raise ExportError(
                f"the {format} program differs from the encoder by {worst:.1e}; accepted: {tolerance:.0e}"
            )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # external weights before the graph
            os.replace(file, out.parent / file.name)
    description = {**describe(side, bounds, format, out.name, source, found), "tolerance": tolerance}
    write_atomically(_description_of(out), json.dumps(description, indent=2) + "\n")
    return found


def load_exported(path: str | Path) -> Runner:
    """Load a file written by `export_model` as a function: images [B, channels, H, W] -> outputs in the order of its
    description.

    The function raises ValueError for a wrong number of channels or sizes outside the bounds, which AOTInductor and
    ONNX Runtime may not check. Raises OSError or ValueError if the file or its description is missing or damaged.
    """
    path = Path(path)
    description = json.loads(_description_of(path).read_text())
    bounds, runner = Bounds(**description["bounds"]), open_file(path, description["format"])
    channels = description["inputs"]["images"]["shape"][1]

    def run(images: Tensor) -> Sequence[Tensor]:
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected [B, {channels}, H, W]")
        bounds.check(images)
        with torch.no_grad():
            return runner(images)

    return run


def _description_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@torch.no_grad()
def compare(side: ImageSide, runner: Runner, batch: int, height: int, width: int) -> Parity:
    """Relative errors of a program on random images of one size. Raises ExportError for wrong output shapes."""
    weight = side.encoder.input_weight
    images = torch.randn(
        batch, side.encoder.config.channels, height, width, generator=torch.Generator().manual_seed(0)
    ).to(weight.device, weight.dtype)
    errors: dict[str, float] = {}
    for name, got, expected in zip(side.names, runner(images), side(images), strict=True):
        if got.shape != expected.shape:
            raise ExportError(f"{name} has shape {tuple(got.shape)} where the encoder returns {tuple(expected.shape)}")
        got = got.to(expected.device, expected.dtype)
        errors[name] = float((got - expected).double().norm() / expected.double().norm())
    return Parity(batch, height, width, errors)


def describe(
    side: ImageSide, bounds: Bounds, format: Format, file: str, source: str, found: list[Parity]
) -> dict[str, Any]:
    """The JSON description of an exported file, sufficient to use it without this library."""
    config = side.encoder.config
    weight = side.encoder.input_weight
    widths: dict[str, list[Any]] = {
        "tokens": ["height / patch", "width / patch", config.width],
        "pooled": [config.pooled_width],
        "logits": [config.num_classes],
        "embedding": [getattr(side.projection, "out_features", config.pooled_width)],
    }
    return {
        "file": file,
        "format": format,
        "model": config.name,
        "source": source,
        "loader": LOADER[format],
        "inputs": {"images": {"dtype": str(weight.dtype), "shape": ["batch", config.channels, "height", "width"]}},
        "outputs": {name: {"shape": ["batch", *widths[name]]} for name in side.names},
        "normalisation": {
            "pixels": "RGB in [0, 1], then (pixel - mean) / std for each channel",
            "mean": config.image_mean,
            "std": config.image_std,
            "native_size": config.image_size,
            "trained_sizes": config.trained_sizes,
        },
        "bounds": asdict(bounds),
        "device": weight.device.type,
        "versions": {name: version(name) for name in ("cgspn", *PACKAGES)},
        "parity": [{"batch": p.batch, "height": p.height, "width": p.width, "relative_error": p.errors} for p in found],
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
