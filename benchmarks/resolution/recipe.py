"""How the students of the studies are trained: the recipe of the preset "vit-s14-study"."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cgspn.distill import ComputeConfig, DistillConfig, LossConfig, OptimConfig, SizeRange

LOSS = LossConfig(output=0.05)


def two_stages(
    size: int,
    sizes: SizeRange | None,
    steps: tuple[int, int],
    rates: tuple[float, float],
    *,
    batch_size: int,
    seed: int,
    gpu: bool,
    loss: LossConfig = LOSS,
    optimizer: Literal["adamw", "muon"] = "muon",
    inherited_rate: float = 0.2,
    blends: bool = False,
    smallest_crop: float = 0.08,
) -> DistillConfig:
    """Stages 1 and 2: images of `size` pixels, or drawn from `sizes`, `batch_size` of them at `size`.

    steps, rates: of stage 1 (Muon) and of stage 2 (`optimizer`); rates are peaks. gpu: bfloat16, and steps from CUDA
    graphs. loss, inherited_rate: of stage 2. blends: mixup and CutMix. smallest_crop: fraction of the image area.
    """
    common = OptimConfig(
        batch_size=batch_size,
        seed=seed,
        embedding_rate=0.0,
        crop_scale=(smallest_crop, 1.0),
        mixup=1.0 if blends else 0.0,
        cutmix=0.5 if blends else 0.0,
    )
    return DistillConfig(
        image_size=size,
        sizes=sizes,
        stage1=replace(common, steps=steps[0], learning_rate=rates[0], optimizer="muon"),
        stage2=replace(
            common, steps=steps[1], learning_rate=rates[1], optimizer=optimizer, inherited_rate=inherited_rate
        ),
        loss=loss,
        compute=ComputeConfig("bfloat16" if gpu else "float32", capture=gpu),
    )
