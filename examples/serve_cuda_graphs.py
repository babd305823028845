"""Serve an encoder with low latency: a few shapes, each recorded once as a CUDA graph and replayed for every request.

    python examples/serve_cuda_graphs.py --model cgspn_so400m_patch14_378 --sizes 378 1036
    python examples/serve_cuda_graphs.py --student runs/student

Without a GPU the encoder runs eagerly behind the same interface, so that a service can be written and tested anywhere.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cgspn
from cgspn.models import choose_shapes, encode_variable_size


class Service:
    """Images of any size in, pooled vectors out; every request runs at one of a few grids of patches."""

    def __init__(self, encoder: cgspn.Encoder, sizes: Sequence[tuple[int, int]], shapes: int) -> None:
        """sizes: (height, width) in pixels that requests are expected to have; shapes: how many grids serve them."""
        patch = encoder.config.patch_size
        self.shapes = choose_shapes([(height // patch, width // patch) for height, width in sizes], shapes)
        on_gpu = next(encoder.parameters()).is_cuda
        self.encoder = encoder.eval().captured(limit=4 * shapes) if on_gpu else encoder.eval()
        self.patch = patch

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """image [3, H, W] on the encoder's device -> [C]. The padding to a grid changes nothing in the result."""
        (output,) = encode_variable_size(self.encoder, [image], shapes=self.shapes)
        return output.pooled

    def warm_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Record every grid before the first request waits for it."""
        for rows, columns in self.shapes:
            self(torch.zeros(3, rows * self.patch, columns * self.patch, device=device, dtype=dtype))


def milliseconds(call: Callable[[], Tensor], repeats: int) -> float:
    """Median time of a call, with the wait for the device."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call().sum().item()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest relative difference between a served vector and the encoder's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="cgspn_tiny_patch14_378", help="a name of cgspn.list_models(), random weights"
    )
    parser.add_argument("--student", help="a checkpoint in its place")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[112, 168], help="heights and widths of requests, pixels"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = cgspn.load_encoder(options.student) if options.student else cgspn.create_model(options.model)
    encoder = encoder.to(device, dtype).eval()

    sizes = [(height, width) for height in options.sizes for width in options.sizes]
    service = Service(encoder, sizes, shapes=min(3, len(sizes)))
    service.warm_up(device, dtype)
    print(f"{device}: {len(sizes)} sizes served at the grids {service.shapes}")
    worst = 0.0
    for height, width in sizes:
        image = torch.randn(3, height, width, device=device, dtype=dtype)
        with torch.inference_mode():
            own = encoder(image[None]).pooled[0]
            eager = milliseconds(lambda image=image: encoder(image[None]).pooled, options.repeats)
        served = milliseconds(lambda image=image: service(image), options.repeats)
        error = ((service(image) - own).norm() / own.norm()).item()
        print(
            f"{height} x {width} px: served in {served:.1f} ms, eager {eager:.1f} ms, relative difference {error:.1e}"
        )
        worst = max(worst, error)
    return worst


if __name__ == "__main__":
    main()
