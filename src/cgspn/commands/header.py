"""The header of a distillation: its stages, estimated cost, and warnings."""

from __future__ import annotations

import timeit
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..bench.machine import matmul_rate
from ..console import duration_text
from ..data import scheduled
from ..data.source import EMBEDDED
from ..distill import DistillConfig, Feed, OptimConfig, World
from ..distill.batches import batch_shapes
from ..distill.flops import forward_flops, sublayer_flops, training_flops
from ..distill.plan import Stage, plan
from ..distill.presets import PRESETS
from ..models.dual import DualEncoder, image_encoder
from ..models.encoder import Encoder

# Activation bytes per token, channel and block in bfloat16; measured 33 to 34 for SO400M from 378 to 1036 px.
KEPT = 34
STATE = 16  # bytes per trained weight with gradient and two moments; a frozen weight has 4
SHARE = 0.4  # fraction of a GPU's matmul rate that whole steps reach; 0.5 for SO400M on an H100
TOKENS = 8192  # in the step that measures a CPU


def header(
    teacher: DualEncoder | Encoder,
    student: Encoder,
    feed: Feed,
    images: int,
    config: DistillConfig,
    world: World,
    carried: Mapping[str, Tensor] | None = None,
) -> Iterator[str]:
    """The lines: device; each stage with steps, images, epochs and sizes; estimated hours and memory.

    images: their number. For the others see `distill`.
    """
    encoder, device = image_encoder(teacher), world.device
    yield f"{device_name(device)}, {world.size} {'process' if world.size == 1 else 'processes'}, {images:,} images"
    flop, most = 0.0, 0.0
    for stage in plan(teacher, student, feed, config, "student", world, carried):
        optim, (height, width) = stage.optim, stage.size
        shapes = batch_shapes(student.config, stage.size, optim, world.size, stage.sizes)
        seen, mixed = scheduled(shapes, optim.seed, optim.steps)[1], sorted({shape.size for shape in shapes})
        others = ""
        if len(mixed) > 1:
            (low, lower), (high, higher) = mixed[0], mixed[-1]
            others = (
                f", or as many tokens in more or fewer images at {len(mixed)} sizes, {low} x {lower} to "
                f"{high} x {higher} px (height x width)"
            )
        yield (
            f"{stage.title}: {optim.steps:,} steps of {optim.batch_size:,} images at {height} x {width} px{others}; "
            f"{seen:,} images in all, {round(seen / images, 1 if seen < 10 * images else None):g} epochs"
        )
        flop += optim.steps * optim.batch_size * flop_an_image(encoder, student, stage)
        tokens = stage.size[0] * stage.size[1] / student.config.patch_size**2
        share = optim.batch_size / optim.accumulate / world.size
        most = max(most, share * tokens * student.config.width * student.config.depth * KEPT)
    rate = SHARE * matmul_rate() if device.type == "cuda" else cpu_rate(student, config.compute.precision)
    weights = sum(4 * p.numel() for p in encoder.parameters()) + sum(STATE * p.numel() for p in student.parameters())
    memory = (weights + most * (1 if config.compute.precision == "bfloat16" else 2)) / 2**30
    time = duration_text(flop / rate / world.size)
    less = ", less with checkpointing" if config.compute.checkpointing else ""
    yield f"roughly {time} and {memory:.2g} GiB on each device{less}, from FLOPs and tokens; excludes image loading"


def cpu_rate(student: Encoder, precision: str) -> float:
    """FLOP/s of the CPU in training steps of a one-block student.

    The matmul rate does not tell: depending on the width, steps reach 20% of it (the demo) to 60% (ViT-S).
    """
    config = student.config
    patches = config.image_size[0] * config.image_size[1] // config.patch_size**2
    encoder = Encoder(replace(config, mixers=config.mixers[:1]))
    images = torch.randn(max(1, TOKENS // patches), config.channels, *config.image_size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            tokens = encoder(images).tokens
        tokens.sum().backward()

    seconds = timeit.timeit(step, number=1)
    if seconds < 1:  # the first step of a small model is slower than the next ones
        seconds = min(timeit.repeat(step, number=1, repeat=2))
    return len(images) * training_flops(encoder.config, config.image_size) / seconds


def flop_an_image(teacher: Encoder, student: Encoder, stage: Stage) -> int:
    """FLOPs of teacher and student per image in a stage."""
    frozen = forward_flops(teacher.config, stage.size)
    if stage.learning is not None:
        return frozen + sublayer_flops(student.config, stage.size, stage.learning)
    return frozen + training_flops(student.config, stage.size, sublayer_adapters=True, block_adapters=True)


def warnings(
    teacher: str, preset: str, config: DistillConfig, device: torch.device, student: Path | None, few: int | None
) -> Iterator[str]:
    """Warnings about likely mistakes. config: the preset's with the user's changes; student: the start checkpoint; few:
    the number of images if there are too few to hold some out."""
    demo = PRESETS[EMBEDDED]
    for_demo = (paces(config.stage1), paces(config.stage2)) == (paces(demo.stage1), paces(demo.stage2))
    if preset == EMBEDDED and teacher != EMBEDDED and for_demo:
        yield (
            "the preset is that of the demo, whose steps and rates are for the embedded teacher of 1.3 M parameters; "
            "choose another with --preset, or set --config.stage1.steps, --config.stage2.steps and rates"
        )
    if student is not None and preset != EMBEDDED:
        yield f"the student in {student} is not converted again; the preset's mixers and positions do not apply"
    if few is not None:
        yield f"{few} images are few: the student will memorise them, and no image is held out to measure its quality"
    if device.type == "cpu" and teacher != EMBEDDED:
        trained = [name for name in ("stage1", "stage2") if getattr(config, name).steps]
        trained += ["highres.optim"] if config.highres.sizes else []
        yield (
            "training runs on the CPU, because PyTorch finds no GPU or --device is cpu; for a trial, lower "
            f"{', '.join(f'--config.{name}.steps' for name in trained)} and the batch_size beside it"
        )


def paces(optim: OptimConfig) -> tuple[int, float]:
    """What must fit the teacher: steps and learning rate."""
    return optim.steps, optim.learning_rate


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with the number of PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
