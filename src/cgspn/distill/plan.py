"""The stages of a distillation run: what each trains, its image sizes and its teacher."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..models.config import EncoderConfig
from ..models.dual import DualEncoder, image_encoder
from ..models.encoder import Encoder
from .batches import Feed
from .block_parallel import PlacedSublayerTask
from .config import DistillConfig, LossConfig, OptimConfig
from .parallel import World
from .runtime import Runtime
from .sizes import SizeRange
from .tasks import DistillTask, Size, SublayerTask, Task, inherited_before, inherited_names, learning_blocks
from .trainer import Stream


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    title: for display. optim: optimiser settings. size: (height, width) of images. task: a function that creates the
    task, called with the student and a runtime when the stage starts. sizes: range of image sizes, or None for only
    `size`. goes_on: whether the stage continues with the adapters and target scales of the previous one. learning: the
    blocks whose sub-layers are trained; None for the whole student.
    """

    title: str
    optim: OptimConfig
    size: Size
    task: Callable[[Encoder, Runtime], Task]
    sizes: SizeRange | None = None
    goes_on: bool = False
    learning: list[int] | None = None

    def stream(self, feed: Feed, encoder: EncoderConfig, world: World) -> Stream:
        """The batches of the stage. Raises the feed's ValueError."""
        if self.sizes is None:  # a feed may not support mixed sizes
            return feed.stream(encoder, self.size, self.optim, world)
        return feed.stream(encoder, self.size, self.optim, world, self.sizes)

    def shapes(self, patch: int) -> tuple[Size, ...]:
        """The possible (height, width) of its batches, in pixels."""
        return (self.size,) if self.sizes is None else self.sizes.shapes(patch)


def check_possible(teacher: DualEncoder | Encoder, student: Encoder, config: DistillConfig, world: World) -> None:
    """Raise ValueError for sizes that are not multiples of the patch, a CUDA graph on a CPU, weights that
    teacher and student share, a wrapper that hides a block of the student, and a contrastive loss without a text tower.
    This runs at the start, because the stage that would fail may be days away."""
    if config.compute.capture and world.device.type != "cuda":
        raise ValueError(f"compute.capture is on, on device {world.device.type!r}; accepted: 'cuda'")
    if config.loss.contrastive and not isinstance(teacher, DualEncoder):
        raise ValueError("loss.contrastive is on; expected a teacher with a text tower")
    theirs, own = ({p.data_ptr() for p in each.parameters()} for each in (image_encoder(teacher), student))
    if theirs & own - {0}:  # without values, on the meta device
        raise ValueError("student shares weights with teacher, which must not change; expected copies, as of convert")
    for i, block in enumerate(student.each_block()):
        if not hasattr(block, "mixer"):
            raise ValueError(
                f"student.blocks[{i}] is a {type(block).__name__}, which hides its block; expected a Block, or a "
                "wrapper that forwards attributes, such as torch.compile's"
            )
    patch, cropped = student.config.patch_size, student.config.crop_remainder
    sizes = {"image_size": [config.image_size] if config.image_size else [], "highres.sizes": config.highres.sizes}
    for name, each in sizes.items():
        for pixels in each:
            if pixels < patch or (pixels % patch and not cropped):
                raise ValueError(f"{name} has {pixels}; accepted: multiples of the student's patch, {patch} pixels")


def plan(
    teacher: DualEncoder | Encoder,
    student: Encoder,
    feed: Feed,
    config: DistillConfig,
    name: str,
    world: World,
    carried: Mapping[str, Tensor] | None = None,
) -> list[Stage]:
    """The stages of a run in order, without those of 0 steps. Raises the errors of `check_possible`, and ValueError for
    a teacher cache together with random crops, mixup or CutMix.

    student: in its state before the first stage. carried: what an earlier run of the student left.
    """
    check_possible(teacher, student, config, world)
    dual = teacher if isinstance(teacher, DualEncoder) else None
    encoder = image_encoder(teacher)
    high = config.highres
    native = (config.image_size, config.image_size) if config.image_size else student.config.image_size
    placed = config.compute.parallel == "placed" and world.size > 1
    sublayer = PlacedSublayerTask if placed else SublayerTask
    inherited = inherited_before(carried or {}) or inherited_after_stage1(encoder, student, config)
    common: dict[str, Any] = {"learn_positions": config.learn_positions, "inherited": inherited}

    def distillation(loss: LossConfig, own_size: Size | None = None) -> Callable[[Encoder, Runtime], Task]:
        """What creates the task of stage 2. own_size: the size of the previous student, if it is the teacher."""

        def task(student: Encoder, runtime: Runtime) -> Task:
            theirs = encoder if own_size is None else copy.deepcopy(student).eval().requires_grad_(False)
            return DistillTask(
                theirs,
                student,
                loss,
                dual=dual,
                captions=feed.captions,
                teacher_size=own_size,
                runtime=runtime,
                **common,
            )

        return task

    stages = [
        Stage(
            f"{name}, stage 1",
            config.stage1,
            native,
            lambda student, runtime: sublayer(encoder, student, runtime=runtime, **common),
            config.sizes,
            learning=learning_blocks(student, inherited),
        ),
        Stage(f"{name}, stage 2", config.stage2, native, distillation(config.loss), config.sizes),
    ]
    trained = student.config.trained_sizes or (round((native[0] * native[1]) ** 0.5),)
    smaller = config.sizes or SizeRange(trained[0], trained[-1], count=len(trained))
    before = (config.sizes.sides(student.config.patch_size)[-1],) * 2 if config.sizes else native
    for pixels in high.sizes:
        loss = replace(config.loss, alpha=0, beta=0, output=0) if high.teacher == "none" else config.loss
        task = distillation(loss, before if high.teacher == "previous" else None)
        before = (pixels, pixels)
        sizes = smaller.up_to(pixels, 1 - high.smaller) if high.smaller else None
        stages.append(Stage(f"{name}, {pixels} px", high.optim, before, task, sizes, high.teacher != "previous"))
    stages = [stage for stage in stages if stage.optim.steps]
    for stage in stages if config.compute.teacher_cache else ():
        if stage.optim.augment or stage.optim.mixup or stage.optim.cutmix:  # features differ between epochs
            raise ValueError(
                f"teacher_cache is on, but {stage.title} crops or blends at random; "
                "expected augment, mixup and cutmix to be off"
            )
    return stages


def inherited_after_stage1(teacher: Encoder, student: Encoder, config: DistillConfig) -> frozenset[str]:
    """The names of the student's weights that equal the teacher's after stage 1; stage 2 treats them as inherited."""
    same = inherited_names(student, teacher)
    trained = learning_blocks(student, same) if config.stage1.steps else []
    parts = tuple(f"blocks.{i}.{part}" for i in trained for part in ("mixer.", "norm1.", "scale1"))
    return frozenset(name for name in same if not name.startswith(parts))
