"""Train students at one size or at many, and measure each at every size.

python -m benchmarks.resolution vit_s14.safetensors --photos 'photos256-*.tar' --rows 'values 6' ViT --out out
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from cgspn import load_encoder
from cgspn.data import scheduled
from cgspn.distill import DistillConfig, LossConfig, OptimConfig, SizeRange, distill
from cgspn.distill.batches import batch_shapes
from cgspn.models.encoder import Encoder

from .measure import scores, sublayer_errors
from .photographs import load_photographs
from .recipe import LOSS, two_stages
from .rows import write_rows
from .students import STUDENTS
from .tasks import Tasks


@dataclass(frozen=True)
class StudyConfig:
    """Settings of the study.

    Args:
        teacher: a checkpoint that `cgspn.load_encoder` reads.
        photos: shards of photographs; patterns are taken.
        rows: which of `STUDENTS`.
        seeds: of each row, one run each.
        trained: "fixed" at `size`, "mixed" over `sizes`, or both, one run each.
        size: pixels of training at one size.
        sizes: the mix.
        px: sizes to measure at.
        steps: of stage 1 and of stage 2.
        batch_size: images a step, of `size`.
        rates: peak learning rates of stage 1 (Muon) and stage 2 (`optimizer`).
        optimizer: of stage 2.
        inherited_rate: learning rate multiplier of the teacher's weights in stage 2.
        blends: mixup and CutMix in both stages.
        smallest_crop: fraction of a photograph's area.
        loss: of stage 2.
        held_out: photographs to measure with.
        source: side of the squares that photographs are kept as, in pixels.
        out: folder for the rows, and for students with `save`.
        save: keep the students.
        tasks: folder of the sets of `tasks.py`, measured at `task_px`; None for none.
        task_px: sizes of the tasks in pixels.
        teacher_tasks: measure the teacher on them too.
    """

    teacher: tyro.conf.Positional[Path]
    photos: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    trained: tuple[str, ...] = ("mixed",)
    size: int = 224
    sizes: SizeRange = field(default_factory=SizeRange)
    px: tuple[int, ...] = (112, 224, 336, 448, 518, 756)
    steps: tuple[int, int] = (400, 800)
    batch_size: int = 64
    rates: tuple[float, float] = (1e-2, 1e-3)
    optimizer: Literal["adamw", "muon"] = "muon"
    inherited_rate: float = 0.2
    blends: bool = False
    smallest_crop: float = 0.08
    loss: LossConfig = LOSS
    held_out: int = 200
    source: int = 256
    out: Path = Path("build/resolution")
    save: bool = False
    tasks: Path | None = None
    task_px: tuple[int, ...] = (224, 448, 756)
    teacher_tasks: bool = False


def images_of(student: Encoder, settings: DistillConfig, part: str) -> int:
    """How many images a stage sees."""
    optim: OptimConfig = getattr(settings, part)
    size = settings.image_size or student.config.image_size[0]
    shapes = batch_shapes(student.config, (size, size), optim, 1, settings.sizes)
    return scheduled(shapes, optim.seed, optim.steps)[1]


def teacher_rows(config: StudyConfig, teacher: Encoder, tasks: Tasks) -> list[dict[str, Any]]:
    """The tasks on the teacher's own features."""
    return [
        {"student": "teacher", "seed": 0, "trained": "", "px": px, **tasks.scores(teacher, px)} for px in config.task_px
    ]


def run(config: StudyConfig) -> None:
    """Train and measure every row; what is measured is written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_encoder(config.teacher).to(device).eval()
    train, held = load_photographs(config.photos, config.held_out, config.source, device)
    config.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    tasks = Tasks(config.tasks, device) if config.tasks else None
    if tasks is not None and config.teacher_tasks:
        found += teacher_rows(config, teacher, tasks)
    for seed in config.seeds:
        for name in config.rows:
            for trained in config.trained:
                student = STUDENTS[name].of(teacher, seed)
                sizes, gpu = config.sizes if trained == "mixed" else None, device.type == "cuda"
                settings = two_stages(
                    config.size,
                    sizes,
                    config.steps,
                    config.rates,
                    batch_size=config.batch_size,
                    seed=seed,
                    gpu=gpu,
                    loss=config.loss,
                    optimizer=config.optimizer,
                    inherited_rate=config.inherited_rate,
                    blends=config.blends,
                    smallest_crop=config.smallest_crop,
                )
                began, images = time.monotonic(), 0
                errors: dict[int, dict[str, float]] = {}
                for part in ("stage1", "stage2"):
                    other = "stage2" if part == "stage1" else "stage1"
                    alone = replace(settings, **{other: replace(getattr(settings, other), steps=0)})
                    histories = distill(teacher, student, train, alone)
                    if histories:
                        images += images_of(student, alone, part)
                    if part == "stage1":
                        errors = {px: sublayer_errors(student, teacher, held, px) for px in config.px}
                seconds = time.monotonic() - began
                student.eval()
                shown = {
                    "student": name,
                    "seed": seed,
                    "trained": trained,
                    "images": images,
                    "seconds": round(seconds, 1),
                }
                for px in config.px:
                    row = {**shown, "px": px, **scores(student, teacher, held, px), "sublayers": errors.get(px, {})}
                    if tasks is not None and px in config.task_px:
                        row |= tasks.scores(student, px)
                    found.append(row)
                print(
                    name,
                    trained,
                    f"{seconds:.0f} s",
                    [round(r["cosine"], 4) for r in found[-len(config.px) :]],
                    flush=True,
                )
                write_rows(config.out / "rows.json", "benchmarks.resolution", config, found)
                if config.save:
                    student.save_pretrained(
                        config.out / f"{name}, {trained}, {seed}".replace(", ", "_").replace(" ", "-")
                    )


if __name__ == "__main__":
    run(tyro.cli(StudyConfig, description=__doc__))
