"""Evaluation jobs: the images of a dataset are embedded once, and all metrics are computed from the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..data.captions import fill
from ..data.clip_benchmark import read_lines
from ..data.labelled import CaptionedPictures, LabelledPictures, labels_of, open_captioned, open_labelled
from ..data.prepare import Picture
from ..data.source import EMBEDDED
from ..models.dual import DualEncoder
from .measure import caption_retrieval, class_retrieval, zeroshot
from .table import Metric

TOP1 = Metric("top1", "top-1", 100, "%", averaged=True)
TOP5 = Metric("top5", "top-5", 100, "%")
PER_CLASS = Metric("per_class", "mean per class", 100, "%")
MIOU = Metric("miou", "mIoU", 100, "%", averaged=True)
PIXELS = Metric("pixel_accuracy", "pixel accuracy", 100, "%")


def recall(direction: str, rank: int) -> Metric:
    """The table column of a recall. direction: "image_to_text" or "text_to_image"."""
    label = direction.replace("_to_", " → ")
    return Metric(f"{direction}@{rank}", f"{label} R@{rank}", 100, "%", averaged=rank == 1)


@dataclass(frozen=True, eq=False)
class Job:
    """The images of a dataset, which are embedded once.

    name: the dataset's name. classes: measure zero-shot accuracy. captions: measure retrieval with these, or with
    captions from class names.
    """

    name: str
    pictures: Sequence[Picture]
    classes: LabelledPictures | None = None
    captions: CaptionedPictures | LabelledPictures | None = None

    def evaluate(self, model: DualEncoder, embeddings: Tensor, kept: Sequence[int]) -> dict[Metric, float]:
        """Metrics, each 0 to 1, from embeddings [n, D] and the indices of the n images."""
        measures: dict[Metric, float] = {}
        if self.classes is not None:
            score = zeroshot(model, self.classes, embeddings, kept)
            # with five classes or fewer, top-5 is always 1
            fifth = {TOP5: score.top5} if len(self.classes.class_names) > 5 else {}
            measures |= {TOP1: score.top1, **fifth, PER_CLASS: score.per_class}
        if isinstance(self.captions, LabelledPictures):
            labels = labels_of(self.captions, kept)
            by_class = class_retrieval(model, embeddings, labels, self.captions.class_names)
            measures |= {recall(direction, 1): value for direction, value in by_class.items()}
        elif self.captions is not None:
            found = caption_retrieval(model, self.captions, embeddings, kept)
            measures |= {recall("image_to_text", k): value for k, value in found.image_to_text.items()}
            measures |= {recall("text_to_image", k): value for k, value in found.text_to_image.items()}
        return measures


def read_templates(path: Path) -> tuple[str, ...]:
    """The prompts of a file, one per line with {} for the class. Raises OSError, or ValueError for invalid ones."""
    lines = read_lines(path, "prompt templates, one per line")
    if not lines:
        raise ValueError(f"templates is {path}, which is empty; expected prompts with '{{}}', one per line")
    for line in lines:
        fill(line, "")
    return tuple(lines)


def zeroshot_job(source: str, templates: tuple[str, ...] = ()) -> Job:
    """Zero-shot classification. templates: replace the dataset's. Raises the errors of `open_labelled`."""
    pictures = open_labelled(source)
    if templates:
        pictures = replace(pictures, templates=templates)
    return Job(pictures.name, pictures.pictures, classes=pictures)


def retrieval_job(source: str) -> Job:
    """Retrieval with captions, or with captions from class names if there are none.

    Raises the errors of `open_captioned`.
    """
    captions: CaptionedPictures | LabelledPictures | None
    try:
        captions = open_labelled(source) if source == EMBEDDED else open_captioned(source)
    except FileNotFoundError:
        captions = _labelled_or_none(source)
        if captions is None:
            raise
    return Job(captions.name, captions.pictures, captions=captions)


def all_jobs(source: str) -> list[Job]:
    """Zero-shot if there are classes, retrieval if there are captions or classes.

    Raises OSError or ValueError if the source has neither.
    """
    retrieval, classes = retrieval_job(source), _labelled_or_none(source)
    if classes is None:
        return [retrieval]
    if len(classes.pictures) == len(retrieval.pictures):
        return [replace(retrieval, classes=classes)]
    return [Job(classes.name, classes.pictures, classes=classes), retrieval]


def _labelled_or_none(source: str) -> LabelledPictures | None:
    try:
        return open_labelled(source)
    except (OSError, ValueError):
        return None
