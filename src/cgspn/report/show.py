"""Views of photographs through student and teacher, with comparable colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ..models.encoder import Encoder
from .pca import ColourBasis, fit_colours
from .photographs import Photograph
from .pictures import sheet
from .show_data import Place, View, view

TEACHER, STUDENT = "teacher", "student"
PLACES: tuple[Place, ...] = ((0.5, 0.5), (0.3, 0.25), (0.75, 0.7))
LAYERS = 4  # default number of layers
FITTED = 20_000  # most patches per photograph for fitting colours


@dataclass(frozen=True)
class Show:
    """Photographs with the features of a student, and optionally its teacher: a view of each.

    colours: by model, fitted on all photographs; the student's are aligned with the teacher's.
    """

    views: list[View]
    colours: dict[str, ColourBasis]


def look_at(
    photographs: Sequence[Photograph],
    student: Encoder,
    teacher: Encoder | None = None,
    *,
    layers: Sequence[int] | None = None,
    places: Sequence[Place] = PLACES,
    watch: Callable[[], object] | None = None,
) -> Show:
    """Run the photographs through the models one by one, on the models' device.

    photographs: at least one, with sizes that are multiples of the patch size. layers: the student's layers, from 1,
    whose influence is shown; None for four evenly spaced ones. places: patches whose influence is shown, as fractions
    of height and width. watch: called after each photograph.

    Raises ValueError for different patch sizes, a layer that the student does not have, or a place outside 0 to 1.
    """
    layers = layers or even_layers(student)
    check_show(student, teacher, layers, places)
    models = {STUDENT: student} if teacher is None else {TEACHER: teacher, STUDENT: student}
    views = []
    for photograph in photographs:
        views.append(view(photograph, models, layers, places))
        if watch is not None:
            watch()
    colours: dict[str, ColourBasis] = {}
    some = {name: [_some(v.features[name]) for v in views] for name in models}
    for name in models:  # the teacher comes first
        like = (colours[TEACHER], some[TEACHER]) if TEACHER in colours else None
        colours[name] = fit_colours(some[name], like=like)
    return Show(views, colours)


def even_layers(student: Encoder) -> list[int]:
    """Numbers, from 1, of at most four evenly spaced layers, including the first and the last."""
    depth = student.config.depth
    count = min(LAYERS, depth)
    return [1 + round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]


def check_show(student: Encoder, teacher: Encoder | None, layers: Sequence[int], places: Sequence[Place]) -> None:
    """Raise ValueError for invalid arguments of `look_at`."""
    if teacher is not None and teacher.config.patch_size != student.config.patch_size:
        raise ValueError(
            f"teacher has patches of {teacher.config.patch_size} pixels; expected the student's, "
            f"{student.config.patch_size}, so that patches can be compared"
        )
    wrong = [layer for layer in layers if not 1 <= layer <= student.config.depth]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers is {list(layers)}; accepted: 1 to {student.config.depth}, each once")
    if not places or not all(0 <= share <= 1 for place in places for share in place):
        raise ValueError(f"at is {list(places)}; accepted: pairs of fractions of height and width, each 0 to 1")


def show_picture(shown: Show, width: int = 288, rows: int = 4, gap: int = 6) -> Image.Image:
    """A picture with one row per photograph and PCA visualisations of its features, teacher first, below column titles.

    All rows have the aspect ratio of the first photograph; others are cropped. width: of each image in pixels. rows:
    maximum number of photographs. gap: transparent pixels between images.
    """
    first = shown.views[0].photograph.pixels
    size = (round(width * first.shape[1] / first.shape[2]), width)
    pictures = [
        [
            seen.photograph.pixels.permute(1, 2, 0),
            *(shown.colours[name].picture(f) for name, f in seen.features.items()),
        ]
        for seen in shown.views[:rows]
    ]
    return sheet(pictures, ["photograph", *shown.colours], size, gap)


def _some(features: Tensor) -> Tensor:
    rows = features.flatten(0, 1)
    return rows[:: -(-len(rows) // FITTED)]
