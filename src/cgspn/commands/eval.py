"""`cgspn eval`: evaluate models on datasets, with one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from ..console import console, waiting
from ..data.segmentation_sets import SegmentationSet, open_pairs, open_segmentation
from ..data.sizes import size_in_pixels
from ..evaluate.jobs import MIOU, PIXELS, Job, all_jobs, read_templates, retrieval_job, zeroshot_job
from ..evaluate.measure import check_size, embed_pictures, segmentation
from ..evaluate.predict import require_text
from ..evaluate.table import SummaryTable
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from ..settings import Listed
from ..teachers import load_encoder, load_model
from .checks import loaded
from .command import Encoders, Models
from .eval_report import Evaluation, Report, distinct, percents, typed_sizes

MOST_CLASSES = 40  # most classes whose IoU is printed; JSON has all
Model = TypeVar("Model")


def one_at_a_time(
    load: Callable[[str], Model], sources: Sequence[str], check: Callable[[Model], None]
) -> Iterator[tuple[str, Model]]:
    """Each source and its model, one in memory at a time, after all have been loaded and checked. A single model is
    loaded once."""
    kept: list[Model] = []
    for source in sources:
        kept.clear()
        kept.append(load(source))
        check(kept[0])
    if len(sources) > 1:
        kept.clear()
    return ((source, kept.pop() if kept else load(source)) for source in sources)


@dataclass(frozen=True)
class _ImageText(Evaluation):
    usual: ClassVar[tuple[str, ...]] = ("data", "size", "device", "out")

    models: Models
    """Image-text models, one row each: checkpoint folders, hub ids, or "embedded"."""
    data: tuple[str, ...] = ("embedded",)
    """One or more datasets: "embedded" (its test split), or folders or tars in the format of the evaluation."""
    size: Listed[str] = ()
    """Image size in pixels: the side of a square, or HEIGHTxWIDTH. The default is the native size of each model.
    Several sizes give one row each and a plot."""

    def measure(self, title: str, opened: Iterable[Job]) -> None:
        """Evaluate all models, one in memory at a time. Datasets are opened after checking that every model has a text
        tower and takes all sizes."""
        if not self.models:
            raise ValueError("models is empty; expected one or more image-text models")
        sizes = typed_sizes(self.size)
        report = Report(title, self, {"captions": 0, "galleries": 0}, len(sizes) > 1)

        def load(source: str) -> DualEncoder:
            return require_text(loaded(load_model, "models", source), f"models names {source}, which")

        def check(model: DualEncoder) -> None:
            for size in sizes:
                size_in_pixels(model.image.config, size)

        models = one_at_a_time(load, self.models, check)
        jobs = list(opened)
        if not jobs:
            raise ValueError("data is empty; expected one or more data sets")
        names = distinct([job.name for job in jobs])
        for source, model in models:
            model.to(report.device)
            rows = [(size, report.row(source, size_in_pixels(model.image.config, size))) for size in sizes]
            for name, job in zip(names, jobs):
                for size, row in rows:
                    with report.progress(f"{row}: {name}", len(job.pictures)) as watch:
                        embeddings, kept, skipped = embed_pictures(
                            model, job.pictures, name, self.batch_size, watch, self.max_skipped, size
                        )
                    report.skip(name, skipped)
                    with waiting(f"{row}: {name}, texts"):
                        report.add(row, name, job.evaluate(model, embeddings, kept))
            del model  # before the next one is loaded
        report.finish()


@dataclass(frozen=True)
class Zeroshot(_ImageText):
    """Zero-shot classification: top-1, top-5 and mean per-class accuracy.

    Data: "embedded"; a folder with one sub-folder per class, named after the class; or the layout of CLIP-benchmark:
        test/0.tar ... (test/nshards.txt) with .cls files, classnames.txt and zeroshot_classification_templates.txt.

    Examples:
        cgspn eval zeroshot embedded runs/student --data photos/ --size 28 56 84 --out sizes.json
        cgspn eval zeroshot google/siglip2-base-patch16-224 runs/student --data wds_imagenet1k/ wds_cars/ --device cuda
    """

    usual: ClassVar = (*_ImageText.usual, "templates")

    templates: Path | None = None
    """Text file with one prompt per line and {} for the class, instead of the prompts of the dataset or the built-in
    ones."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        templates = read_templates(self.templates) if self.templates else ()
        jobs = (loaded(zeroshot_job, "data", source, templates=templates) for source in self.data)
        self.measure("Zero-shot classification", jobs)


@dataclass(frozen=True)
class Retrieval(_ImageText):
    """Image-text retrieval: R@1, R@5 and R@10, from image to text and from text to image.

    Data: "embedded"; a folder of images, each with captions in NAME.txt, one per line; tars with .txt files (a path,
        pattern or URL); or the layout of CLIP-benchmark, test/0.tar ... If a folder has no captions, they are made from
        the names of its sub-folders. Such a caption matches every image of its class, among about a hundred images.

    Examples:
        cgspn eval retrieval embedded runs/student --data flickr30k/
        cgspn eval retrieval runs/student --data 'shards/{000..009}.tar' --out results/retrieval.json
    """

    def run(self) -> None:
        """Raises ValueError or OSError."""
        self.measure("Image-text retrieval", (loaded(retrieval_job, "data", source) for source in self.data))


@dataclass(frozen=True)
class All(_ImageText):
    """Run every evaluation of an image-text model that the datasets support: see zeroshot and retrieval.

    Examples:
        cgspn eval all embedded demo/c-gspn
        cgspn eval all runs/student --data photos/ wds_flickr8k/
    """

    def run(self) -> None:
        """Raises ValueError or OSError."""
        self.measure("Evaluation", (job for source in self.data for job in loaded(all_jobs, "data", source)))


@dataclass(frozen=True)
class Segment(Evaluation):
    """Semantic segmentation with a linear probe on the frozen final tokens: mIoU, pixel accuracy, and IoU of each
    class.

    The probe is a closed-form ridge regression. Its penalty is chosen on held-out training images, so there is no
    learning rate or number of epochs to tune. Logits are upsampled to the full size of the masks. Data are streamed.

    Data: ADE20K (images/{training,validation}, annotations/...), COCO-Stuff (train2017, val2017 and stuffthingmaps/ or
    annotations/), CamVid (camvid-train.tar, camvid-test.tar); or --train, --test and --classes, where --train and
    --test are folders or tars with pairs of NAME.jpg and NAME.mask.png.

    Examples:
        cgspn eval segment vit_s14.safetensors runs/student --data camvid/
        cgspn eval segment runs/student --data ADEChallengeData2016/ coco-stuff/ --size 512 1024 --device cuda
        cgspn eval segment runs/student --train 'road-{000..004}.tar' --test road-005.tar --classes 12 --ignore-index 12
    """

    usual: ClassVar = (
        *("data", "train", "test", "classes", "ignore_index", "size", "train_images", "test_images"),
        *("device", "out"),
    )

    encoders: Encoders
    """Image encoders or image-text models, one row each: weight files, checkpoint folders, hub ids, or "embedded"."""
    data: Listed[str] = ()
    """One or more datasets with a layout listed above."""
    train: str | None = None
    """Image and mask pairs for training the probe."""
    test: str | None = None
    """Image and mask pairs for testing the probe."""
    classes: int | None = None
    """Number of classes in --train and --test. Class ids start at 0."""
    ignore_index: int = 255
    """Class id of pixels to ignore in --train and --test."""
    scored: Listed[int] = ()
    """Classes that are averaged for mIoU. The default is all."""
    size: Listed[str] = ()
    """Image size in pixels: the shorter side, or HEIGHTxWIDTH. The default is the native size of each encoder. Several
    sizes give one row each and a plot."""
    train_images: int | None = None
    """Train on only this many images, evenly spaced over the dataset."""
    test_images: int | None = None
    """Test on only this many images, evenly spaced over the dataset."""
    batch_size: int = field(default=8, kw_only=True)
    """Batch size; a batch holds images of one size."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        if not self.encoders:
            raise ValueError("encoders is empty; expected one or more")
        pairs = [(train.limited(self.train_images), test.limited(self.test_images)) for train, test in self.sets()]
        sizes = [() if size is None else (size,) if isinstance(size, int) else size for size in typed_sizes(self.size)]

        def check(encoder: Encoder) -> None:
            for sides in sizes:
                check_size(encoder.config, sides)

        encoders = one_at_a_time(partial(loaded, load_encoder, "encoders"), self.encoders, check)
        report = Report("Segmentation by a linear probe", self, {"held_out": 0}, len(sizes) > 1)
        names = distinct([train.name for train, _ in pairs])
        each_class: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in names}
        for source, encoder in encoders:
            encoder.to(report.device)
            for sides in sizes:
                row = report.row(source, sides or (min(encoder.config.image_size),))
                for name, (train, test) in zip(names, pairs):
                    with report.progress(f"{row}: {name}", len(train) + len(test)) as watch:
                        found, skipped = segmentation(
                            encoder,
                            train,
                            test,
                            size=sides,
                            scored=self.scored,
                            batch_size=self.batch_size,
                            watch=watch,
                            max_skipped=self.max_skipped,
                        )
                    for part, what in zip(skipped, ("training", "test")):
                        report.skip(f"{name}, {what} part", part)
                    each = dict(zip(test.class_names, found.class_iou))
                    report.add(row, name, {MIOU: found.mean_iou, PIXELS: found.pixel_accuracy})
                    report.detail(row, name, {"penalty": found.penalty, "class_iou": each})
                    for label, value in each.items():
                        each_class[name].setdefault(label, {})[row] = value
            del encoder  # before the next one is loaded
        for name, (_, test) in zip(names, pairs):
            if len(test.class_names) <= MOST_CLASSES:
                title, columns = f"IoU of each class of {name}", percents(list(report.measured))
                console.print(SummaryTable(title, columns, dict(each_class[name])).to_rich())
        report.finish()

    def sets(self) -> list[tuple[SegmentationSet, SegmentationSet]]:
        """The training and test split of each dataset. Raises ValueError if none is given, or OSError."""
        sets = [loaded(open_segmentation, "data", source) for source in self.data]
        if self.train is not None and self.test is not None:
            if self.classes is None:
                raise ValueError("classes is not given; --train and --test need --classes, the number of their classes")
            parts = [open_pairs(source, self.classes, self.ignore_index) for source in (self.train, self.test)]
            sets.append((replace(parts[0], name=parts[1].name), parts[1]))
        elif (self.train, self.test) != (None, None):
            raise ValueError("train and test go together; one of them is given")
        if not sets:
            raise ValueError("data is empty; expected --data with one or more data sets, or --train and --test")
        return sets
