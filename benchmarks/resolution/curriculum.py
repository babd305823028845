"""Higher resolutions after stage 2: what harms, one cause at a time, and the curriculum against the direct jump.

python -m benchmarks.resolution.curriculum vit_s14.safetensors --photos 'photos256-*.tar' --out build/curriculum
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from cgspn import load_encoder
from cgspn.data import ImageSet
from cgspn.distill import DistillConfig, HighResConfig, SizeRange, distill
from cgspn.distill.resume import carried_from
from cgspn.models.encoder import Encoder

from .measure import scores
from .photographs import load_photographs
from .recipe import two_stages
from .rows import write_rows
from .students import STUDENTS

TOKENS = 1 << 15  # a part of a batch, at most


@dataclass(frozen=True)
class Variant:
    """A way to higher resolutions.

    Args:
        sizes: one after the other.
        teacher: as in `HighResConfig`.
        rate: as a share of that of stage 2.
        images: a step.
        carried: whether adapters and scales of stage 2 go along.
        smaller: share of batches at smaller sizes.
        blends: mixup and CutMix as in stage 2.
        contrastive: weight of the loss on captions, which needs whole batches and steps that are not captured.
    """

    sizes: tuple[int, ...]
    teacher: Literal["previous", "original", "none"] = "original"
    rate: float = 0.1
    images: int = 64
    carried: bool = True
    smaller: float = 0.5
    blends: bool = True
    contrastive: float = 0.0


FIRST = Variant((448,), "previous", rate=1.0, images=16, carried=False, smaller=0.0)
ALL, LAST = (448, 756, 1036), (1036,)
VARIANTS: dict[str, Variant] = {
    # each with what the ones above it have mended
    "448: as it was": FIRST,
    "448: + teacher original": replace(FIRST, teacher="original"),
    "448: + a tenth of the rate": replace(FIRST, teacher="original", rate=0.1),
    "448: + adapters carried": replace(FIRST, teacher="original", rate=0.1, carried=True),
    "448: + smaller sizes": replace(FIRST, teacher="original", rate=0.1, carried=True, smaller=0.5),
    "448: + batches of 64": Variant((448,)),
    "448: + no blends": Variant((448,), blends=False),
    "448: teacher previous, all else mended": Variant((448,), "previous"),
    # the paper's rows
    "curriculum, original": Variant(ALL, images=16),
    "curriculum, previous": Variant(ALL, "previous", images=16),
    "direct, original": Variant(LAST, images=16),
    "direct, previous": Variant(LAST, "previous", images=16),
    "curriculum, previous, one size a stage": Variant(ALL, "previous", images=16, smaller=0.0),
    "direct, previous, one size": Variant(LAST, "previous", images=16, smaller=0.0),
}


@dataclass(frozen=True)
class CurriculumConfig:
    """Settings of the study.

    Args:
        teacher: a checkpoint that `cgspn.load_encoder` reads.
        photos: shards of photographs; patterns are taken.
        rows: which of `STUDENTS`.
        variants: which of `VARIANTS`; empty for all.
        seeds: of each row, one run each.
        trained: stages 1 and 2 "fixed" at `size`, "mixed" over the default range, or both, one run each.
        size: pixels of training at one size.
        px: sizes to measure at.
        steps: of stage 1, of stage 2, and of all higher resolutions of a variant together.
        batch_size: images a step of stages 1 and 2, at `size`.
        rates: peak learning rates of stage 1 (Muon) and stage 2 (AdamW).
        held_out: photographs to measure with.
        source: side of the squares that photographs are kept as, in pixels.
        out: folder for the rows.
    """

    teacher: tyro.conf.Positional[Path]
    photos: tuple[str, ...]
    rows: tuple[str, ...] = ("ViT", "values 6, positions, normalised")
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    trained: tuple[Literal["fixed", "mixed"], ...] = ("fixed", "mixed")
    size: int = 224
    px: tuple[int, ...] = (224, 448, 756, 1036)
    steps: tuple[int, int, int] = (400, 800, 240)
    batch_size: int = 64
    rates: tuple[float, float] = (1e-2, 2.5e-4)
    held_out: int = 200
    source: int = 256
    out: Path = Path("build/curriculum")


def base(config: CurriculumConfig, trained: str, seed: int, gpu: bool) -> DistillConfig:
    """Stages 1 and 2, by the first recipe of results/resolution."""
    sizes = SizeRange(config.size // 2, config.size * 2) if trained == "mixed" else None
    return two_stages(
        config.size,
        sizes,
        config.steps[:2],
        config.rates,
        batch_size=config.batch_size,
        seed=seed,
        gpu=gpu,
        optimizer="adamw",
        inherited_rate=1.0,
        blends=True,
    )


def higher(start: DistillConfig, variant: Variant, steps: int) -> DistillConfig:
    """A run of a variant alone, after the stages of `start`; `steps` are shared by its sizes."""
    none = replace(start.stage1, steps=0)
    tokens = variant.images * (max(variant.sizes) // 14) ** 2
    parts = 2 ** max(0, math.ceil(math.log2(tokens / TOKENS)))
    optim = replace(
        start.stage2,
        steps=steps // len(variant.sizes),
        batch_size=variant.images,
        accumulate=1 if variant.contrastive else parts,
        learning_rate=start.stage2.learning_rate * variant.rate,
        warmup=0.05 if variant.carried else 0.1,
        mixup=start.stage2.mixup * variant.blends,
        cutmix=start.stage2.cutmix * variant.blends,
    )
    highres = HighResConfig(variant.sizes, variant.teacher, variant.smaller, optim)
    loss = replace(start.loss, contrastive=variant.contrastive)
    compute = replace(start.compute, capture=start.compute.capture and not variant.contrastive)
    return replace(start, stage1=none, stage2=none, highres=highres, loss=loss, compute=compute)


def measured(
    config: CurriculumConfig, teacher: Encoder, train: ImageSet, held: Tensor, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for every student, variant and size; "before" is the student of stage 2. folder: for what is carried."""
    gpu = held.is_cuda
    for seed in config.seeds:
        for name in config.rows:
            for trained in config.trained:
                shown = {"student": name, "seed": seed, "trained": trained}
                start, place = base(config, trained, seed, gpu), folder / f"{name} {trained} {seed}"
                student = STUDENTS[name].of(teacher, seed)
                distill(teacher, student, train, start, folder=place)
                for px in config.px:
                    row = {"variant": "before", "px": px, "seconds": 0.0}
                    yield {**shown, **row, **scores(student.eval(), teacher, held, px)}
                for title in config.variants or tuple(VARIANTS):
                    variant, begun, own = VARIANTS[title], time.monotonic(), copy.deepcopy(student)
                    carried = carried_from(place) if variant.carried else None
                    distill(teacher, own, train, higher(start, variant, config.steps[2]), carried=carried)
                    seconds = round(time.monotonic() - begun, 1)
                    for px in config.px:
                        row = {"variant": title, "px": px, "seconds": seconds}
                        yield {**shown, **row, **scores(own.eval(), teacher, held, px)}


def run(config: CurriculumConfig) -> None:
    """Train and measure; what is measured is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_encoder(config.teacher).to(device).eval()
    train, held = load_photographs(config.photos, config.held_out, config.source, device)
    config.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for row in measured(config, teacher, train, held, config.out / "students"):
        found.append(row)
        print(*(row[key] for key in ("student", "seed", "trained", "variant", "px", "cosine")), sep="  ", flush=True)
        write_rows(config.out / "curriculum.json", "benchmarks.resolution.curriculum", config, found)


if __name__ == "__main__":
    run(tyro.cli(CurriculumConfig, description=__doc__))
