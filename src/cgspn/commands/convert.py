"""`cgspn convert`: convert a pretrained attention encoder to an undistilled C-GSPN student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from ..console import console
from ..environment import versions
from ..models.checkpoint import CONFIG, PREPROCESSING, WEIGHTS, write_atomically
from ..models.config import to_dict
from ..models.dual import DualEncoder, image_encoder
from ..settings import Listed
from ..teachers import convert, load_encoder, load_model
from ..teachers.convert import Inherited
from ..teachers.parameters import Part, parameter_table
from .checks import check_folder, check_free, loaded
from .command import Command, Out, Teacher

RECORD = "conversion.json"


@dataclass(frozen=True)
class Convert(Command):
    """Convert a teacher into a student: replace attention with C-GSPN and copy all weights with matching name and
    shape.

    Prints the parameter counts of teacher and student, and writes them to conversion.json together with the list of
    copied tensors. Class and register tokens are removed. If the teacher pools by its class token, the student gets a
    new MAP head.

    Examples:
        cgspn convert embedded runs/student --compression 3
        cgspn convert embedded runs/closer --compression 3 --value-expansion 6
        cgspn convert ViT-SO400M-14-SigLIP2-378/open_clip_model.safetensors runs/hybrid --keep-attention 3
        cgspn convert vit_small_dinov2.safetensors runs/windows --keep-attention 3 --window-attention 9 --heads 6
        cgspn convert vit_small_dinov2.safetensors runs/last --keep-layers 10 11 --heads 6
    """

    teacher: Teacher
    """A checkpoint (a folder of this library, or a file, folder or hub id of OpenCLIP, timm or transformers), or
    "embedded"."""
    out: Out
    """Folder for the student. The text tower of an image-text model is copied too."""
    compression: float = 18
    """s in the paper: the latent has floor(C / s) channels."""
    value_expansion: float | None = None
    """Number of scanned channels over all directions, as a multiple of the latent width. With 6, students are closer to
    their teacher, but layers are slower. None scans the latent itself."""
    keep_attention: int = 0
    """Number of attention layers to keep, spread evenly. With 3 of 27, these are layers 8, 17 and 26."""
    keep_layers: Listed[int] = ()
    """Indices (from 0) of the attention layers to keep, instead of a number."""
    window_attention: int = 0
    """Number of layers that become window attention, spread evenly over the remaining layers."""
    window_layers: Listed[int] = ()
    """Indices (from 0) of the layers that become window attention, instead of a number."""
    window: int = 8
    """Side length of a window in tokens."""
    keep_positions: bool = False
    """Keep the teacher's position embeddings, resized to each grid. Otherwise the student has to learn positions
    itself."""
    heads: int | None = None
    """Number of attention heads, if the checkpoint has no config and its width is not a known one."""
    submodel: str | None = None
    """Key prefix of the model to load, such as "student", if the file of a training run holds several models. By
    default the teacher or the moving average is loaded."""
    image_only: bool = False
    """Do not copy the text tower of an image-text model."""
    overwrite: bool = False
    """Replace an existing model in the folder."""
    seed: int = 0
    """Random seed of the new weights."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        for number, indices in (("keep_attention", "keep_layers"), ("window_attention", "window_layers")):
            if getattr(self, number) and getattr(self, indices):
                raise ValueError(f"{number} and {indices} are both given; accepted: a number or indices, not both")
        out = check_folder(self.out, "out")
        check_free([out / name for name in (CONFIG, WEIGHTS, PREPROCESSING, RECORD)], "out", self.overwrite)
        load = load_encoder if self.image_only else load_model
        teacher = loaded(load, "teacher", self.teacher, heads=self.heads, submodel=self.submodel)
        encoder = image_encoder(teacher)
        torch.manual_seed(self.seed)
        reports: list[Inherited] = []
        student = convert(
            encoder,
            compression=self.compression,
            value_expansion=self.value_expansion,
            keep_attention=self.keep_layers or self.keep_attention,
            window_attention=self.window_layers or self.window_attention,
            window=self.window,
            keep_positions=self.keep_positions,
            share=True,
            report=reports.append,
        )
        (origin,), config = reports, student.config
        table = parameter_table(encoder, student, origin.inherited)
        if isinstance(teacher, DualEncoder):
            teacher.image = student
            teacher.save_pretrained(out)
        else:
            student.save_pretrained(out)
        layers, windows = (
            [i for i, mixer in enumerate(config.mixers) if mixer == kind] for kind in ("attention", "window_attention")
        )
        record = {
            "source": self.teacher,
            "teacher": to_dict(encoder.config),
            "student": config.name,
            "compression": self.compression,
            "value_expansion": self.value_expansion,
            "latent channels": config.propagation.latent_width(config.width),
            "attention layers": layers,
            "window attention layers": windows,
            "window": self.window,
            "seed": self.seed,
            "parameters": [asdict(row) for row in table],
            "inherited": origin.inherited,
            "fresh": origin.fresh,
            "versions": versions(),
        }
        write_atomically(out / RECORD, json.dumps(record, indent=1) + "\n")
        console.print(f"{encoder.config.name} -> {config.name}")
        console.print(_shown(table))
        kept = f"attention stays in layers {', '.join(map(str, layers))}" if layers else "no attention stays"
        if windows:
            kept += f", in windows of {self.window} x {self.window} in layers {', '.join(map(str, windows))}"
        console.print(
            f"{config.mixers.count('propagation')} layers propagate, {kept}; wrote the student and {RECORD} to {out}",
            soft_wrap=True,
        )


def _shown(rows: Sequence[Part]) -> Table:
    table = Table("parameters", "teacher", "student", "inherited", "fresh")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        if row.part == "all":
            table.add_section()
        table.add_row(row.part, *(f"{n:,}" if n else "-" for n in (row.teacher, row.student, row.inherited, row.fresh)))
    return table
