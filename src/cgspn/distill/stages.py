"""The recipe: pretrain without a teacher, or convert and distil in two stages (source, "Key Designs" 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..data import Batch, EvalTransform, ImageSet, TrainTransform, batches
from ..models.config import EncoderConfig, TextConfig
from ..models.dual import DualEncoder, build_dual
from ..models.encoder import Encoder
from ..models.registry import model_config
from .config import DistillConfig, OptimConfig, PretrainConfig
from .tasks import ContrastiveTask, DistillTask, SublayerTask, Task
from .trainer import History, Watch, train

Watcher = Callable[[str, int], Watch]  # title and number of steps -> what the trainer calls after each


def train_transform(config: EncoderConfig) -> TrainTransform:
    """Random crop and flip to the encoder's native size, normalised as it expects."""
    return TrainTransform(config.image_size, mean=config.image_mean, std=config.image_std)


def eval_transform(config: EncoderConfig, size: tuple[int, int] | None = None) -> EvalTransform:
    """Resize and centre crop to `size`, the native one if None, normalised as the encoder expects."""
    return EvalTransform(size or config.image_size, mean=config.image_mean, std=config.image_std)


def _run(
    task: Task, images: ImageSet, encoder: EncoderConfig, optim: OptimConfig, title: str, watcher: Watcher | None
) -> History:
    transform = train_transform(encoder) if optim.augment else eval_transform(encoder)
    stream = batches(images, optim.batch_size, steps=optim.steps, seed=optim.seed, transform=transform)
    device = task.parameter_groups()[0][0].device
    stream = (replace(b, images=b.images.to(device), labels=b.labels.to(device)) for b in stream)
    return train(task, stream, optim, title, watcher(title, optim.steps) if watcher else None)


def _captions_of(images: ImageSet) -> Callable[[Batch], list[str]]:
    return lambda batch: images.captions(seed=batch.step, indices=batch.indices)


def pretrain(
    images: ImageSet, config: PretrainConfig, watcher: Watcher | None = None, device: str = "cpu"
) -> tuple[DualEncoder, History]:
    """Train an image-text model from scratch, contrastively; works for attention and propagation encoders alike.

    Raises ValueError for an unknown model and DivergedError if the loss stops being finite.
    """
    torch.manual_seed(config.optim.seed)
    model = build_dual(model_config(config.model), TextConfig(), config.embed_dim).to(device)
    task = ContrastiveTask(model, _captions_of(images), config.loss)
    history = _run(task, images, model.image.config, config.optim, "pretraining", watcher)
    return model.eval(), history


def distil(
    teacher: DualEncoder | Encoder,
    student: Encoder,
    images: ImageSet,
    config: DistillConfig,
    watcher: Watcher | None = None,
    name: str = "student",
) -> list[History]:
    """Both stages: align each sub-layer alone, then the whole student end to end. `student` is trained in place.

    Args:
        teacher: an encoder, or the image-text model whose image side is the teacher; it is not changed.
        student: a converted encoder, on the device of the teacher.
        images: what both look at.
        config: steps, rates and losses; a stage of 0 steps is left out.
        watcher: makes the progress callback of each stage.
        name: of the student, in titles.

    Returns the record of each stage; the student is left in eval mode. Raises ValueError for a student that does not
    match or a contrastive loss without a text tower, DivergedError if a loss stops being finite.
    """
    dual = teacher if isinstance(teacher, DualEncoder) else None
    encoder = teacher.image if isinstance(teacher, DualEncoder) else teacher
    histories = []
    torch.manual_seed(config.stage1.seed)
    frozen = [p for p in teacher.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        if config.stage1.steps:
            stage1 = SublayerTask(encoder, student)
            title = f"{name}, stage 1"
            histories.append(_run(stage1, images, student.config, config.stage1, title, watcher))
        if config.stage2.steps:
            stage2 = DistillTask(encoder, student, config.loss, dual=dual, captions=_captions_of(images))
            title = f"{name}, stage 2"
            histories.append(_run(stage2, images, student.config, config.stage2, title, watcher))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    student.eval()
    return histories
