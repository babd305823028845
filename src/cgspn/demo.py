"""The demo on the embedded teacher and images: convert, distill in two stages, evaluate, report."""

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .bench.timing import medians
from .data import ImageSet, load_embedded
from .distill import DistillConfig, distill
from .distill.presets import EMBEDDED
from .distill.stages import Watcher
from .environment import versions
from .evaluate.suite import METRICS, evaluate_dual
from .evaluate.table import Metric, SummaryTable
from .models.dual import DualEncoder
from .models.encoder import Encoder
from .report.demo import DemoResult
from .teachers import attention_student, convert, load_embedded_teacher

TIMED = ((28, 64), (224, 1))  # image sizes in pixels and batch sizes that are timed


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Args:
        distill: settings of both stages, used for the C-GSPN and the ViT student.
        test_images: number of held-out images for evaluation, at most 4000.
        probe_images: number of training images for the segmentation probe.
    """

    distill: DistillConfig = EMBEDDED
    test_images: int = 4000
    probe_images: int = 1000


def milliseconds(encoders: Mapping[str, Encoder], pixels: int, batch: int) -> dict[str, float]:
    """Milliseconds per image of `pixels` px for each encoder: medians over interleaved runs."""
    images = torch.randn(batch, 3, pixels, pixels)

    def inference(encoder: Encoder) -> Callable[[], object]:
        return torch.inference_mode()(lambda: encoder(images))

    times = medians({name: inference(encoder) for name, encoder in encoders.items()}, rounds=2, graph=False)
    return {name: ms / batch for name, ms in times.items()}


def _first(images: ImageSet, count: int, name: str) -> ImageSet:
    if not 1 <= count <= len(images):
        raise ValueError(f"{name} is {count}; accepted: 1 to {len(images)}")
    return images.subset(torch.arange(count))


def idle_threads() -> int:
    """The number of threads from which small models gain now: the idle cores, at least 1 and at most 8.

    Every operation waits for its slowest thread. With more threads than idle cores the demo takes several times as
    long, and its operations are too small for more than a few threads.
    """
    total = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    busy = os.getloadavg()[0] * cores / total if hasattr(os, "getloadavg") else 0.0
    return max(1, min(8, cores, round(cores - busy)))


@contextmanager
def bounded_threads() -> Iterator[None]:
    """Limit PyTorch to `idle_threads` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, idle_threads()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@bounded_threads()
def run_demo(config: DemoConfig, watcher: Watcher | None = None) -> DemoResult:
    """Distill a C-GSPN and a ViT student from the embedded teacher with the same budget, and evaluate all three.

    Raises ValueError for settings out of range and DivergedError if a loss stops being finite.
    """
    began = time.monotonic()
    test = _first(load_embedded("test"), config.test_images, "test_images")
    train = load_embedded("train")
    probe = _first(train, config.probe_images, "probe_images")
    teacher = load_embedded_teacher()

    torch.manual_seed(config.distill.stage1.seed)
    converted = convert(teacher.image, **config.distill.conversion)
    students = {"C-GSPN": copy.deepcopy(converted), "ViT": attention_student(teacher.image)}
    models: dict[str, DualEncoder] = {"teacher": teacher}
    histories = {}
    for name, student in students.items():
        histories[name] = distill(teacher, student, train, config.distill, watcher, name)
        models[name] = teacher.with_image(student).eval()
    models["converted"] = teacher.with_image(converted).eval()

    table = SummaryTable(
        "Held-out images: teacher, students of equal budget, and a student before distillation",
        [*METRICS, Metric("parameters", "encoder", 1e-6, "M", digits=2, higher_is_better=None)]
        + [Metric(f"ms_{pixels}", f"{pixels} px", 1, "ms", 1, None) for pixels, _ in TIMED],
    )
    encoders = {name: models[name].image for name in ("teacher", "C-GSPN")}  # the others have the same architectures
    times = {pixels: milliseconds(encoders, pixels, batch) for pixels, batch in TIMED}
    watch = watcher("evaluation", len(models)) if watcher else None
    for name, model in models.items():
        size = {"parameters": sum(p.numel() for p in model.image.parameters())}
        speed = {f"ms_{pixels}": found.get(name) for pixels, found in times.items()}
        table.add(name, {**evaluate_dual(model, test, probe), **size, **speed})
        if watch:
            watch({})
    facts = {
        "seconds of distillation and evaluation": f"{time.monotonic() - began:.0f}",
        "held-out images": str(len(test)),
        "training images": str(len(train)),
        "seeds": f"{config.distill.stage1.seed}, {config.distill.stage2.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    return DemoResult(table=table, histories=histories, models=models, images=test, facts=facts)
