"""Evaluation jobs: the images of a dataset are embedded once, and all metrics are computed from the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


Judge = Callable[[DualEncoder, Tensor, Sequence[int]], dict[Metric, float]]
"""From a model, embeddings [n, D] and the numbers of the n pictures to measures, each 0 to 1."""


@dataclass(frozen=True, eq=False)
class Job:
    """name: of the dataset. pictures: the images to embed. judges: functions that compute metrics from the
    embeddings."""

    name: str
    pictures: Sequence[Picture]
    judges: tuple[Judge, ...]


def zeroshot_job(source: str, templates: Path | None = None) -> Job:
    """Zero-shot classification. templates: a file with one template per line, which replaces the dataset's.

    Raises the errors of `open_labelled`, and ValueError for an invalid template.
    """
    pictures = open_labelled(source)
    if templates is not None:
        lines = read_lines(templates, "prompt templates, one a line")
        if not lines:
            raise ValueError(f"templates is {templates}, which is empty; expected prompts with '{{}}', one a line")
        for line in lines:
            fill(line, "")
        pictures = replace(pictures, templates=tuple(lines))
    return Job(pictures.name, pictures.pictures, (_zeroshot(pictures),))


def retrieval_job(source: str) -> Job:
    """Retrieval with captions, or with captions from class names if there are none.

    Raises the errors of `open_captioned`.
    """
    if source == EMBEDDED:
        pictures = open_labelled(source)
        return Job(pictures.name, pictures.pictures, (_class_retrieval(pictures),))
    try:
        captioned = open_captioned(source)
    except FileNotFoundError:
        labelled = _labelled_or_none(source)
        if labelled is None:
            raise
        return Job(labelled.name, labelled.pictures, (_class_retrieval(labelled),))
    return Job(captioned.name, captioned.pictures, (_caption_retrieval(captioned),))


def all_jobs(source: str) -> list[Job]:
    """Zero-shot if there are classes, retrieval if there are captions or classes.

    Raises OSError or ValueError if the source has neither.
    """
    retrieval = retrieval_job(source)
    found = _labelled_or_none(source)
    if found is None:
        return [retrieval]
    labelled = Job(found.name, found.pictures, (_zeroshot(found),))
    if len(labelled.pictures) == len(retrieval.pictures):
        return [replace(labelled, judges=labelled.judges + retrieval.judges)]
    return [labelled, retrieval]


def _labelled_or_none(source: str) -> LabelledPictures | None:
    try:
        return open_labelled(source)
    except (OSError, ValueError):
        return None


def _zeroshot(pictures: LabelledPictures) -> Judge:
    def judge(model: DualEncoder, embeddings: Tensor, kept: Sequence[int]) -> dict[Metric, float]:
        found = zeroshot(model, pictures, embeddings, kept)
        measures = {TOP1: found.top1, TOP5: found.top5, PER_CLASS: found.per_class}
        if len(pictures.class_names) <= 5:
            del measures[TOP5]  # is always 1
        return measures

    return judge


def _caption_retrieval(pictures: CaptionedPictures) -> Judge:
    def judge(model: DualEncoder, embeddings: Tensor, kept: Sequence[int]) -> dict[Metric, float]:
        found = caption_retrieval(model, pictures, embeddings, kept)
        return {recall("image_to_text", k): value for k, value in found.image_to_text.items()} | {
            recall("text_to_image", k): value for k, value in found.text_to_image.items()
        }

    return judge


def _class_retrieval(pictures: LabelledPictures) -> Judge:
    def judge(model: DualEncoder, embeddings: Tensor, kept: Sequence[int]) -> dict[Metric, float]:
        found = class_retrieval(model, embeddings, labels_of(pictures, kept), pictures.class_names)
        return {recall(direction, 1): value for direction, value in found.items()}

    return judge
