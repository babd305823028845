"""Quality against speed, one picture and one table: results/frontier.

python -m benchmarks.frontier results/resolution/students.json results/frontier/speed.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.resolution.publish import TASKS, mean_over_seeds
from cgspn.bench.results import table
from cgspn.models.checkpoint import write_atomically
from cgspn.report.drawing import draw

from .speed import LARGE

Row = dict[str, Any]


@dataclass(frozen=True)
class FrontierConfig:
    """Settings.

    Args:
        quality: rows of `benchmarks.resolution`.
        speed: rows of `benchmarks.frontier.speed`.
        px: sizes whose quality is shown.
        speed_px: sizes whose speed is shown.
        out: folder for frontier.json, .md and .png.
    """

    quality: tyro.conf.Positional[Path]
    speed: tyro.conf.Positional[Path]
    px: tuple[int, ...] = (224, 448, 756)
    speed_px: tuple[int, ...] = (1036, 2058)
    out: Path = Path("results/frontier")


def rows_of(config: FrontierConfig) -> list[Row]:
    """A row for each student that was trained and timed."""
    quality, speed = (json.loads(path.read_text())["rows"] for path in (config.quality, config.speed))
    found = []
    for student in dict.fromkeys(row["student"] for row in quality):
        mine = [row for row in quality if row["student"] == student]
        times = {
            (r["model"], r["px"]): r
            for r in speed
            if r["student"].removeprefix("frontier: ") == student and r["px"] in config.speed_px
        }
        if not times or "cosine" not in mine[0]:
            continue
        row: Row = {"student": student, "seeds": len({r["seed"] for r in mine})}
        row |= {f"cosine {px}": mean_over_seeds(mine, "cosine", px) for px in config.px}
        row |= {f"{task} 448": mean_over_seeds(mine, task, 448) for task in TASKS}
        for (model, px), timed in times.items():
            name = "SO400M" if model == LARGE else "ViT-S"
            row |= {
                f"{name} {px} px, ms an image": timed["ms an image"],
                f"{name} {px} px, x ViT": timed["x the first"],
            }
        found.append(row)
    return found


def run(config: FrontierConfig) -> None:
    """Write the table, its rows and the picture."""
    rows = rows_of(config)
    machines = {path.stem: json.loads(path.read_text())["machine"] for path in (config.quality, config.speed)}
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / "frontier.json", json.dumps({"machine": machines, "rows": rows}, indent=1) + "\n")
    head = "\n".join(
        f"- {name}: {m['command']}; {m['gpu']}, torch {m['torch']}, commit {m['commit']}"
        for name, m in machines.items()
    )
    shown = [{k: f"{v:.4f}" if k.startswith("cosine") and v is not None else v for k, v in row.items()} for row in rows]
    write_atomically(config.out / "frontier.md", f"# frontier\n\n{head}\n\n{table(shown)}\n")
    sizes = sorted({key for row in rows for key in row if key.startswith("SO400M") and key.endswith("an image")})

    low, high = config.px[0], config.px[-1]
    label = f"cosine to the teacher, of a ViT-S, at {high} px (line: to {low} px)"

    def paint(axes: Any) -> None:
        for ax, size in zip(axes[0], sizes):
            for row in (row for row in rows if size in row):
                x, y = row[size], row[f"cosine {high}"]
                colour = "C3" if row["student"] == "ViT" else "C0"
                ax.plot([x, x], [y, row[f"cosine {low}"]], "-", color=colour, alpha=0.4)
                ax.plot(x, y, "o", color=colour)
                ax.annotate(row["student"], (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
            ax.set(xscale="log", xlabel=size.replace("SO400M", "SO400M encoder at"), ylabel=label)
            ax.grid(alpha=0.3)

    draw(config.out / "frontier.png", paint, columns=max(1, len(sizes)), figsize=(7 * max(1, len(sizes)), 5.5))


if __name__ == "__main__":
    run(tyro.cli(FrontierConfig, description=__doc__))
