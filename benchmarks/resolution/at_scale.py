"""Students trained by `cgspn distill` itself, from shards and on several GPUs: what it starts from, and what came out.

python -m benchmarks.resolution.at_scale start vit_s14.safetensors --rows 'frontier: values 6' --out starts
torchrun --nproc-per-node 4 -m cgspn.cli distill vit_s14.safetensors runs/values-6 --student starts/values-6 ...
python -m benchmarks.resolution.at_scale measure vit_s14.safetensors runs/values-6 --held held.tar --tasks data
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from cgspn import load_encoder

from .measure import scores
from .photographs import read_tar, square
from .rows import write_rows
from .students import STUDENTS
from .tasks import Tasks


def folder_name(row: str) -> str:
    """A row of `STUDENTS` as a folder's name."""
    return row.removeprefix("frontier: ").replace(", ", "_").replace(" ", "-")


@dataclass(frozen=True)
class Start:
    """Convert the teacher.

    Args:
        teacher: a checkpoint that `cgspn.load_encoder` reads.
        rows: which of `STUDENTS`.
        seed: of fresh weights.
        out: a folder for each row goes here.
    """

    teacher: tyro.conf.Positional[Path]
    rows: tuple[str, ...]
    seed: int = 0
    out: Path = Path("build/starts")

    def run(self) -> None:
        """Raises OSError, or KeyError for rows that are not there."""
        teacher = load_encoder(self.teacher)
        for row in self.rows:
            STUDENTS[row].of(teacher, self.seed).save_pretrained(self.out / folder_name(row))


@dataclass(frozen=True)
class Measure:
    """Compare students with their teacher, and score them on tasks.

    Args:
        teacher: the checkpoint that taught them.
        students: folders of `cgspn distill`.
        held: a shard of photographs that they were not trained with.
        teacher_tasks: score the teacher too.
        px: sizes of the comparison in pixels.
        tasks: folder of the sets of `tasks.py`; None for none.
        task_px: sizes of the tasks in pixels.
        source: side of the squares that photographs are kept as, in pixels.
        out: file for the rows.
    """

    teacher: tyro.conf.Positional[Path]
    students: tyro.conf.Positional[tuple[Path, ...]]
    held: Path
    teacher_tasks: bool = False
    px: tuple[int, ...] = (112, 224, 336, 448, 518, 756, 1036)
    tasks: Path | None = None
    task_px: tuple[int, ...] = (224, 448, 756)
    source: int = 256
    out: Path = Path("build/at_scale/rows.json")

    def run(self) -> None:
        """Raises OSError for what is not there."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = load_encoder(self.teacher).to(device).eval()
        held = torch.stack(read_tar(self.held, "image", lambda image: square(image, self.source))).to(device)
        tasks = Tasks(self.tasks, device) if self.tasks else None
        rows: list[dict[str, Any]] = []
        if tasks is not None and self.teacher_tasks:
            rows += [
                {"student": "teacher", "seed": 0, "trained": "", "px": px, **tasks.scores(teacher, px)}
                for px in self.task_px
            ]
        for folder in self.students:
            student = load_encoder(folder).to(device).eval()
            record = json.loads((folder / "distill.json").read_text())
            run = {"student": folder.name, "seed": record["config"]["stage1"]["seed"], "trained": "mixed"}
            run |= {key: record[key] for key in ("command", "processes", "throughput", "peak_memory")}
            for px in self.px:
                row = {**run, "px": px, **scores(student, teacher, held, px)}
                if tasks is not None and px in self.task_px:
                    row |= tasks.scores(student, px)
                rows.append(row)
                print(folder.name, px, round(row["cosine"], 4), flush=True)
                write_rows(self.out, "benchmarks.resolution.at_scale", self, rows)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"start": Start, "measure": Measure}, description=__doc__).run()
