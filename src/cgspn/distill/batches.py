"""Training batches; each process gets its share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..data import (
    Batch,
    BatchPlan,
    BatchShape,
    EvalTransform,
    ImageSet,
    LoaderConfig,
    SampleSource,
    SkipCounter,
    TrainTransform,
    read_rows,
    scheduled,
    transforms,
)
from ..data.loader import generator_of, stream_indices
from ..models.config import EncoderConfig
from .config import OptimConfig
from .parallel import World
from .sizes import SizeRange, tokens_of
from .trainer import Stream

CROPS, COLORS, BLENDS, BOXES = 1, 2, 3, 4  # uses of random numbers, see `generator_of`
Size = tuple[int, int]  # (height, width) in pixels
EVEN = 8  # batch sizes are multiples of this, for fast kernels and the same batches on up to eight processes


class Feed(Protocol):
    """A source of training images for all stages."""

    def stream(
        self, encoder: EncoderConfig, size: Size, optim: OptimConfig, world: World, sizes: SizeRange | None = None
    ) -> Stream:
        """Return a function from a start step to an iterator over this process's share of the batches.

        encoder: config with the normalisation of images. sizes: range of image sizes; each batch has about as many
        tokens as `optim.batch_size` images of `size`. A feed that does not support mixed sizes may omit `sizes`.
        """

    def captions(self, batch: Batch) -> list[str]:
        """Return one caption per image of a batch."""


def eval_transform(config: EncoderConfig, size: Size | None = None) -> EvalTransform:
    """Resize and centre crop to `size` (None: the native size), with the encoder's normalisation."""
    return EvalTransform(size or config.image_size, config.image_crop, config.image_mean, config.image_std)


@dataclass(frozen=True)
class ImageSetFeed:
    """Images in memory; captions are templates filled with class names."""

    images: ImageSet

    def stream(
        self, encoder: EncoderConfig, size: Size, optim: OptimConfig, world: World, sizes: SizeRange | None = None
    ) -> Stream:
        """See `Feed`. Raises ValueError for a size below 1, and the errors of `blended_share`."""
        blended_share(optim, world)
        shapes = batch_shapes(encoder, size, optim, world.size, sizes)
        prepared = {shape.size: transform_of(encoder, shape.size, optim) for shape in shapes}

        def start_at(start: int) -> Iterator[Batch]:
            for step in range(start, optim.steps):
                shape, begin = scheduled(shapes, optim.seed, step)
                indices = stream_indices(len(self.images), begin, shape.images, seed=optim.seed)
                images, labels = self.images.fetch(indices)
                share = share_of(shape.images, world)
                images = prepared[shape.size](images, generator_of(optim.seed, CROPS, step))[share].to(world.device)
                images = blended(images, optim, step, shape.images, share)
                yield Batch(step, indices[share], images, labels[share].to(world.device))

        return start_at

    def captions(self, batch: Batch) -> list[str]:
        """See `Feed`. The template changes with the step."""
        return self.images.captions(seed=batch.step, indices=batch.indices)


@dataclass(frozen=True)
class SampleFeed:
    """Images that worker processes read, decode and crop during training.

    captioned: skip images without a caption or class, for a contrastive loss. counter: counts the images that this
    process reads and skips.
    """

    source: SampleSource
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    captioned: bool = False
    counter: SkipCounter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counter", SkipCounter(self.source.source, len(self.source), self.loader.max_skipped))

    def stream(
        self, encoder: EncoderConfig, size: Size, optim: OptimConfig, world: World, sizes: SizeRange | None = None
    ) -> Stream:
        """See `Feed`. The stream raises ValueError if too much is skipped, and WorkerError if workers keep dying.

        Raises ValueError for an encoder of grey images, and the errors of `blended_share`.
        """
        if encoder.channels != 3:
            raise ValueError(f"the encoder takes {encoder.channels} channels; accepted for files of images: 3")
        share = blended_share(optim, world)
        plan = BatchPlan(
            optim.batch_size,
            (share.start, share.stop),
            size,
            optim.seed,
            augment=optim.augment,
            scale=optim.crop_scale,
            captioned=self.captioned,
            shapes=batch_shapes(encoder, size, optim, world.size, sizes),
        )
        workers, prefetch = self.loader.workers_for(world.local_size), self.loader.prefetch

        def start_at(start: int) -> Iterator[Batch]:
            read = read_rows(
                self.source, plan, start, optim.steps, workers=workers, prefetch=prefetch, device=world.device
            )
            for step, rows in read:
                self.counter.add(len(rows.labels), rows.failures)
                if rows.images is None:
                    raise ValueError(
                        f"{self.source.source}: {len(rows.failures)} consecutive images cannot be used, the last "
                        f"{rows.failures[-1][1]}: {rows.failures[-1][2]}"
                    )
                shape, _, own = plan.at(step)
                images = transforms.to_float(rows.images.permute(0, 3, 1, 2).contiguous())  # workers send bytes
                if optim.augment and optim.jitter:
                    factors = transforms.jitter_factors(
                        shape.images, optim.jitter, generator_of(optim.seed, COLORS, step)
                    )
                    images = transforms.jitter_colors(images, factors[own])
                images = transforms.normalize(images, encoder.image_mean, encoder.image_std)
                images = blended(images, optim, step, shape.images, own)
                yield Batch(step, rows.indices, images, rows.labels.to(world.device), tuple(rows.captions))

        return start_at

    def captions(self, batch: Batch) -> list[str]:
        """See `Feed`. Captions are stored with the images, or templates filled with class names."""
        return list(batch.captions)


def transform_of(encoder: EncoderConfig, size: Size, optim: OptimConfig) -> TrainTransform | EvalTransform:
    """The transform from images in memory to images of `size`. Raises ValueError for a size below 1."""
    if not optim.augment:
        return eval_transform(encoder, size)
    return TrainTransform(
        size,
        optim.crop_scale,
        transforms.ratio_around(size),
        jitter=optim.jitter,
        mean=encoder.image_mean,
        std=encoder.image_std,
    )


def batch_shapes(
    encoder: EncoderConfig, size: Size, optim: OptimConfig, processes: int, sizes: SizeRange | None
) -> tuple[BatchShape, ...]:
    """The batch shapes of a stage, each with about as many tokens as `batch_size` images of `size`.

    Batch sizes are rounded to multiples of eight, and of processes times accumulation steps. They do not depend on the
    number of processes if its product with `OptimConfig.accumulate` divides eight and the batch size. sizes: range of
    image sizes; None for `size` only.
    """
    if sizes is None:
        return (BatchShape(size, optim.batch_size),)
    patch, parts = encoder.patch_size, processes * optim.accumulate
    step = math.lcm(math.gcd(EVEN, optim.batch_size), parts)
    least = processes * (3 if optim.cutmix else 2 if optim.mixup else 1)
    budget = optim.batch_size * tokens_of(size, patch)

    def images(shape: Size) -> int:
        return max(round(budget / tokens_of(shape, patch) / step), math.ceil(least / step), 1) * step

    return tuple(BatchShape(shape, images(shape)) for shape in sizes.shapes(patch))


def blended(images: Tensor, optim: OptimConfig, step: int, count: int, share: slice) -> Tensor:
    """A process's share of a batch of `count` images after mixup and CutMix.

    The result does not depend on the number of processes if shares are multiples of four.
    """
    if optim.mixup:
        factors = transforms.blend_factors(count, optim.mixup, generator_of(optim.seed, BLENDS, step))
        images = transforms.blend(images, factors[share])
    if optim.cutmix:
        random = generator_of(optim.seed, BOXES, step)
        boxes = transforms.paste_boxes(count, optim.cutmix, images.shape[2], images.shape[3], random)
        images = transforms.paste(images, boxes[share])
    return images


def share_of(batch_size: int, world: World) -> slice:
    """The rows of a batch for this process. Raises ValueError if the batch is not divisible."""
    if batch_size % world.size:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {world.size} processes")
    share = batch_size // world.size
    return slice(world.rank * share, (world.rank + 1) * share)


def blended_share(optim: OptimConfig, world: World) -> slice:
    """`share_of` for a stage's batches. Also raises ValueError if shares are too small for mixup or CutMix."""
    share = share_of(optim.batch_size, world)
    own = share.stop - share.start
    if own % optim.accumulate:
        raise ValueError(
            f"accumulate is {optim.accumulate}; accepted: divisors of a process's share of batch_size, {own} images"
        )
    for name, least in (("mixup", 2), ("cutmix", 3)):  # partners of an image are the next one or two
        if getattr(optim, name) and own < least:
            raise ValueError(
                f"{name} is {getattr(optim, name)}, with {own} images per process; expected {least} or more"
            )
    return share
