"""`cgspn convert`: a pretrained attention encoder to a C-GSPN student, not yet distilled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ..console import console, writable_folder
from ..models.dual import DualEncoder
from ..teachers import convert, load_model


@dataclass(frozen=True)
class Convert:
    """Replace attention by propagation; everything with a twin in the teacher is inherited.

    Examples:
        cgspn convert embedded runs/student --compression 3
        cgspn convert runs/vit runs/hybrid --keep-attention 1
    """

    teacher: tyro.conf.Positional[str]
    """A checkpoint folder (encoder or image-text model), or "embedded"."""
    out: tyro.conf.Positional[Path]
    """Folder for the student. Of an image-text model, the text tower is copied along."""
    compression: float = 18
    """s: the scan runs on floor(C / s) channels."""
    keep_attention: int = 0
    """Number of attention layers that stay, spread evenly."""
    seed: int = 0
    """Of the fresh weights."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        teacher = load_model(self.teacher)
        encoder = teacher.image if isinstance(teacher, DualEncoder) else teacher
        torch.manual_seed(self.seed)
        student = convert(encoder, compression=self.compression, keep_attention=self.keep_attention)
        out = writable_folder(self.out, "out")
        (teacher.with_image(student) if isinstance(teacher, DualEncoder) else student).save_pretrained(out)
        before, after = (sum(p.numel() for p in model.parameters()) for model in (encoder, student))
        kept = student.config.mixers.count("attention")
        console.print(
            f"{encoder.config.name}, {before / 1e6:.2f} M parameters -> {student.config.name}, {after / 1e6:.2f} M, "
            f"{len(student.config.mixers) - kept} propagation and {kept} attention layers; saved in {out}"
        )
