"""Inference of one image on a CPU by teacher and student, and the size from which the student is faster.

    OMP_NUM_THREADS=1 python -m benchmarks.inference --models small --sizes 224 518 --out results/teachers

Writes inference.json, .md and .png. `OMP_NUM_THREADS` sets PyTorch's number of threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from cgspn.bench.checks import at_least, known, not_empty, tiled_by
from cgspn.bench.results import write
from cgspn.environment import describe
from cgspn.models.encoder import Encoder
from cgspn.models.registry import create_model, model_config
from cgspn.report.drawing import draw, over_sizes

Row = dict[str, Any]
KINDS = ("vit", "cgspn")  # teacher and student


@dataclass(frozen=True)
class InferenceConfig:
    """Settings.

    Args:
        models: model sizes in `cgspn.list_models()`; each has a `vit_` teacher and a `cgspn_` student, in float32.
        sizes: side lengths of the square image in pixels.
        blocks: maximum number of blocks of each encoder. All blocks of an encoder cost the same, and whole large
            encoders take minutes.
        rounds: number of timings of each, teacher and student in turn. The median counts.
    """

    models: tuple[str, ...] = ("small", "base", "so400m")
    sizes: tuple[int, ...] = (224, 378, 518, 756, 1036)
    blocks: int = 4
    rounds: int = 5

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be measured, or a model that does not exist."""
        not_empty(self, "models", "sizes")
        at_least(self, 1, "blocks", "rounds")
        models = [name_of(kind, size) for size in self.models for kind in KINDS]
        known("models", models)
        tiled_by("sizes", self.sizes, models)


def name_of(kind: str, size: str) -> str:
    """The name of the model of one of `KINDS` and a size."""
    return f"{kind}_{size}_patch14_378"


def build(kind: str, size: str, blocks: int) -> Encoder:
    """The first blocks of a model with its patch embedding and pooling. Raises ValueError for an unknown model."""
    name = name_of(kind, size)
    return create_model(name, mixers=model_config(name).mixers[:blocks]).eval()


@torch.inference_mode()
def seconds(models: list[Encoder], pixels: int, rounds: int) -> list[float]:
    """Median seconds of one image through each model. The models run in turn, after a warm-up run."""
    images = torch.randn(1, models[0].config.channels, pixels, pixels)
    times: list[list[float]] = [[] for _ in models]
    for counted in range(rounds + 1):
        for model, found in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            if counted:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def crossover(rows: list[Row]) -> str:
    """The smallest measured size from which on every ratio is above 1, as text."""
    rows = sorted(rows, key=lambda row: row["pixels"])
    slower = [k for k, row in enumerate(rows) if row["teacher / student"] <= 1]
    first = slower[-1] + 1 if slower else 0
    if first == len(rows):
        return f"slower at every size up to {rows[-1]['pixels']} px"
    return f"faster from {rows[first]['pixels']} px up"


def run(config: InferenceConfig, out: Path, *, commit: str = "", say: Callable[[str], None] = print) -> None:
    """Measure, and write inference.json, .md and .png to `out`. Raises ValueError for an unknown model."""
    torch.manual_seed(0)
    tables: dict[str, list[Row]] = {}
    found: dict[str, str] = {}
    for size in config.models:
        models = [build(kind, size, config.blocks) for kind in KINDS]
        rows: list[Row] = []
        for pixels in config.sizes:
            patch = models[0].config.patch_size
            teacher, student = seconds(models, pixels, config.rounds)
            tokens = (pixels // patch) ** 2
            row = {"pixels": pixels, "tokens": tokens, "teacher ms": 1e3 * teacher, "student ms": 1e3 * student}
            rows.append(row | {"teacher / student": teacher / student})
            say(
                f"{size}, {pixels} px: teacher {1e3 * teacher:.0f} ms, student {1e3 * student:.0f} ms, "
                f"{teacher / student:.2f} times as fast"
            )
        found[size] = crossover(rows)
        say(f"{size}: the student is {found[size]}")
        tables[f"{size}, {models[0].config.depth} blocks, C = {models[0].config.width}: {found[size]}"] = rows
    about = describe(commit, "python -m benchmarks.inference") | {
        "images": "B = 1, float32",
        "threads": str(torch.get_num_threads()),
    }
    write(out, "inference", about, tables)
    plot(tables, out / "inference.png")


def plot(tables: dict[str, list[Row]], path: Path) -> None:
    """Plot milliseconds per image over the image size, with a panel for each model size."""

    def paint(axes: Any) -> None:
        for ax, (title, found) in zip(axes[0], tables.items()):
            rows = sorted(found, key=lambda row: row["pixels"])
            for kind in ("teacher", "student"):
                ax.plot([row["pixels"] for row in rows], [row[f"{kind} ms"] for row in rows], "o-", label=kind)
            over_sizes(ax, (row["pixels"] for row in rows), "ms")
            ax.set_title(title, fontsize=8)
            ax.legend(fontsize=8)

    draw(path, paint, columns=len(tables), figsize=(5 * len(tables), 4))


def main(config: InferenceConfig = InferenceConfig(), out: Path = Path("runs/bench"), commit: str = "") -> None:
    """Measure and write.

    Args:
        config: settings.
        out: folder for the results: JSON, a table and a plot.
        commit: commit to record in the results; by default that of the working tree.
    """
    run(config, out, commit=commit)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
