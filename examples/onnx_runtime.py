"""Export a student to ONNX and run it with ONNX Runtime, without PyTorch: any batch, height and width in the bounds.

pip install 'cgspn[export]'
python examples/onnx_runtime.py
python examples/onnx_runtime.py --student runs/student --max-size 1036
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import cgspn
from cgspn.export import export_model


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest relative error of ONNX Runtime's tokens to PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="checkpoint; a small random encoder if left out")
    parser.add_argument("--max-size", type=int, default=84, help="largest height and width, in pixels")
    options = parser.parse_args(arguments)
    if options.student:
        encoder = cgspn.load_encoder(options.student).eval()
    else:
        small = {"mixers": ("propagation",), "image_size": (56, 56)}
        encoder = cgspn.create_model("cgspn_tiny_patch14_378", **small).eval()

    path = Path(tempfile.mkdtemp()) / "encoder.onnx"
    export_model(encoder, path, format="onnx", max_size=options.max_size, max_batch=4)
    about = json.loads(path.with_name(path.name + ".json").read_text())  # what a server has to know
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, described by {sorted(about)}")

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    worst, patch = 0.0, encoder.config.patch_size
    for batch, height, width in ((1, 4 * patch, 4 * patch), (2, 4 * patch, 6 * patch), (3, 3 * patch, 5 * patch)):
        pixels = np.random.default_rng(0).standard_normal((batch, 3, height, width), dtype=np.float32)
        found = dict(zip(names, session.run(None, {images.name: pixels}), strict=True))
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(pixels)).tokens.numpy()
        error = np.linalg.norm(found["tokens"] - expected) / np.linalg.norm(expected)
        print(f"{batch} images of {height} x {width}: tokens {found['tokens'].shape}, relative error {error:.1e}")
        worst = max(worst, float(error))
    return worst


if __name__ == "__main__":
    main()
