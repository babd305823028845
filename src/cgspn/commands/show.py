"""`cgspn show`: visualise the features of an encoder on photographs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..console import console, duration_text, progress_watcher, waiting
from ..environment import command, versions
from ..models.checkpoint import write_atomically
from ..models.encoder import Encoder
from ..report.held_out import held_out_of
from ..report.photographs import COLUMNS, load_photographs
from ..report.pictures import png_bytes
from ..report.show import PLACES, STUDENT, TEACHER, look_at, show_picture
from ..report.show_page import show_page
from ..teachers import load_encoder
from .checks import check_file, device_of, loaded
from .command import Command, Device, Student


@dataclass(frozen=True)
class Show(Command):
    """Write an HTML page that visualises the features of an encoder on photographs, optionally next to those of its
    teacher.

    The page shows a PCA visualisation of the features, the similarity of all patches to a clicked one, and which image
    positions influence a patch in each layer. Each photograph is processed in one pass, at any size that fits in
    memory.

    Examples:
        cgspn show demo/c-gspn --teacher embedded
        cgspn show runs/student --teacher runs/vit --images photos/ --size 1024 --out page.html
        cgspn show runs/student --images photos/ --size 4096 --device cuda --layers 1 12 --at 0.5 0.5 0.2 0.8
    """

    student: Student
    """A checkpoint (file, folder or hub id; encoder or image-text model), or "embedded"."""
    teacher: str | None = None
    """A second encoder with the same patch size, for comparison."""
    images: str = "embedded"
    """A folder of photographs, or "embedded" (test images, sixteen per canvas). If the student was trained on just
    these files, those that were held out (distill.json) come first, and the page says how many they are. Unreadable
    ones are skipped, counted and reported."""
    size: int | None = None
    """Longer side in pixels, rounded to whole patches. The default is the student's native size, for
    embedded images that of each in a canvas."""
    limit: int = 10
    """Maximum number of photographs, in the order of names. Each adds up to 2 MB to the page."""
    layers: tuple[int, ...] | None = None
    """Layers (numbered from 1) whose influence is shown. The default is four layers, spread evenly."""
    at: tuple[tuple[float, float], ...] = PLACES
    """Patches whose influence is shown, as pairs of fractions of height and width."""
    out: Path = Path("page.html")
    """The HTML page, a single self-contained file."""
    picture: Path | None = None
    """Also write a PNG with the first photographs and the features of both models, for a README or a slide."""
    device: Device = "auto"
    """Device to run on; "auto" uses a GPU if there is one."""

    overwrite: bool = False
    """Replace existing files."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        device = device_of(self.device)
        for name, path in (("out", self.out), ("picture", self.picture)):
            if path is not None:
                check_file(path, name, "a file name", self.overwrite)
        models = {STUDENT: self.student} if self.teacher is None else {TEACHER: self.teacher, STUDENT: self.student}
        with waiting("loading"):
            encoders = {
                name: loaded(load_encoder, name, source).to(device).requires_grad_(False)
                for name, source in models.items()
            }
        student, teacher = encoders[STUDENT], encoders.get(TEACHER)
        config = student.config
        native = max(config.image_size) * (COLUMNS if self.images == "embedded" else 1)
        side = native if self.size is None else self.size
        held = held_out_of(self.student, self.images)
        photographs, skipped = load_photographs(self.images, side, config.patch_size, self.limit, held or ())
        if skipped:
            console.print(skipped.summary(), soft_wrap=True)
        began = time.monotonic()
        with progress_watcher() as watcher:
            watch = watcher("photographs", len(photographs))
            shown = look_at(
                photographs, student, teacher, layers=self.layers, places=self.at, watch=lambda: watch({"shown": 1})
            )
        took = duration_text(time.monotonic() - began)
        names = {name: f"{models[name]}: {_described(model)}" for name, model in encoders.items()}
        facts = {
            "photographs": f"{len(photographs)} from {self.images}, {took} on {device}",
            "skipped": ", ".join(name for name, _ in skipped.files) or "none",
            "command": command(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
        if held is not None:
            unseen = sum(photograph.name in held for photograph in photographs)
            facts["held out of training"] = f"{unseen} of {len(photographs)} photographs"
            console.print(f"{facts['held out of training']} were held out of the student's training")
        html = show_page(shown, names, facts)
        write_atomically(self.out, html)
        if self.picture is not None:
            write_atomically(self.picture, png_bytes(show_picture(shown)))
        console.print(f"{took}; {self.out}, {len(html.encode()) / 1e6:.1f} MB", soft_wrap=True)


def _described(model: Encoder) -> str:
    kinds = model.config.mixers
    counts = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
    layers = " and ".join(f"{count} {kind}" for count, kind in counts)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{model.config.name}, {parameters / 1e6:.2f} M parameters, {layers} layers"
