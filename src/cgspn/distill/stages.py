"""Distillation in stages (docs/distilling.md), and pretraining without a teacher."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageSet
from ..models.config import TextConfig
from ..models.dual import DualEncoder, build_dual, image_encoder
from ..models.encoder import Encoder
from ..models.registry import model_config
from ..terminal import warn
from .batches import Feed, ImageSetFeed
from .cache import TeacherCache
from .config import DistillConfig, PretrainConfig
from .parallel import World, barrier
from .plan import Stage, plan
from .resume import StageFolders
from .runtime import running
from .taps import check_parity
from .tasks import ContrastiveTask
from .trainer import History, Watch, train

Watcher = Callable[[str, int], Watch]  # (title, number of steps) -> callback after each step


def pretrain(
    images: ImageSet, config: PretrainConfig, watcher: Watcher | None = None, device: str = "cpu"
) -> tuple[DualEncoder, History]:
    """Train an image-text model from scratch with a contrastive loss; works for attention and C-GSPN encoders.

    Raises ValueError for an unknown model and DivergedError if the loss is not finite.
    """
    torch.manual_seed(config.optim.seed)
    model = build_dual(model_config(config.model), TextConfig(), config.embed_dim, config.loss).to(device)
    feed, encoder = ImageSetFeed(images), model.image.config
    title = "pretraining"
    task = ContrastiveTask(model, feed.captions, config.loss)
    stage = Stage(title, config.optim, encoder.image_size, lambda student, runtime: task, config.sizes)
    watch = watcher(title, config.optim.steps) if watcher else None
    history = train(task, stage.stream(feed, encoder, World(device=torch.device(device))), config.optim, title, watch)
    if config.optim.steps:
        model.image.record_sizes(stage.shapes(encoder.patch_size))
    return model.eval(), history


def distill(
    teacher: DualEncoder | Encoder,
    student: Encoder,
    images: ImageSet | Feed,
    config: DistillConfig,
    watcher: Watcher | None = None,
    name: str = "student",
    *,
    folder: Path | None = None,
    world: World | None = None,
    carried: Mapping[str, Tensor] | None = None,
) -> list[History]:
    """Distill a student: stage 1 for each sub-layer, stage 2 end to end, and then higher resolutions.

    `student`, a converted encoder on the device of the teacher, is trained in place and left in eval mode. Its config
    then records its training sizes, the largest as its native size. A stage without anything to learn, such as stage 1
    of a student that keeps all attention, is skipped with a message on standard error.

    Args:
        teacher: an encoder or an image-text model; it is not modified.
        watcher: function that creates the progress callback of each stage.
        name: name of the student, for titles.
        folder: folder for the student, losses and snapshots of each stage, from which an interrupted run resumes.
        world: the processes of the run (`join_world`); None for this one alone.
        carried: what an earlier run of this student and teacher left (`resume.carried_from`): adapters and scales, for
            higher resolutions without another stage 2, and which weights are inherited.

    Returns the record of each stage.

    Raises ValueError if the student does not match the teacher, a contrastive loss has no text tower or a batch is not
    divisible, ParityError if the teacher's taps do not match its forward pass, and the errors of `train`.
    """
    feed = ImageSetFeed(images) if isinstance(images, ImageSet) else images
    world = world or World(device=next(student.parameters()).device)
    encoder = image_encoder(teacher)
    histories = []
    cache = TeacherCache(config.compute.teacher_cache * 2**30) if config.compute.teacher_cache else None
    carried = dict(carried or {})
    torch.manual_seed(config.stage1.seed)
    stages = plan(teacher, student, feed, config, name, world, carried)
    # raise errors of later stages before the first, which may take days
    streams = [stage.stream(feed, student.config, world) for stage in stages]
    folders = StageFolders(folder, config.compute.save_every, world)
    with frozen(teacher):
        for number, (stage, stream) in enumerate(zip(stages, streams, strict=True)):
            snapshots = folders.snapshots(number)
            if (found := folders.restore(number, student)) is not None:
                if snapshots is not None:  # left over if the process was killed just after the end of the stage
                    snapshots.clear()
                losses, throughput, carried = found
                student.record_sizes(stage.shapes(student.config.patch_size))
                histories.append(History(stage.title, losses, throughput))
                continue
            if not histories:
                # a stream of one step, which starts only the workers it needs
                one = replace(stage, optim=replace(stage.optim, steps=1))
                first = next(iter(one.stream(feed, student.config, world)(0)))
                check_parity(encoder.eval(), first.images[:2], config.compute.precision)
            torch.manual_seed(stage.optim.seed)
            with running(stage.task, student, config.compute, world, cache) as task:
                if stage.goes_on:
                    task.carry_on(carried)
                if not list(task.parameters()):
                    if world.rank == 0:
                        warn(f"{stage.title}: skipped, because it has nothing to learn")
                    continue
                if cache is not None:
                    cache.belongs_to(getattr(task, "teacher", None))
                watch = watcher(stage.title, stage.optim.steps) if watcher else None
                history = train(
                    task, stream, stage.optim, stage.title, watch, compute=config.compute, snapshots=snapshots
                )
                carried = task.carried()
            histories.append(history)
            student.record_sizes(stage.shapes(student.config.patch_size))
            folders.finish(number, student, history.steps, history.throughput, carried)
            if snapshots is not None:
                snapshots.clear()
            barrier()
    student.eval()
    return histories


@contextmanager
def frozen(teacher: torch.nn.Module) -> Iterator[None]:
    """Disable the gradients of a teacher within the context."""
    changed = [p for p in teacher.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
