"""The loss of quality from FP8 MLPs, on real features, and the time they save.

    python -m benchmarks.fp8 quality --photos SHARD.tar --weights vit_s14.safetensors --out results/fp8
    python -m benchmarks.fp8 speed --out results/fp8

`quality` writes quality.json and .md, in minutes on a CPU, where FP8 is emulated exactly, except that sums are float32
while Hopper's have fewer bits. `speed` writes speed.json and .md; on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cgspn.bench.contenders import FUSED_MLP, OURS, Shape, build, names
from cgspn.bench.machine import ceilings, free
from cgspn.bench.results import write
from cgspn.bench.timing import medians
from cgspn.data import ImageSet, load_embedded, resize
from cgspn.data.transforms import normalize, to_float
from cgspn.environment import describe
from cgspn.evaluate import cosine, relative_mse
from cgspn.evaluate.suite import embed_set, evaluate_zeroshot
from cgspn.layers import Fp8Mlp, Grid, fp8, quantize_mlps
from cgspn.layers.mlp import Mlp
from cgspn.models.dual import DualEncoder
from cgspn.models.encoder import Encoder
from cgspn.teachers import load_embedded_teacher, load_encoder

from .quality import TESTED
from .resolution.photographs import read_tar, square

Row = dict[str, Any]


@dataclass(frozen=True)
class Fp8QualityConfig:
    """Settings of the quality measurement.

    Args:
        photos: image-text shard (tar with .jpg files).
        weights: weight file of the encoder whose features are compared.
        sizes: pairs of image size in pixels and number of photographs, the first ones of the shard.
        batch: number of images per call.
        test_images: number of embedded test images for zero-shot accuracy, at most 4000.
    """

    photos: Path
    weights: Path
    sizes: tuple[tuple[int, int], ...] = ((224, 100), (518, 8))
    batch: int = 4
    test_images: int = 4000


def precisions(encoder: Encoder) -> dict[str, Encoder]:
    """Copies of a float32 encoder: itself as the reference, in bfloat16, with FP8 MLPs, and with both."""
    short = copy.deepcopy(encoder).to(torch.bfloat16)
    return {
        "float32": encoder,
        "bfloat16": short,
        "float32, MLPs in fp8": quantize_mlps(copy.deepcopy(encoder)),
        "bfloat16, MLPs in fp8": quantize_mlps(copy.deepcopy(encoder)).to(torch.bfloat16),
    }


@torch.inference_mode()
def outputs(encoder: Encoder, images: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Final grid tokens [N, h, w, C] and pooled [N, C] of normalised images, float32."""
    dtype = next(encoder.parameters()).dtype
    found = [encoder(part.to(dtype)) for part in images.split(batch)]
    return torch.cat([out.tokens.float() for out in found]), torch.cat([out.pooled.float() for out in found])


def feature_rows(config: Fp8QualityConfig, say: Callable[[str], object]) -> list[Row]:
    """Similarity of final features to those in float32, for every size and precision."""
    encoder = load_encoder(config.weights)
    photos = read_tar(config.photos, "image", lambda image: square(image, TESTED))
    models = precisions(encoder)
    rows: list[Row] = []
    for pixels, count in config.sizes:
        images = to_float(torch.stack(photos[:count]))
        images = normalize(resize(images, (pixels, pixels)), encoder.config.image_mean, encoder.config.image_std)
        wanted = None
        for name, model in models.items():
            tokens, pooled = outputs(model, images, config.batch)
            if wanted is None:
                wanted = tokens, pooled
                continue
            row: Row = {"px": pixels, "images": len(images), "precision": name}
            row |= {"cosine of tokens": f"{cosine(tokens, wanted[0]):.5f}"}
            row |= {"squared relative error of tokens": f"{relative_mse(tokens, wanted[0]):.2e}"}
            row |= {"cosine of pooled": f"{cosine(pooled, wanted[1]):.5f}"}
            row |= {"squared relative error of pooled": f"{relative_mse(pooled, wanted[1]):.2e}"}
            rows.append(row)
            say(", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


class InDtype(torch.nn.Module):
    """An encoder of any dtype with float32 inputs and outputs."""

    def __init__(self, encoder: Encoder) -> None:
        """encoder: of any dtype."""
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(self, images: Tensor) -> Any:
        """Images [B, channels, H, W], float32 -> the encoder's outputs in float32."""
        out = self.encoder(images.to(next(self.encoder.parameters()).dtype))
        return type(out)(out.tokens.float(), out.pooled.float())


def zeroshot_rows(config: Fp8QualityConfig, say: Callable[[str], object]) -> list[Row]:
    """Zero-shot accuracy of the embedded image-text model, and the number of images whose predicted class changes."""
    teacher = load_embedded_teacher()
    test: ImageSet = load_embedded("test").subset(torch.arange(config.test_images))
    rows: list[Row] = []
    wanted = None
    for name, encoder in precisions(copy.deepcopy(teacher.image)).items():
        model: DualEncoder = copy.deepcopy(teacher)
        model.image = InDtype(encoder).eval()  # type: ignore[assignment]
        embeddings, _ = embed_set(model, test)
        wanted = embeddings if wanted is None else wanted
        row: Row = {"images": len(test), "precision": name}
        row |= {"zero-shot top-1 (%)": f"{100 * evaluate_zeroshot(model, test):.2f}"}
        row |= {"cosine of embeddings": f"{cosine(embeddings, wanted):.5f}"}
        rows.append(row)
        say(", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def quality(
    config: Fp8QualityConfig,
    out: Path = Path("runs/bench"),
    commit: str = "",
    say: tyro.conf.Suppress[Callable[[str], object]] = print,
) -> dict[str, list[Row]]:
    """Measure the loss of quality from FP8 MLPs. Raises OSError for missing files.

    Args:
        config: photographs, weights, sizes.
        out: folder for quality.json and .md.
        commit: commit to record in the results; by default that of the working tree.
        say: called with each line of progress.
    """
    tables = {"features": feature_rows(config, say), "the embedded image-text model": zeroshot_rows(config, say)}
    machine = describe(commit, "python -m benchmarks.fp8") | {
        "products of 8 bits": fp8.unsupported_reason(torch.device("cpu")) or "",
    }
    write(out, "quality", machine, tables)
    return tables


def mlp_rows(shape: Shape, pixels: int, batch: int, device: torch.device, rounds: int) -> list[Row]:
    """Time the MLP half of a block without its norm, and its parts, in 16 bits and in FP8, interleaved."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = Mlp(shape.width, shape.hidden, "gelu_tanh").to(device, dtype)
    tokens = batch * (pixels // shape.patch) ** 2
    x, residual = (torch.randn(tokens, shape.width, device=device, dtype=dtype) for _ in range(2))
    mlp = Fp8Mlp(plain)
    values, scales, ahead = fp8.fp8_rows(x, mlp.steep, mlp.offset)
    first, second = mlp.fc1, mlp.fc2
    one = (values, scales, first.weight, first.scales, first.bias, ahead, "gelu_tanh")
    two = (residual, fp8.fp8_linear_activate(*one), ahead, second.weight, second.scales)
    calls: dict[str, Callable[[], object]] = {
        "bf16, residual added after": lambda: residual + plain(x),
        "bf16, epilogues": lambda: plain.adder(x)(residual),
        "fp8": lambda: mlp.adder(x)(residual),
        "of fp8: tokens to 8 bits": lambda: fp8.fp8_rows(x, mlp.steep, mlp.offset),
        "of fp8: fc1 and GELU": lambda: fp8.fp8_linear_activate(*one),
        "of fp8: fc2 and residual": lambda: fp8.fp8_linear_onto(*two),
    }
    with torch.no_grad():
        times = medians(calls, rounds=rounds, graph=False)
    flop = 2 * tokens * shape.width * shape.hidden
    products = {name: 2 if name.startswith(("bf16", "fp8")) else 1 for name in calls if "8 bits" not in name}
    best = times["bf16, epilogues"]
    return [
        {"px": pixels, "B": batch, "MLP half": name, "ms": ms}
        | {"TFLOP/s": products[name] * flop / ms / 1e9 if name in products else None}
        | {"bf16, epilogues / this": best / ms if not name.startswith("of") else None}
        for name, ms in times.items()
    ]


def block_rows(shape: Shape, pixels: int, batch: int, device: torch.device, rounds: int) -> list[Row]:
    """Time whole attention and C-GSPN blocks with the same MLP in 16 bits and in FP8, interleaved."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = pixels // shape.patch
    grid = Grid(side, side)
    tokens = torch.randn(batch, grid.tokens, shape.width, device=device, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for mixer in [n for n in names(device) if n.endswith(FUSED_MLP) or n == OURS]:
        for way in ("bf16", "fp8"):
            name = f"{mixer.removesuffix(FUSED_MLP)}, MLP {way}"
            rows[name] = {"px": pixels, "B": batch, "block": name}
            contender = build(mixer, shape, device, dtype)
            if way == "fp8":
                quantize_mlps(contender.block)

            def call(contender: Any = contender) -> object:
                with torch.no_grad():
                    return contender.whole(tokens, grid)

            try:
                call()
                calls[name] = call
            except RuntimeError as error:  # what cannot run here is said, not left out; out of memory is one of them
                rows[name]["note"] = str(error).strip().splitlines()[0][:80]
                free(device)
    for name, ms in medians(calls, rounds=rounds, graph=False).items():
        rows[name] |= {"ms": ms}
    for row in rows.values():
        same = rows[row["block"].partition(", MLP")[0] + ", MLP bf16"]
        row["bf16 / this"] = same["ms"] / row["ms"] if "ms" in row and "ms" in same else None
    return list(rows.values())


def speed(
    out: Path = Path("runs/bench"),
    sizes: tuple[int, ...] = (1036, 2058),
    batch: int = 32,
    rounds: int = 5,
    shape: Shape = Shape(),  # noqa: B008 - frozen
    commit: str = "",
) -> dict[str, list[Row]]:
    """Measure the time that FP8 MLPs save, for the MLP half of a block and for whole blocks.

    Args:
        out: folder for speed.json and .md.
        sizes: side lengths of the square images in pixels.
        batch: number of images per call.
        rounds: number of interleaved timings of each.
        shape: dimensions of the blocks.
        commit: commit to record in the results; by default that of the working tree.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    halves, blocks = (
        [row for px in sizes for row in rows(shape, px, batch, device, rounds)] for rows in (mlp_rows, block_rows)
    )
    tables = {"the MLP half in 16 and 8 bits": halves, "blocks with MLPs in 16 and 8 bits": blocks}
    write(out, "speed", describe(commit, "python -m benchmarks.fp8") | ceilings(device), tables)
    return tables


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"quality": quality, "speed": speed}, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
