"""`cgspn distill`: teacher to student in two stages, on the embedded images or a folder."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro

from .. import __version__
from ..console import console, progress_watcher, writable_folder
from ..data import load_images
from ..distill import DistillConfig, distil
from ..models.checkpoint import write_atomically
from ..models.dual import DualEncoder
from ..teachers import convert, load_encoder, load_model


@dataclass(frozen=True)
class Distill:
    """Convert a teacher and distil it: stage 1 on its sub-layers, stage 2 end to end.

    Examples:
        cgspn distill embedded runs/student --config.compression 3
        cgspn distill runs/vit runs/student --data photos/ --config.stage1.steps 200 --config.stage2.steps 1000
    """

    teacher: tyro.conf.Positional[str]
    """A checkpoint folder (encoder or image-text model), or "embedded"."""
    out: tyro.conf.Positional[Path]
    """Folder for the student and distill.json (command, versions, losses)."""
    data: str = "embedded"
    """A folder of images, or "embedded". Unreadable images are skipped, counted and named."""
    student: Path | None = None
    """Start from this converted checkpoint instead of converting."""
    config: DistillConfig = field(default_factory=DistillConfig)
    """Stages, rates and losses."""
    device: str = "cpu"
    """"cpu" or "cuda"."""

    def run(self) -> None:
        """Raises ValueError, OSError or DivergedError."""
        out = writable_folder(self.out, "out")
        teacher = load_model(self.teacher).to(self.device)
        encoder = teacher.image if isinstance(teacher, DualEncoder) else teacher
        torch.manual_seed(self.config.stage1.seed)
        if self.student is not None:
            student = load_encoder(self.student).to(self.device)
        else:
            config = self.config
            student = convert(encoder, compression=config.compression, keep_attention=config.keep_attention)
        images = load_images(self.data, encoder.config.image_size, encoder.config.channels, "train")
        with progress_watcher() as watcher:
            histories = distil(teacher, student, images, self.config, watcher)
        (teacher.with_image(student) if isinstance(teacher, DualEncoder) else student).save_pretrained(out)
        record = {
            "command": shlex.join(["cgspn", *sys.argv[1:]]),
            "versions": {"cgspn": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "config": asdict(self.config),
            "images": len(images),
            "losses": {history.title: history.steps for history in histories},
        }
        write_atomically(out / "distill.json", json.dumps(record) + "\n")
        console.print(f"student saved in {out}; losses in {out / 'distill.json'}", soft_wrap=True)
