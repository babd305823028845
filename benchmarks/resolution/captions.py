"""Higher resolutions with and without distillation: the loss on features, the loss on captions, or both.

The teacher has no text tower, so one is fitted to it first. Its image vector is the mean of its grid tokens, not its
class token: a student has the same mean, without a pooling head that starts afresh.

python -m benchmarks.resolution.captions vit_s14.safetensors --photos 'photos256-*.tar' \
    --captioned photos-000000.tar caltech101-train.tar --test caltech101-test.tar --out build/captions
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from cgspn import load_encoder
from cgspn.data import TEMPLATES, ImageSet, fill, open_shards
from cgspn.data.locate import cache_folder
from cgspn.distill import DistillConfig, OptimConfig, SizeRange, distill
from cgspn.distill.losses import clip_loss
from cgspn.distill.resume import carried_from
from cgspn.distill.trainer import learning_rate
from cgspn.evaluate.zeroshot import class_embeddings, top1
from cgspn.models.config import TextConfig
from cgspn.models.dual import DualEncoder
from cgspn.models.encoder import Encoder
from cgspn.models.text import TextTower

from .curriculum import ALL, Variant, higher
from .measure import features, scores
from .photographs import load_photographs, square
from .recipe import two_stages
from .rows import write_rows
from .students import STUDENTS

TEXT = TextConfig(width=128, depth=2, heads=4, context=64)
EMBED_DIM = 128
WAYS = tuple(
    f"{way}, {loss}"
    for way in ("direct", "curriculum")
    for loss in ("distillation", "distillation and captions", "captions")
)


@dataclass(frozen=True)
class CaptionsConfig:
    """Settings of the study.

    Args:
        teacher: a checkpoint that `cgspn.load_encoder` reads.
        photos: shards of photographs for stages 1 and 2 and to hold out; patterns are taken.
        captioned: shards of photographs with captions "a photo of a NAME.", for all stages.
        test: a shard of such photographs to classify.
        row: which of `STUDENTS`.
        variants: which of `WAYS`.
        seeds: one student each.
        trained: stages 1 and 2 "fixed" at `size`, or "mixed" from half of it to 3.5 times as much.
        size: pixels of training at one size.
        higher: the curriculum's sizes, one after the other; the direct jump is to the last.
        px: sizes to measure at; the text tower is fitted to the teacher at all of them.
        steps: of stage 1, of stage 2, and of all higher resolutions of a variant together.
        text_steps: of the text tower.
        batch_size: images a step of stages 1 and 2, at `size`.
        images: a step of a variant, at its largest size. A contrastive loss needs them in memory together.
        rates: peak learning rates of stage 1 and stage 2, both with Muon.
        contrastive: weight of the loss on captions, in variants that have one.
        held_out: photographs to measure the cosine with.
        source: side of the squares that photographs are kept as, in pixels.
        out: folder for the rows.
    """

    teacher: tyro.conf.Positional[Path]
    photos: tuple[str, ...]
    captioned: tuple[Path, ...]
    test: Path
    row: str = "values 6, positions, normalised"
    variants: tuple[str, ...] = WAYS
    seeds: tuple[int, ...] = (0,)
    trained: Literal["fixed", "mixed"] = "fixed"
    size: int = 224
    higher: tuple[int, ...] = ALL
    px: tuple[int, ...] = (224, 448, 756, 1036)
    steps: tuple[int, int, int] = (400, 800, 90)
    text_steps: int = 300
    batch_size: int = 64
    images: int = 8
    rates: tuple[float, float] = (1e-2, 1e-3)
    contrastive: float = 0.1
    held_out: int = 200
    source: int = 256
    out: Path = Path("build/captions")

    def __post_init__(self) -> None:
        """Raise ValueError for unknown variants."""
        if unknown := sorted(set(self.variants) - set(WAYS)):
            raise ValueError(f"variants holds {unknown}; accepted: {', '.join(map(repr, WAYS))}")


def load_captioned(shards: Sequence[Path], side: int, device: torch.device) -> ImageSet:
    """Photographs as squares; the class of each is the NAME of its caption, "a photo of a NAME."."""
    images: list[Tensor] = []
    names: list[str] = []
    for shard in shards:
        opened = open_shards(str(shard), cache_folder())
        for sample in map(opened.read, range(len(opened))):
            images.append(square(Image.open(io.BytesIO(sample.encoded)), side))
            names.append(sample.caption.removeprefix("a photo of a ").removesuffix("."))
    classes = tuple(sorted(set(names)))
    labels = torch.tensor([classes.index(name) for name in names])
    return ImageSet(torch.stack(images).to(device), labels, classes)


def joined(photos: ImageSet, captioned: ImageSet) -> ImageSet:
    """All photographs, without classes: for distillation alone."""
    images = torch.cat([photos.images, captioned.images])
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64), ("photograph",))


def pooling_its_tokens(teacher: Encoder) -> Encoder:
    """The teacher with the mean of its grid tokens as its pooled vector, if it pools by its class token."""
    if teacher.config.pooling != "cls":
        return teacher
    encoder = Encoder(replace(teacher.config, pooling="mean"))
    encoder.load_state_dict(teacher.state_dict())
    return encoder.to(next(teacher.parameters()).device).eval()


def image_vectors(encoder: Encoder, images: Tensor, px: int) -> Tensor:
    """The mean of the grid tokens at a size, float32 [N, C]."""
    return torch.cat([features(encoder, part, px).mean((1, 2)) for part in images.split(64)])


def with_text_tower(encoder: Encoder, images: ImageSet, px: Sequence[int], steps: int) -> DualEncoder:
    """A text tower and an image projection for a frozen encoder (locked-image tuning), fitted to its features at
    each of `px` in turn."""
    torch.manual_seed(0)
    device = images.images.device
    dual = DualEncoder(encoder, TextTower(TEXT), EMBED_DIM).to(device)
    found = torch.stack([image_vectors(encoder, images.images, size) for size in px])
    texts = dual.tokenizer([fill(template, name) for name in images.class_names for template in TEMPLATES]).to(device)
    texts, labels = texts.view(len(images.class_names), len(TEMPLATES), -1), images.labels.to(device)
    learned = [p for name, p in dual.named_parameters() if not name.startswith("image.")]
    optimizer = torch.optim.AdamW(learned, 1e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * learning_rate(OptimConfig(steps), step)
        chosen = torch.randperm(len(images))[:256].to(device)
        ids = texts[labels[chosen], torch.randint(len(TEMPLATES), (len(chosen),)).to(device)]
        image = normalize(dual.image_projection(found[step % len(px), chosen]), dim=-1)
        same = labels[chosen, None] == labels[None, chosen]
        optimizer.zero_grad()
        clip_loss(image, dual.encode_text(ids), same, dual.logit_scale).backward()
        optimizer.step()
    return dual.eval()


@torch.inference_mode()
def zero_shot(dual: DualEncoder, encoder: Encoder, test: ImageSet, px: int) -> float:
    """Accuracy in percent: the nearest class name by the text tower, of the encoder's vectors."""
    names = class_embeddings(dual.encode_text, test.class_names)
    embedded = dual.image_projection(image_vectors(encoder, test.images, px))
    return 100 * top1(embedded, names, test.labels)


def base(config: CaptionsConfig, seed: int, gpu: bool) -> DistillConfig:
    """Stages 1 and 2, without captions."""
    return two_stages(
        config.size,
        SizeRange(config.size // 2, config.size * 7 // 2) if config.trained == "mixed" else None,
        config.steps[:2],
        config.rates,
        batch_size=config.batch_size,
        seed=seed,
        gpu=gpu,
    )


def variant_of(config: CaptionsConfig, title: str) -> Variant:
    """One of `WAYS`."""
    way, loss = title.split(", ")
    sizes = {"direct": config.higher[-1:], "curriculum": config.higher}[way]
    distilled = Variant(sizes, images=config.images)
    return {
        "distillation": distilled,
        "distillation and captions": replace(distilled, contrastive=config.contrastive),
        "captions": replace(distilled, contrastive=config.contrastive, teacher="none", carried=False),
    }[loss]


def beyond(start: DistillConfig, variant: Variant, steps: int) -> DistillConfig:
    """The higher resolutions, with the optimiser of the preset "vit-s14-study" there."""
    stage2 = replace(start.stage2, optimizer="adamw", learning_rate=2.5e-4, inherited_rate=1.0)
    return higher(replace(start, stage2=stage2), variant, steps)


def measured(
    config: CaptionsConfig, dual: DualEncoder, train: ImageSet, captioned: ImageSet, test: ImageSet, held: Tensor
) -> Iterator[dict[str, Any]]:
    """A row for the teacher, and for every seed, variant and size; "before" is the student of stage 2."""

    def rows(encoder: Encoder, **shown: Any) -> Iterator[dict[str, Any]]:
        for px in config.px:
            row = {**shown, "px": px, **scores(encoder, dual.image, held, px)}
            yield {**row, "zero-shot": zero_shot(dual, encoder, test, px)}

    yield from rows(dual.image, student="teacher", seed=0, variant="", seconds=0.0)
    for seed in config.seeds:
        shown = {"student": config.row, "seed": seed, "trained": config.trained}
        start, begun = base(config, seed, held.is_cuda), time.monotonic()
        student = STUDENTS[config.row].of(dual.image, seed)
        with TemporaryDirectory() as folder:
            distill(dual, student, train, start, folder=Path(folder))
            carried = carried_from(Path(folder))
        yield from rows(student, **shown, variant="before", seconds=round(time.monotonic() - begun, 1))
        for title in config.variants:
            variant, begun, own = variant_of(config, title), time.monotonic(), copy.deepcopy(student)
            settings = beyond(start, variant, config.steps[2])
            distill(dual, own, captioned, settings, carried=carried if variant.carried else None)
            yield from rows(own, **shown, variant=title, seconds=round(time.monotonic() - begun, 1))


def run(config: CaptionsConfig) -> None:
    """Train and measure; what is measured is written after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = pooling_its_tokens(load_encoder(config.teacher).to(device).eval())
    photos, held = load_photographs(config.photos, config.held_out, config.source, device)
    captioned = load_captioned(config.captioned, config.source, device)
    test = load_captioned([config.test], config.source, device)
    dual = with_text_tower(teacher, captioned, config.px, config.text_steps)
    config.out.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for row in measured(config, dual, joined(photos, captioned), captioned, test, held):
        found.append(row)
        print(*(row[key] for key in ("student", "seed", "variant", "px", "cosine", "zero-shot")), sep="  ", flush=True)
        write_rows(config.out / "captions.json", "benchmarks.resolution.captions", config, found)


if __name__ == "__main__":
    run(tyro.cli(CaptionsConfig, description=__doc__))
