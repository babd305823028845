"""README's picture: quality and speed of the same students against resolution.

python -m benchmarks.frontier.headline results/resolution/at_scale.json results/frontier/speed.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks.resolution.publish import mean_over_seeds
from cgspn.report.drawing import draw, over_sizes

from .speed import LARGE

STUDENTS = {"values 12": "C-GSPN, no attention", "attention in 3": "C-GSPN, attention in a quarter of the layers"}


@dataclass(frozen=True)
class HeadlineConfig:
    """Settings.

    Args:
        quality: rows of `benchmarks.resolution`.
        speed: rows of `benchmarks.frontier.speed`.
        students: names in both files, and what the picture calls them.
        out: the picture.
    """

    quality: tyro.conf.Positional[Path]
    speed: tyro.conf.Positional[Path]
    students: dict[str, str] = field(default_factory=lambda: STUDENTS)
    out: Path = Path("results/frontier/headline.png")


def run(config: HeadlineConfig) -> None:
    """Draw it. Raises OSError for files that are not there."""
    quality, speed = (json.loads(path.read_text())["rows"] for path in (config.quality, config.speed))
    timed = [row for row in speed if row["model"] == LARGE]

    def cosines(student: str) -> tuple[list[int], list[float | None]]:
        mine = [row for row in quality if row["student"] == student]
        sizes = sorted({row["px"] for row in mine})
        return sizes, [mean_over_seeds(mine, "cosine", px) for px in sizes]

    def paint(axes: Any) -> None:
        left, right = axes[0]
        for i, (name, title) in enumerate(config.students.items()):
            left.plot(*cosines(name), "o-", color=f"C{i}", label=title)
            times = sorted((row["px"], row["x the first"]) for row in timed if row["student"] == f"frontier: {name}")
            right.plot(*zip(*times), "o-", color=f"C{i}", label=title)
            right.annotate(f"{times[-1][1]:.1f}", times[-1], xytext=(-10, 2), textcoords="offset points", ha="right")
        left.plot(*cosines("ViT"), "o--", color="C3", label="attention, trained afresh")
        over_sizes(left, (row["px"] for row in quality), "cosine similarity to the teacher")
        left.set(yscale="linear", ylim=(0.93, 1), title="quality: a ViT-S, distilled on 1.5 million images")
        left.legend(loc="lower left")
        right.axhline(1, color="C3", linestyle="--", label="attention")
        over_sizes(right, (row["px"] for row in timed), "times as fast as attention")
        right.set(yscale="linear", ylim=(0, None), title="speed: the same design as an SO400M, one H200")
        right.legend(loc="upper left")

    draw(config.out, paint, columns=2, figsize=(12, 4.5))


if __name__ == "__main__":
    run(tyro.cli(HeadlineConfig, description=__doc__))
