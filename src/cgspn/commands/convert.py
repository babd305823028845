"""`cgspn convert`: a pretrained attention encoder to a C-GSPN student, not yet distilled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from .. import __version__
from ..console import console
from ..models.checkpoint import CONFIG, PREPROCESSING, WEIGHTS, write_atomically
from ..models.config import to_dict
from ..models.dual import DualEncoder, image_encoder
from ..teachers import convert, load_encoder, load_model
from ..teachers.convert import Inherited
from ..teachers.parameters import Part, parameter_table
from .checks import check_folder, check_free
from .command import Command, Out, Teacher

RECORD = "conversion.json"


@dataclass(frozen=True)
class Convert(Command):
    """Replace attention by propagation; all weights with matching name and shape are inherited.

    Prints the parameters of both, part by part, and writes them with what was inherited into conversion.json beside
    the student. A class token and registers are dropped: a fresh MAP head is there to learn the class feature.

    Examples:
        cgspn convert embedded runs/student --compression 3
        cgspn convert embedded runs/closer --compression 3 --value-expansion 6
        cgspn convert ViT-SO400M-14-SigLIP2-378/open_clip_model.safetensors runs/hybrid --keep-attention 3
        cgspn convert vit_small_dinov2.safetensors runs/windows --keep-attention 3 --window-attention 9 --heads 6
        cgspn convert vit_small_dinov2.safetensors runs/last --keep-layers 10 11 --heads 6
    """

    teacher: Teacher
    """A checkpoint (this library's folder; a file, folder or hub id of OpenCLIP, timm or transformers), or
    "embedded"."""
    out: Out
    """Folder for the student. Of an image-text model, the text tower is copied along."""
    compression: float = 18
    """s: the scan runs on floor(C / s) channels."""
    value_expansion: float | None = None
    """Channels that carry values beside the latent, in units of it, split across the directions; 6 brings students
    closer to their teachers at more time for a sub-layer."""
    keep_attention: int = 0
    """Number of attention layers that stay, spread evenly: of 27, 3 are layers 8, 17 and 26."""
    keep_layers: tuple[int, ...] = ()
    """Indices from 0 of the attention layers that stay, in place of a number."""
    window_attention: int = 0
    """Number of attention layers that stay with windows in place of the whole grid, spread evenly over what is left."""
    window_layers: tuple[int, ...] = ()
    """Indices from 0 of those layers, in place of a number."""
    window: int = 8
    """Side of a window, in positions of the grid."""
    keep_positions: bool = False
    """Keep the teacher's learned positions, resized to each grid; without them the first layer has to count lines."""
    heads: int | None = None
    """Of attention, where a foreign file is of no known width and no config lies beside it."""
    submodel: str | None = None
    """The beginning of the keys of one model, such as "student", where a file of a training run holds several; by
    default the teacher or the moving average."""
    image_only: bool = False
    """Leave the text tower of an image-text model out."""
    overwrite: bool = False
    """Replace the model that the folder may hold."""
    seed: int = 0
    """Of the fresh weights."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        for number, indices in (("keep_attention", "keep_layers"), ("window_attention", "window_layers")):
            if getattr(self, number) and getattr(self, indices):
                raise ValueError(f"{number} and {indices} are both given; accepted: a number or indices, not both")
        out = check_folder(self.out, "out")
        check_free([out / name for name in (CONFIG, WEIGHTS, PREPROCESSING, RECORD)], "out", self.overwrite)
        load = load_encoder if self.image_only else load_model
        teacher = load(self.teacher, heads=self.heads, submodel=self.submodel)
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
            "versions": {"cgspn": __version__, "torch": torch.__version__},
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
