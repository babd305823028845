"""Comparison of student and teacher on held-out images: cosine similarity and a picture."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Sample, SampleSource, Skipped
from ..data.opening import open_image
from ..data.prepare import Picture, open_picture, prepare_for
from ..data.samples import open_folder
from ..data.source import EMBEDDED
from ..distill.manifest import MOST_RECORD
from ..distill.resume import RECORD
from ..distill.taps import observe
from ..evaluate import cosine
from ..models.encoder import Encoder
from ..models.reading import read_json_value
from .pca import fit_colours
from .pictures import jpeg_uri, sheet

MOST, ONE_IN = 16, 100  # held-out images: one in a hundred, at most sixteen
SHOWN, SIDE = 4, 240  # rows of the picture, and the side of each image in pixels


@dataclass(frozen=True, eq=False)
class Kept:
    """A `SampleSource` without some evenly spread samples, which are held out from training."""

    whole: SampleSource

    @property
    def source(self) -> str:
        """See `SampleSource`."""
        return self.whole.source

    @property
    def problems(self) -> Skipped:
        """See `SampleSource`."""
        return self.whole.problems

    @property
    def out(self) -> range:
        """Indices of held-out samples in the whole source; none if it has fewer than a hundred."""
        count = min(MOST, len(self.whole) // ONE_IN)
        return range(0, count * (len(self.whole) // max(1, count)), len(self.whole) // max(1, count))

    def __len__(self) -> int:
        return len(self.whole) - len(self.out)

    def place(self, number: int) -> int:
        """The index in the whole source of a sample of this one."""
        return number + min(number // (self.out.step - 1) + 1, len(self.out)) if self.out else number

    def name(self, number: int) -> str:
        """See `SampleSource`."""
        return self.whole.name(self.place(number))

    def read(self, number: int) -> Sample:
        """See `SampleSource`."""
        return self.whole.read(self.place(number))

    def digest(self) -> str:
        """See `SampleSource`."""
        return self.whole.digest()

    def held_out_names(self) -> list[str]:
        """The names of the held-out samples, also of unreadable ones."""
        return [self.whole.name(number) for number in self.out]

    def pictures(self) -> Iterator[Picture]:
        """The readable held-out images; for a small source its first images, which were used in training."""
        for number in self.out or range(min(MOST, len(self.whole))):
            try:
                with open_image(io.BytesIO(self.whole.read(number).encoded)) as image:
                    yield open_picture(image)
            except Exception:  # damaged files raise all kinds of errors; training has reported them
                continue


def held_out_of(run: str, folder: str) -> frozenset[str] | None:
    """The images that the run that wrote the folder `run` and the runs before it (--student) held out, as paths below
    their folder of training images.

    None if `folder` does not hold the images of any of these runs (`SampleSource.digest`). Raises CheckpointError for a
    record that is not JSON, OSError if it cannot be read.
    """

    @cache
    def shown() -> str:
        return open_folder(Path(folder)).digest()

    held = None
    for record in records_of(run) if folder != EMBEDDED else ():
        try:
            if record["source"]["digest"] == shown():
                data, names = os.path.expanduser(record["data"]), record["held_out"]["names"]
                own = frozenset(str(Path(name).relative_to(data)) for name in names)
                held = own if held is None else held & own
        except (LookupError, TypeError, ValueError, OSError):  # embedded images, an earlier version, or no folder
            continue
    return held


def records_of(run: str) -> Iterator[Any]:
    """The records of the run that wrote the folder `run`, and of the runs before it, from whose students it started."""
    seen: set[str] = set()
    while run not in seen and (path := Path(run) / RECORD).is_file():
        seen.add(run)
        record = read_json_value(path, MOST_RECORD)
        yield record
        if isinstance(record, dict) and isinstance(before := record.get("student"), str):
            run = before


def compare(teacher: Encoder, student: Encoder, pictures: Iterable[Picture]) -> dict[str, Any]:
    """Compare the tokens of student and teacher at the student's native size. An empty dict without images.

    "cosine": mean over all grid tokens. "images": their number. "picture": a data URI of some images with PCA
    visualisations of both models' features.
    """
    prepare = prepare_for(student.config)
    device = next(student.parameters()).device
    images = [prepare(open_picture(picture)) for picture in pictures]
    features: tuple[list[Tensor], list[Tensor]] = [], []
    with torch.no_grad():
        for image in images:  # one by one, to save memory
            pixels = image[None].to(device)
            taps = observe(teacher, pixels, student.config)
            mine = student(pixels).tokens[0].float().cpu()
            features[0].append(taps.tokens[0].float().cpu().view_as(mine))
            features[1].append(mine)
    if not images:
        return {}
    theirs, own = features
    basis = fit_colours(theirs)
    colours = (basis, fit_colours(own, like=(basis, theirs)))
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.config.image_mean, student.config.image_std))
    rows = [
        [(image * std + mean).expand(3, -1, -1).permute(1, 2, 0), *(c.picture(f) for c, f in zip(colours, both))]
        for image, *both in zip(images[:SHOWN], theirs, own)
    ]
    picture = sheet(rows, ("image", "teacher", "student"), (SIDE, SIDE), 4)
    near = cosine(torch.stack(own), torch.stack(theirs))
    return {"cosine": near, "images": len(images), "picture": jpeg_uri(picture, 1024)}
