"""Milliseconds an image of SO400M encoders (and ViT-S ones) made as the students of the study are, from CUDA graphs.

python -m benchmarks.frontier.speed --out results/frontier
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.resolution.students import FRONTIER, STUDENTS, Student
from cgspn.bench.machine import ceilings, free
from cgspn.bench.timing import medians
from cgspn.environment import describe
from cgspn.layers import AttentionMixer, WindowAttentionMixer
from cgspn.models.checkpoint import write_atomically
from cgspn.models.config import EncoderConfig
from cgspn.models.encoder import Encoder
from cgspn.models.registry import model_config
from cgspn.teachers import convert

LARGE, SMALL = "vit_so400m_patch14_378", "vit_small_patch14_378"


@dataclass(frozen=True)
class SpeedConfig:
    """Settings.

    Args:
        rows: which students, the ViT first; empty for it and all of the frontier.
        models: teachers whose students are timed.
        sizes: (pixels, images at once).
        rounds: interleaved timings of each.
        out: folder for speed.json.
    """

    rows: tuple[str, ...] = ()
    models: tuple[str, ...] = (LARGE, SMALL)
    sizes: tuple[tuple[int, int], ...] = ((1036, 8), (2058, 2))
    rounds: int = 5
    out: Path = Path("results/frontier")


def scaled(layers: Any, depth: int, taken: Sequence[int] = (), of: int = 12) -> Any:
    """The same share of `depth` layers as of `of`: for a number a number, for layers the nearest that are not taken."""
    if isinstance(layers, int):
        return round(layers * depth / of)
    free = [layer for layer in range(depth) if layer not in taken]

    def away(layer: int) -> float:
        return min((abs((layer + 0.5) / depth - (i + 0.5) / of) for i in layers), default=0.0)

    return tuple(sorted(sorted(free, key=away)[: round(len(layers) * depth / of)]))


def config_of(student: Student, teacher: EncoderConfig) -> EncoderConfig:
    """The config of a large encoder with the recipe of a student of a ViT-S.

    The same share of its layers keeps attention or has windows, and the latent has as many channels: 64 at s = 6 of 384
    and at s = 18 of 1152.
    """
    if student.attention:
        return teacher
    arguments = {"compression": 6, **student.convert}
    arguments["compression"] *= teacher.width / 384
    positions = arguments.pop("keep_positions", False)
    kept = arguments["keep_attention"] = scaled(arguments.get("keep_attention", ()), teacher.depth)
    if "window_attention" in arguments:
        taken = () if isinstance(kept, int) else kept
        arguments["window_attention"] = scaled(arguments["window_attention"], teacher.depth, taken)
    with torch.device("meta"):
        return replace(convert(Encoder(teacher), **arguments).config, positions=positions)


@torch.no_grad()
def step(encoder: Encoder, images: torch.Tensor) -> object:
    """One forward pass."""
    return encoder(images)


def run(config: SpeedConfig) -> None:
    """Measure and write; rows that need the same teacher and size are interleaved."""
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    names = config.rows or ("ViT", *(f"frontier: {name}" for name in FRONTIER))
    machine = describe(program="python -m benchmarks.frontier.speed") | ceilings(device)
    for model in config.models:
        for pixels, batch in config.sizes:
            teacher = replace(model_config(model), image_size=(pixels, pixels))
            calls: dict[str, Callable[[], object]] = {}
            layers: dict[str, dict[str, int]] = {}
            for name in names:
                with torch.device(device):
                    encoder = Encoder(config_of(STUDENTS[name], teacher)).to(torch.bfloat16).eval()
                images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=torch.bfloat16)
                calls[name] = partial(step, encoder, images)
                kinds = [type(block.mixer) for block in encoder.blocks]
                layers[name] = {
                    "attention layers": kinds.count(AttentionMixer),
                    "window layers": kinds.count(WindowAttentionMixer),
                }
            times = medians(calls, rounds=config.rounds, target_ms=1.0)
            first = next(iter(times.values()))
            for name, ms in times.items():
                row = {"student": name, "model": model, "px": pixels, "B": batch, "ms an image": ms / batch}
                row |= layers[name]
                rows.append(row | {"x the first": first / ms})
                print(row | {"x the first": round(first / ms, 2)}, flush=True)
            calls.clear()
            free(device)
            config.out.mkdir(parents=True, exist_ok=True)
            write_atomically(config.out / "speed.json", json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    run(tyro.cli(SpeedConfig, description=__doc__))
