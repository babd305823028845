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
    sizes = sorted({row["px"] for row in timed})

    def paint(axes: Any) -> None:
        left, right = axes[0]
        for i, (name, title) in enumerate(config.students.items()):
            mine = [row for row in quality if row["student"] == name]
            shown = sorted({row["px"] for row in mine})
            left.plot(shown, [mean_over_seeds(mine, "cosine", px) for px in shown], "o-", color=f"C{i}", label=title)
            times = {row["px"]: row for row in timed if row["student"] == f"frontier: {name}"}
            bars = right.bar(
                [k + (i - 0.5) * 0.36 for k in range(len(sizes))],
                [times[px]["x the first"] for px in sizes],
                0.34,
                color=f"C{i}",
            )
            right.bar_label(bars, [f"{times[px]['x the first']:.1f}" for px in sizes])
        over_sizes(left, (row["px"] for row in quality), "cosine similarity to the teacher")
        left.set(yscale="linear", ylim=(0.9, 1), title="quality: a ViT-S, distilled on 1.5 million images")
        left.legend(loc="upper left")
        right.axhline(1, color="C3", linestyle="--", label="attention")
        right.set_xticks(range(len(sizes)), [f"{px} px" for px in sizes])
        right.set(ylabel="times as fast as attention", title="speed: the same design as an SO400M, one H100")
        right.legend(loc="upper left")

    draw(config.out, paint, columns=2, figsize=(12, 4.5))


if __name__ == "__main__":
    run(tyro.cli(HeadlineConfig, description=__doc__))
