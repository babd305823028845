"""From the rows of runs to results/resolution: JSON, a table and a plot.

python -m benchmarks.resolution.publish RUN/rows.json ... --out results/resolution
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cgspn.bench.results import table
from cgspn.models.checkpoint import write_atomically
from cgspn.report.drawing import draw, over_sizes

Row = dict[str, Any]


@dataclass(frozen=True)
class PublishConfig:
    """Settings.

    Args:
        runs: rows.json of each process of the study.
        out: folder for the results.
        name: of the files.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("results/resolution")
    name: str = "resolution"


TASKS = {
    "CamVid mIoU": "CamVid, mIoU of a linear probe on frozen tokens",
    "VOC animals mIoU": "VOC animals, mIoU of a linear probe on frozen tokens",
    "Caltech linear": "Caltech-101, accuracy of a linear probe on pooled tokens",
    "Caltech k-NN": "Caltech-101, accuracy of the nearest neighbour",
}


def mean_over_seeds(rows: Sequence[Row], key: str, px: int) -> float | None:
    """The mean of what some rows of one student have at a size; None if they have nothing."""
    found = [row[key] for row in rows if row["px"] == px and key in row]
    return statistics.mean(found) if found else None


def over_seeds(rows: Sequence[Row], key: str) -> list[Row]:
    """A row for each student and way of training: the mean of `key` over the seeds at each size, and the number of
    seeds."""
    digits = 4 if key in ("cosine", "relative error") else 1
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if key in row:
            found.setdefault((row["student"], row["trained"]), {}).setdefault(row["px"], []).append(row[key])
    return [
        {
            "student": student,
            "trained": trained,
            "seeds": max(map(len, sizes.values())),
            **{f"{px} px": f"{statistics.mean(values):.{digits}f}" for px, values in sorted(sizes.items())},
        }
        for (student, trained), sizes in found.items()
    ]


def blocks(rows: Sequence[Row]) -> list[Row]:
    """Stage 1's error of every sub-layer at every size, of the first seed of each student."""
    first = min(row["seed"] for row in rows)
    return [
        {
            "student": row["student"],
            "trained": row["trained"],
            "px": row["px"],
            **{name.removeprefix("block "): round(v, 3) for name, v in row["sublayers"].items()},
        }
        for row in rows
        if row["seed"] == first and row.get("sublayers")
    ]


def run(config: PublishConfig) -> None:
    """Write `name`.json, .md and .png."""
    runs = [json.loads(path.read_text()) for path in config.runs]
    rows: list[Row] = [row for part in runs for row in part["rows"]]
    # what was published before may be one of the runs: its settings are a list
    settings = [
        s for part in runs for s in (part["settings"] if isinstance(part["settings"], list) else [part["settings"]])
    ]
    content = {"machine": runs[0]["machine"], "settings": settings, "rows": rows}
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / f"{config.name}.json", json.dumps(content, indent=1) + "\n")
    parts = [f"# {config.name}", "\n".join(f"- {key}: {value}" for key, value in runs[0]["machine"].items())]
    names = {
        "cosine": "Cosine of the final grid tokens to the teacher's at the same size, held-out photographs",
        "relative error": "Relative squared error of the same",
        **TASKS,
    }
    for key, title in names.items():
        if found := over_seeds(rows, key):
            parts.append(f"## {title}\n\n{table(found)}")
    if found := blocks(rows):
        parts.append(f"## Stage 1: relative squared error of each sub-layer alone, by block\n\n{table(found)}")
    write_atomically(config.out / f"{config.name}.md", "\n\n".join(parts) + "\n")

    draw_sizes(rows, config.out / f"{config.name}.png")


def draw_sizes(rows: Sequence[Row], path: Path) -> None:
    """Cosine against size: a panel for each way of training, a colour for each student that was trained in all."""
    found = over_seeds(rows, "cosine")
    ways = list(dict.fromkeys(row["trained"] for row in found))
    students = [
        n for n in dict.fromkeys(r["student"] for r in found) if sum(r["student"] == n for r in found) == len(ways)
    ]
    titles = {"fixed": "trained at 224 px alone", "mixed": "trained at many sizes"}

    def paint(axes: Any) -> None:
        for ax, way in zip(axes[0], ways, strict=True):
            for row in found:
                if row["trained"] != way or row["student"] not in students:
                    continue
                points = [(int(k.removesuffix(" px")), float(v)) for k, v in row.items() if k.endswith(" px")]
                ax.plot(*zip(*points), "o-", color=f"C{students.index(row['student'])}", label=row["student"])
            over_sizes(ax, (row["px"] for row in rows if "cosine" in row), "cosine to the teacher")
            ax.set(yscale="linear", title=titles[way])
        axes[0][-1].legend(fontsize=8)

    draw(path, paint, columns=len(ways), figsize=(6 * len(ways), 5), sharey=True)


if __name__ == "__main__":
    run(tyro.cli(PublishConfig, description=__doc__))
