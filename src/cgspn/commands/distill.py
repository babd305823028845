"""`cgspn distill`: teacher to student in stages, on one process or, under torchrun, on many."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from .. import __version__
from ..console import console, progress_watcher, writable_folder
from ..data import load_images
from ..distill import DistillConfig, World, distil, join_world
from ..distill.presets import PRESETS
from ..distill.stages import Watcher
from ..models.checkpoint import write_atomically
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from ..teachers import convert, load_encoder, load_model

Preset = Literal["embedded", "vit-s14-study", "so400m-378", "so400m-highres"]
RUN, RECORD = "run.json", "distill.json"


@dataclass(frozen=True)
class Distill:
    """Convert a teacher and distil it: stage 1 on its sub-layers, stage 2 end to end, then higher resolutions.

    A run that was interrupted goes on from its last snapshot when the same command is given again.

    Examples:
        cgspn distill embedded runs/student --config.compression 3
        cgspn distill runs/vit runs/student --data photos/ --config.stage1.steps 200 --config.stage2.steps 1000
        cgspn distill embedded runs/student --config.highres.sizes 56 84
        torchrun --nproc-per-node 8 -m cgspn.cli distill runs/vit runs/student --data photos/ --preset so400m-378
          --device cuda
    """

    teacher: tyro.conf.Positional[str]
    """A checkpoint (file, folder or hub id; encoder or image-text model), or "embedded"."""
    out: tyro.conf.Positional[Path]
    """Folder for the student, its stages and snapshots, and distill.json (command, versions, losses)."""
    preset: Preset = "embedded"
    """Where the settings below start from."""
    data: str = "embedded"
    """A folder of images, or "embedded". Unreadable images are skipped, counted and named."""
    student: Path | None = None
    """Start from this converted checkpoint instead of converting."""
    config: DistillConfig = field(default_factory=lambda: PRESETS["embedded"])
    """Stages, rates, losses, precision, processes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    show_config: bool = False
    """Print the settings and stop."""

    def run(self) -> None:
        """Raises ValueError, OSError, or what `distil` raises."""
        student_from = str(self.student) if self.student else None
        settings: dict[str, Any] = {"teacher": self.teacher, "student": student_from, "data": self.data}
        settings["config"] = asdict(self.config)
        if self.show_config:
            console.print_json(json.dumps(settings))
            return
        with join_world(self.device) as world:
            out = writable_folder(self.out, "out")
            check_same_run(out, settings, world)
            teacher = load_model(self.teacher).to(world.device)
            encoder = teacher.image if isinstance(teacher, DualEncoder) else teacher
            torch.manual_seed(self.config.stage1.seed)
            student = self.start(encoder).to(world.device)
            size = self.config.image_size
            shape = (size, size) if size else encoder.config.image_size
            images = load_images(self.data, shape, encoder.config.channels, "train")
            with shown(world) as watcher:
                histories = distil(teacher, student, images, self.config, watcher, folder=out, world=world)
            if world.rank:
                return
            (teacher.with_image(student) if isinstance(teacher, DualEncoder) else student).save_pretrained(out)
            record = {
                "command": shlex.join(["cgspn", *sys.argv[1:]]),
                "versions": {"cgspn": __version__, "torch": torch.__version__, "python": platform.python_version()},
                **settings,
                "processes": world.size,
                "images": len(images),
                "losses": {history.title: history.steps for history in histories},
            }
            write_atomically(out / RECORD, json.dumps(record) + "\n")
            console.print(f"student saved in {out}; losses in {out / RECORD}", soft_wrap=True)

    def start(self, teacher: Encoder) -> Encoder:
        """The student before training."""
        if self.student is not None:
            return load_encoder(self.student)
        return convert(teacher, compression=self.config.compression, keep_attention=self.config.keep_attention)


def check_same_run(out: Path, settings: dict[str, Any], world: World) -> None:
    """Note the settings of the run in `out`. Raises ValueError if it holds an unfinished run of other settings."""
    path = out / RUN
    # through JSON, which has no tuples; what does not change the result may change between two attempts
    wanted = json.loads(json.dumps(settings))
    wanted["config"].pop("compute")
    begun = any((out / "stages").glob("*/losses.json")) or any((out / "snapshots").glob("*/*"))
    if path.exists() and begun and not (out / RECORD).exists():
        found = json.loads(path.read_text())
        if found != wanted:
            changed = ", ".join(sorted(differences(found, wanted)))
            raise ValueError(
                f"out is {out}, which holds an unfinished run with other settings ({changed}); "
                "give those again to go on with it, or another folder"
            )
    elif world.rank == 0:
        (out / RECORD).unlink(missing_ok=True)
        for stage in sorted((out / "stages").glob("*/losses.json")):
            stage.unlink()  # a finished run is begun again
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the settings in which two nested dicts differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name


@contextmanager
def shown(world: World) -> Iterator[Watcher | None]:
    """Progress bars, on the first process alone."""
    if world.rank:
        yield None
    else:
        with progress_watcher() as watcher:
            yield watcher
