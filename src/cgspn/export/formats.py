"""The export formats: torch.export program, AOTInductor package, and ONNX graph with standard operators."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..compat import cpp_compiler, private
from .bounds import Bounds
from .trace import ImageSide, trace

Format = Literal["onnx", "torch", "aot"]
Runner = Callable[[Tensor], Sequence[Tensor]]
Say = Callable[[str], object]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2"}
LOADER: dict[Format, str] = {
    "onnx": "onnxruntime, or any runtime of opset 18; only standard operators",
    "torch": "import cgspn.ops, then torch.export.load(path).module(): propagate_2d is a custom operator",
    "aot": "import cgspn.ops, then torch._inductor.aoti_load_package(path): propagate_2d is a custom operator that "
    "runs in Python, so a loader without Python cannot run the package; its code is for the kind of machine it was "
    "compiled on",
}


def write_torch(side: ImageSide, bounds: Bounds, path: Path, say: Say) -> None:
    """Save a torch.export program (.pt2). Raises OSError, and torch's errors if the model cannot be traced."""
    say("tracing the encoder and saving the program")
    torch.export.save(trace(side, bounds), path)


def write_aot(side: ImageSide, bounds: Bounds, path: Path, say: Say) -> None:
    """Compile and save an AOTInductor package (.pt2). Raises ValueError without a C++ compiler."""
    if cpp_compiler() is None:
        raise ValueError("format is 'aot', which needs a C++ compiler: install g++ or clang; 'onnx' and 'torch' do not")
    say("tracing the encoder")
    program = trace(side, bounds)
    say("compiling it for this machine, which may take minutes")
    private("_inductor.aoti_compile_and_package")(program, package_path=str(path))


def write_onnx(side: ImageSide, bounds: Bounds, path: Path, say: Say) -> None:
    """Save `side`, float32 on the CPU, as ONNX (opset 18, no custom operators). Raises ValueError without onnx."""
    check_onnx()
    from .onnx_scan import propagate_2d_onnx
    from .onnx_sizes import name_axes, refuse_other_sizes

    with _quiet():
        say("tracing the encoder")
        traced = trace(side, bounds, onnx=True)
        say("translating it to ONNX operators, which may take minutes")
        program = torch.onnx.export(
            traced,
            (),
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            output_names=side.names,
            custom_translation_table={torch.ops.cgspn.propagate_2d.default: propagate_2d_onnx},
            verbose=False,
        )
    assert program is not None
    name_axes(program.model.graph)
    refuse_other_sizes(program.model.graph, bounds)
    size = sum(p.numel() * p.element_size() for p in side.parameters())
    program.save(str(path), external_data=size > 1.9e9)  # protobuf is limited to 2 GB


def check_onnx() -> None:
    """Raise ValueError, naming the extra, if a package that ONNX export or its check needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"format is 'onnx', which needs {error.name}; install cgspn[export]") from error


WRITERS: dict[Format, Callable[[ImageSide, Bounds, Path, Say], None]] = {
    "onnx": write_onnx,
    "torch": write_torch,
    "aot": write_aot,
}


def open_file(path: Path, format: Format) -> Runner:
    """Load a file with the format's runtime, as a function: images [B, channels, H, W] -> outputs in order."""
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aot":
        package: Runner = private("_inductor.aoti_load_package")(str(path))
        return package
    check_onnx()
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.cpu().numpy()})]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about torchvision, which is not used, and about deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
