"""What a student keeps of its teacher, row by row at equal budget: the table that settles the defaults."""

from __future__ import annotations

import copy
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import ImageSet, open_shards, resize
from ..data.locate import cache_folder
from ..data.transforms import normalize, to_float
from ..distill import ComputeConfig, DistillConfig, LossConfig, OptimConfig, distil
from ..evaluate import cosine, relative_error, segment
from ..layers import PropagationConfig
from ..models.checkpoint import write_atomically
from ..models.encoder import Encoder
from ..teachers import attention_student, convert

VOID, CLASSES = 11, 11  # CamVid's ignored label and the number of the others
SHORT_SIDE = 256


@dataclass(frozen=True)
class QualityConfig:
    """Settings of the study.

    Args:
        photos: image-text shard (tar with .jpg files).
        camvid: folder with camvid-train.tar and camvid-test.tar (.jpg, .mask.png).
        size: of the photographs in training and testing, in pixels.
        probe_size: (height, width) of the street scenes; multiples of the patch size.
        held_out: photographs for testing, the last ones of a fixed shuffle.
        stage1_steps, stage2_steps, batch_size: the budget, the same for every row.
        optimizer, stage1_rate, stage2_rate: the recipe of the rows that do not name another.
        seeds: how many runs of each row.
        rows: which rows; empty for all.
    """

    photos: Path
    camvid: Path | None = None
    size: int = 224
    probe_size: tuple[int, int] = (336, 448)
    held_out: int = 200
    stage1_steps: int = 400
    stage2_steps: int = 500
    batch_size: int = 128
    optimizer: str = "muon"
    stage1_rate: float = 5e-3
    stage2_rate: float = 5e-3
    seeds: tuple[int, ...] = (0, 1)
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """How one student differs from the default C-GSPN.

    Args:
        compression, keep_attention, propagation: as in `convert`; attention: the ViT-to-ViT baseline instead.
        stage1: False gives its steps to stage 2.
        loss, optim: changes to the losses and to both optimisations; first: to that of stage 1 alone.
        rates: both peak learning rates, None for those of the study.
    """

    compression: float = 6
    keep_attention: tuple[int, ...] = ()
    propagation: PropagationConfig | None = None
    attention: bool = False
    stage1: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    optim: tuple[tuple[str, Any], ...] = ()
    first: tuple[tuple[str, Any], ...] = ()
    rates: tuple[float, float] | None = None


BASE = PropagationConfig()
ADAMW = (("optimizer", "adamw"),)
ROWS: dict[str, Row] = {
    "ViT": Row(attention=True),
    "C-GSPN": Row(),
    "hybrid 3/12": Row(keep_attention=(3, 7, 11)),
    "s = 4": Row(compression=4),
    "s = 18": Row(compression=18),
    "- stage 1": Row(stage1=False),
    "- PP": Row(loss=LossConfig(alpha=0)),
    "- stage 1 - PP": Row(stage1=False, loss=LossConfig(alpha=0)),
    "- adapters": Row(loss=LossConfig(adapters=False)),
    "- KL": Row(loss=LossConfig(kl_pp=0, kl_pb=0)),
    "- local convolution": Row(propagation=replace(BASE, local_kernel=0)),
    "- concatenation": Row(propagation=replace(BASE, merge="sum")),
    "- norms": Row(propagation=replace(BASE, latent_norm=False, merge_norm=False)),
    "- augmentation": Row(optim=(("augment", False),)),
    "ViT, AdamW": Row(attention=True, optim=ADAMW, rates=(3e-3, 1e-3)),
    "C-GSPN, AdamW": Row(optim=ADAMW, rates=(3e-3, 1e-3)),
    "hybrid 3/12, AdamW": Row(keep_attention=(3, 7, 11), optim=ADAMW, rates=(3e-3, 1e-3)),
}


def read_tar(path: Path, part: str, convert: Callable[[Image.Image], Tensor]) -> list[Tensor]:
    """The pictures of a shard, in its order; part: "image" or "mask"."""
    shards = open_shards(str(path), cache_folder())
    encoded = (shards.read_parts(i, (part,))[part] for i in range(len(shards)))
    return [convert(Image.open(io.BytesIO(content))) for content in encoded if content is not None]


def _pixels(image: Image.Image) -> Tensor:
    rgb = image.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _square(image: Image.Image) -> Tensor:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return _pixels(image.convert("RGB").resize((SHORT_SIDE, SHORT_SIDE), Image.Resampling.BICUBIC, box))


def _mask(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(image.height, image.width)


@dataclass(frozen=True)
class StudyData:
    """Everything on the device. train: photographs; test: held-out ones, normalised [N, 3, H, W]; scenes: (images,
    masks) of the probe's training and testing, or None."""

    train: ImageSet
    test: Tensor
    scenes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None


def load_study(config: QualityConfig, teacher: Encoder, device: torch.device) -> StudyData:
    """Read photographs and scenes. Raises OSError for files that are not there."""
    settings = teacher.config
    photos = torch.stack(read_tar(config.photos, "image", _square)).to(device)
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))
    kept, held = order[: -config.held_out], order[-config.held_out :]
    train = ImageSet(photos[kept.to(device)], torch.zeros(len(kept), dtype=torch.int64), ("photograph",))

    def prepared(images: Tensor, size: tuple[int, int]) -> Tensor:
        return normalize(resize(to_float(images), size), settings.image_mean, settings.image_std)

    test = prepared(photos[held.to(device)], (config.size, config.size))
    scenes = None
    if config.camvid is not None:
        train_scenes, test_scenes = (
            (
                prepared(torch.stack(read_tar(tar, "image", _pixels)).to(device), config.probe_size),
                torch.stack(read_tar(tar, "mask", _mask)).to(device),
            )
            for tar in (config.camvid / "camvid-train.tar", config.camvid / "camvid-test.tar")
        )
        scenes = (train_scenes, test_scenes)
    return StudyData(train, test, scenes)


@torch.inference_mode()
def features(encoder: Encoder, images: Tensor, size: int = 50) -> Tensor:
    """Final grid tokens float32 [N, h, w, C] of normalised images [N, 3, H, W]."""
    return torch.cat([encoder(part).tokens.float() for part in images.split(size)])


def scores(student: Encoder, teacher: Encoder, data: StudyData) -> dict[str, float]:
    """Cosine and relative error of the final grid tokens on held-out photographs; mIoU of a linear probe on scenes."""
    mine, theirs = features(student, data.test), features(teacher, data.test)
    out = {"cosine": cosine(mine, theirs), "relative error": relative_error(mine, theirs)}
    return out | ({"mIoU": 100 * probe_miou(student, data)} if data.scenes else {})


def probe_miou(encoder: Encoder, data: StudyData) -> float:
    """Mean IoU, 0 to 1, of a linear probe on frozen tokens, fitted on the training scenes."""
    assert data.scenes is not None
    (train, train_masks), (test, test_masks) = data.scenes
    found = segment(
        features(encoder, train), train_masks, features(encoder, test), test_masks, CLASSES, ignore_index=VOID
    )
    return found.mean_iou


def student_of(row: Row, teacher: Encoder, seed: int) -> Encoder:
    """The student of a row before training."""
    torch.manual_seed(1000 + seed)  # not the seed of any teacher
    if row.attention:
        return attention_student(teacher)
    return convert(teacher, compression=row.compression, keep_attention=row.keep_attention, propagation=row.propagation)


def fresh_attention(student: Encoder) -> Encoder:
    """Attention that a hybrid keeps starts afresh, as in the ViT baseline, so that no row is given its mixers."""
    blank = Encoder(student.config)
    for own, other in zip(student.each_block(), blank.each_block(), strict=True):
        if hasattr(own.mixer, "qkv"):
            own.mixer = other.mixer.to(next(student.parameters()).device)
    return student


def run_row(row: Row, teacher: Encoder, data: StudyData, config: QualityConfig, seed: int) -> dict[str, float]:
    """Train one student and measure it."""
    student = fresh_attention(student_of(row, teacher, seed))
    rates = row.rates or (config.stage1_rate, config.stage2_rate)
    steps = (config.stage1_steps, config.stage2_steps)
    if not row.stage1:
        steps = (0, sum(steps))
    changes = ({**dict(row.optim), **dict(row.first)}, dict(row.optim))
    stages = [
        replace(
            OptimConfig(steps=n, batch_size=config.batch_size, learning_rate=rate, seed=seed),
            **{"optimizer": config.optimizer, **change},
        )
        for n, rate, change in zip(steps, rates, changes)
    ]
    precision = "bfloat16" if data.test.is_cuda else "float32"
    began = time.monotonic()
    settings = DistillConfig(
        image_size=config.size,
        stage1=stages[0],
        stage2=stages[1],
        loss=row.loss,
        compute=ComputeConfig(precision=precision, capture=data.test.is_cuda),  # type: ignore[arg-type]
    )
    histories = distil(teacher, student, data.train, settings)
    blocks = [k for k in histories[0].steps[-1] if k.startswith("block")]
    first = statistics.mean(histories[0].steps[-1][k] for k in blocks) if blocks else float("nan")
    return {
        **scores(student, teacher, data),
        "stage 1 error": first,
        "parameters (M)": sum(p.numel() for p in student.parameters()) / 1e6,
        "seconds": time.monotonic() - began,
    }


def run_study(
    config: QualityConfig,
    teacher: Encoder,
    device: torch.device,
    out: Path,
    say: Callable[[str], object] = print,
) -> dict[str, list[dict[str, float]]]:
    """Every row with every seed; `out` (JSON) holds all finished runs after each, and those in it are not repeated.

    Raises ValueError for a row that does not exist.
    """
    unknown = [name for name in config.rows if name not in ROWS]
    if unknown:
        raise ValueError(f"rows holds {unknown[0]!r}; accepted: {', '.join(ROWS)}")
    found: dict[str, dict[str, dict[str, float]]] = json.loads(out.read_text()) if out.exists() else {}
    teacher = copy.deepcopy(teacher).to(device).eval()
    data = load_study(config, teacher, device)
    if data.scenes and "teacher" not in found:
        found["teacher"] = {"0": {"cosine": 1.0, "relative error": 0.0, "mIoU": 100 * probe_miou(teacher, data)}}
    for seed in config.seeds:
        for name in config.rows or tuple(ROWS):
            if str(seed) in found.get(name, {}):
                continue
            found.setdefault(name, {})[str(seed)] = run_row(ROWS[name], teacher, data, config, seed)
            write_atomically(out, json.dumps(found, indent=1) + "\n")
            say(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in found[name][str(seed)].items()))
    return {name: list(runs.values()) for name, runs in found.items()}


def summary(found: dict[str, list[dict[str, float]]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row each: the mean over seeds, and half the range after ±."""
    rows = []
    for name in names or tuple(found):
        runs = found[name]
        row: dict[str, Any] = {"student": name, "seeds": len(runs)}
        for key in runs[0]:
            values = [run[key] for run in runs]
            digits = {"cosine": 4, "relative error": 4, "stage 1 error": 3}.get(key, 1)
            spread = (max(values) - min(values)) / 2
            row[key] = f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(runs) > 1 else "")
        rows.append(row)
    return rows
