"""The similarity of students to their teacher after equal training, one row per student. The defaults come from it.

    python -m benchmarks.quality runs/vit-s14 --photos photos.tar --camvid scenes/ --out results/quality
    python -m benchmarks.quality runs/vit-s14 --photos photos.tar --rows ViT C-GSPN 'stage 2 rate / 3' --seeds 0 1 2

Finished runs are not repeated: repeat the command after an interruption, or with more rows or seeds. A run takes
minutes on a GPU. Writes runs.json, quality.json, .md and .png.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from PIL import Image
from torch import Tensor

from cgspn.bench.checks import at_least, not_empty, tiled
from cgspn.bench.results import write
from cgspn.data import ImageSet, resize
from cgspn.data.transforms import normalize, to_float
from cgspn.distill import ComputeConfig, DistillConfig, LossConfig, OptimConfig, distill
from cgspn.environment import describe
from cgspn.evaluate import cosine, relative_mse, segment
from cgspn.layers import PropagationConfig, value_config
from cgspn.models.checkpoint import write_atomically
from cgspn.models.encoder import Encoder
from cgspn.report.drawing import draw
from cgspn.teachers import attention_student, convert, load_encoder

from .resolution.photographs import pixels, read_tar, square

Item = TypeVar("Item")

VOID, CLASSES = 11, 11  # CamVid's ignored label and the number of the others
TESTED = 256  # side of the squares that held-out photographs are resized from, in pixels
RUNS = "runs.json"
WHERE = ("photos", "camvid", "rows", "seeds")  # settings that change what is run, not what a run is


@dataclass(frozen=True)
class QualityConfig:
    """Settings of the study.

    Args:
        photos: image-text shard (tar with .jpg files).
        camvid: folder with camvid-train.tar and camvid-test.tar (.jpg, .mask.png).
        size: side length of the photographs in training and testing, in pixels.
        probe_size: (height, width) of the street scenes; multiples of the patch size.
        source_size: side length of the squares to which training photographs are first resized, in pixels. Random crops
            smaller than `size` are enlarged and have less detail than the test photographs.
        held_out: number of photographs for testing, the last ones of a fixed shuffle.
        stage1_steps: number of steps of stage 1, the same for every row.
        stage2_steps: number of steps of stage 2, the same for every row.
        batch_size: photographs per step.
        optimizer: of all rows that do not set another, like stage1_rate and stage2_rate.
        stage1_rate: peak learning rate of stage 1.
        stage2_rate: peak learning rate of stage 2. If it is too high, stage 2 destroys what stage 1 has learned.
        stage1_optimizer: optimiser of stage 1; None for `optimizer`. Muon reaches a lower stage 1 error in the same
            number of steps.
        crop_scale: smallest and largest area of a random crop, as fractions of the photograph's area.
        mixup: fraction of the photographs that are blended with another. With few photographs, augmentation reduces
            overfitting.
        cutmix: fraction of the photographs that get a random box from another one.
        embedding_rate: learning rate multiplier for the patch embedding in stage 2; 0 freezes it.
        output: weight of the pooled vector's error. If the teacher pools by a class token, the student has a new head,
            whose gradient at weight 1 harms the tokens that are measured here.
        compile: compile the blocks, as in `ComputeConfig`, which takes some minutes in the first row.
        seeds: one run of each row for each seed.
        rows: names of the rows to run; empty for all.
    """

    photos: Path
    camvid: Path | None = None
    size: int = 224
    probe_size: tuple[int, int] = (336, 448)
    source_size: int = 256
    held_out: int = 200
    stage1_steps: int = 400
    stage2_steps: int = 500
    batch_size: int = 128
    optimizer: Literal["adamw", "muon"] = "muon"
    stage1_optimizer: Literal["adamw", "muon"] | None = None
    stage1_rate: float = 5e-3
    stage2_rate: float = 2e-4
    crop_scale: tuple[float, float] = (0.6, 1.0)
    mixup: float = 0.0
    cutmix: float = 0.0
    embedding_rate: float = 0.0
    output: float = 0.05
    compile: bool = False
    seeds: tuple[int, ...] = (0, 1)
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        not_empty(self, "seeds")
        at_least(self, 1, "size", "probe_size", "source_size", "held_out", "stage1_steps", "stage2_steps")
        for name in ("stage1_rate", "stage2_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: more than 0")
        OptimConfig(batch_size=self.batch_size, crop_scale=self.crop_scale, mixup=self.mixup, cutmix=self.cutmix)
        if unknown := [name for name in self.rows if name not in ROWS]:
            raise ValueError(f"rows holds {unknown[0]!r}; accepted: {', '.join(map(repr, ROWS))}")


@dataclass(frozen=True)
class Row:
    """How one student differs from the default C-GSPN.

    Args:
        compression, keep_attention, propagation: as in `convert`; attention: the ViT student instead of a C-GSPN.
        stage1: False skips stage 1 and adds its steps to stage 2.
        loss: of stage 2; its `output` multiplies that of the study.
        optim: changes to the optimiser settings of both stages; first, second: to those of stage 1 or 2.
        rates: peak learning rates of both stages; None for those of the study.
        faster: multiplier of the learning rate of stage 2.
    """

    compression: float = 6
    keep_attention: tuple[int, ...] = ()
    propagation: PropagationConfig | None = None
    attention: bool = False
    stage1: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    optim: tuple[tuple[str, Any], ...] = ()
    first: tuple[tuple[str, Any], ...] = ()
    second: tuple[tuple[str, Any], ...] = ()
    rates: tuple[float, float] | None = None
    faster: float = 1.0


BASE = PropagationConfig()
ADAMW, ADAMW_RATES = (("optimizer", "adamw"),), (3e-3, 1.5e-4)
ROWS: dict[str, Row] = {
    "ViT": Row(attention=True),
    "C-GSPN": Row(),
    "hybrid 3/12": Row(keep_attention=(3, 7, 11)),
    "s = 4": Row(compression=4),
    "s = 18": Row(compression=18),
    "s = 2, 8 channels share": Row(compression=2, propagation=replace(BASE, channels_per_group=8)),
    "values 3": Row(propagation=value_config(3)),
    "values 4": Row(propagation=value_config(4)),
    "values 6": Row(propagation=value_config(6)),
    "values 6, hybrid 3/12": Row(keep_attention=(3, 7, 11), propagation=value_config(6)),
    "values 12": Row(propagation=value_config(12)),
    "values 6 - forget gate": Row(propagation=replace(BASE, value_expansion=6, channels_per_group=8)),
    "- stage 1": Row(stage1=False),
    "- PP": Row(loss=LossConfig(alpha=0)),
    "- stage 1 - PP": Row(stage1=False, loss=LossConfig(alpha=0)),
    "- adapters": Row(loss=LossConfig(adapters=False)),
    "- KL": Row(loss=LossConfig(kl_pp=0, kl_pb=0)),
    "- local convolution": Row(propagation=replace(BASE, local_kernel=0)),
    "- concatenation": Row(propagation=replace(BASE, merge="sum")),
    "- norms": Row(propagation=replace(BASE, latent_norm=False, merge_norm=False)),
    "- augmentation": Row(optim=(("augment", False),)),
    "ViT, AdamW": Row(attention=True, optim=ADAMW, rates=ADAMW_RATES),
    "C-GSPN, AdamW": Row(optim=ADAMW, rates=ADAMW_RATES),
    "hybrid 3/12, AdamW": Row(keep_attention=(3, 7, 11), optim=ADAMW, rates=ADAMW_RATES),
    "ViT, stage 2 rate x 3": Row(attention=True, faster=3),
    "ViT, stage 2 rate / 3": Row(attention=True, faster=1 / 3),
    "stage 2 rate x 3": Row(faster=3),
    "stage 2 rate / 3": Row(faster=1 / 3),
    "embedding at the full rate": Row(second=(("embedding_rate", 1.0),)),
    "inherited rate / 3": Row(second=(("inherited_rate", 1 / 3),)),
    "pooled x 20": Row(loss=LossConfig(output=20)),
}


def _mask(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(image.height, image.width)


@dataclass(frozen=True)
class StudyData:
    """The data of a study, on the device. train: photographs; test: held-out ones, normalised [N, 3, H, W]; scenes:
    (images, masks) for training and testing the probe, or None."""

    train: ImageSet
    test: Tensor
    scenes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None


def load_study(config: QualityConfig, teacher: Encoder, device: torch.device) -> StudyData:
    """Read photographs and scenes. Raises OSError for missing files, ValueError for too few photographs."""
    settings = teacher.config
    sides = (config.source_size, TESTED)
    photos = read_tar(config.photos, "image", lambda image: [square(image, side) for side in sides])
    if not 0 < config.held_out < len(photos):
        raise ValueError(
            f"held_out is {config.held_out}; accepted: 1 to {len(photos) - 1}, of {len(photos)} photographs"
        )
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))
    kept, held = order[: -config.held_out], order[-config.held_out :]
    large, tested = torch.stack([photos[i][0] for i in kept]), torch.stack([photos[i][1] for i in held])
    train = ImageSet(large.to(device), torch.zeros(len(kept), dtype=torch.int64), ("photograph",))

    def prepared(images: Tensor, size: tuple[int, int]) -> Tensor:
        return normalize(resize(to_float(images), size), settings.image_mean, settings.image_std)

    test = prepared(tested.to(device), (config.size, config.size))
    scenes = None
    if config.camvid is not None:
        train_scenes, test_scenes = (
            (
                prepared(torch.stack(read_tar(tar, "image", pixels)).to(device), config.probe_size),
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
    out = {"cosine": cosine(mine, theirs), "relative error": relative_mse(mine, theirs)}
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
    """Randomly initialise the attention that a hybrid keeps, as in the ViT student, so that no row inherits a mixer."""
    blank = Encoder(student.config)
    for own, other in zip(student.each_block(), blank.each_block(), strict=True):
        if hasattr(own.mixer, "qkv"):
            own.mixer = other.mixer.to(next(student.parameters()).device)
    return student


def run_row(row: Row, teacher: Encoder, data: StudyData, config: QualityConfig, seed: int) -> dict[str, float]:
    """Train one student and measure it."""
    student = fresh_attention(student_of(row, teacher, seed))
    first, second = row.rates or (config.stage1_rate, config.stage2_rate)
    steps = (config.stage1_steps, config.stage2_steps)
    if not row.stage1:
        steps = (0, sum(steps))
    common: dict[str, Any] = {"optimizer": config.optimizer, "embedding_rate": config.embedding_rate}
    common |= {"crop_scale": config.crop_scale, "mixup": config.mixup, "cutmix": config.cutmix}
    of_first = {"optimizer": config.stage1_optimizer or config.optimizer}
    changes = (common | of_first | dict(row.optim) | dict(row.first), common | dict(row.optim) | dict(row.second))
    stages = [
        replace(
            OptimConfig(steps=n, batch_size=config.batch_size, learning_rate=rate, seed=seed),
            **change,
        )
        for n, rate, change in zip(steps, (first, second * row.faster), changes)
    ]
    gpu = data.test.is_cuda
    began = time.monotonic()
    settings = DistillConfig(
        image_size=config.size,
        stage1=stages[0],
        stage2=replace(stages[1], steps=0),
        loss=replace(row.loss, output=config.output * row.loss.output),
        compute=ComputeConfig("bfloat16" if gpu else "float32", compile=config.compile, capture=gpu),
    )
    after: dict[str, float] = {}
    if row.stage1:
        last = distill(teacher, student, data.train, settings)[0].steps[-1]
        after["stage 1 error"] = statistics.mean(value for key, value in last.items() if key.startswith("block"))
        after["cosine after stage 1"] = cosine(features(student, data.test), features(teacher, data.test))
    settings = replace(settings, stage1=replace(stages[0], steps=0), stage2=stages[1])
    curve = distill(teacher, student, data.train, settings)[0].curve("total")
    if config.compile:
        torch._dynamo.reset()  # it keeps only a few graphs, and every row brings some
    return {
        **scores(student, teacher, data),
        **after,
        "stage 2 rise": max(curve) / curve[0],
        "parameters (M)": sum(p.numel() for p in student.parameters()) / 1e6,
        "seconds": time.monotonic() - began,
    }


def run_study(
    config: QualityConfig,
    teacher: Encoder,
    device: torch.device,
    out: Path,
    say: Callable[[str], object] = print,
    after: Callable[[dict[str, list[dict[str, float]]]], object] = lambda _: None,
) -> dict[str, list[dict[str, float]]]:
    """Run every row with every seed. All finished runs are saved in `out` (JSON), and runs in it are not repeated.
    after: called after each run with all finished runs. Raises ValueError for sizes that are not multiples of the patch
    size, or if `out` holds runs with other settings.
    """
    tiled("size", config.size, teacher.config.patch_size)
    if config.camvid is not None:
        tiled("probe_size", config.probe_size, teacher.config.patch_size)
    settings = budget(config)
    found: dict[str, dict[str, dict[str, float]]] = {}
    if out.exists():
        saved = json.loads(out.read_text())
        if saved["settings"] != settings:
            other = next(k for k in settings if saved["settings"].get(k) != settings[k])
            raise ValueError(
                f"{out} holds runs with {other} {saved['settings'].get(other)}, not {settings[other]}; "
                "expected the same settings, or another folder"
            )
        found = saved["runs"]
    teacher = copy.deepcopy(teacher).to(device).eval()
    data = load_study(config, teacher, device)
    if data.scenes and "teacher" not in found:
        found["teacher"] = {"0": {"cosine": 1.0, "relative error": 0.0, "mIoU": 100 * probe_miou(teacher, data)}}
    for seed in config.seeds:
        for name in config.rows or tuple(ROWS):
            if str(seed) in found.get(name, {}):
                continue
            found.setdefault(name, {})[str(seed)] = run_row(ROWS[name], teacher, data, config, seed)
            write_atomically(out, json.dumps({"settings": settings, "runs": found}, indent=1) + "\n")
            say(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in found[name][str(seed)].items()))
            after({row: list(runs.values()) for row, runs in found.items()})
    return {name: list(runs.values()) for name, runs in found.items()}


def budget(config: QualityConfig) -> dict[str, Any]:
    """The settings that all runs of a study share, as JSON values."""
    shared = {key: value for key, value in asdict(config).items() if key not in WHERE}
    same: dict[str, Any] = json.loads(json.dumps(shared))
    return same


def run(
    config: QualityConfig,
    teacher: str,
    out: Path,
    device: torch.device,
    *,
    commit: str = "",
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """`run_study` in the folder `out`. Writes finished runs to runs.json, and quality.json, .md and .png, after each
    run.

    Raises ValueError as `run_study`, and OSError for files that are not there.
    """
    machine = describe(commit, "python -m benchmarks.quality") | {
        "teacher": Path(teacher).name,
        "photographs": config.photos.name,
        "scenes": config.camvid.resolve().name if config.camvid else "none",
        "settings": ", ".join(f"{key} {value}" for key, value in budget(config).items()),
    }

    def show(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
        order = [name for name in ("teacher", *ROWS) if name in found]
        rows = summary(found, order)
        runs = [{"student": name, "run": k, **one} for name in order for k, one in enumerate(found[name])]
        write(out, "quality", machine, {"mean over seeds, ± half the range": rows, "runs": runs})
        plot({name: found[name] for name in order}, out / "quality.png")
        return rows

    return show(run_study(config, load_encoder(teacher), device, out / RUNS, say, show))


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot cosine and, if scenes were given, mIoU of every row: the mean as a point, and the single runs."""
    names = [name for name in found if name != "teacher"]
    keys = [key for key in ("cosine", "mIoU") if names and key in found[names[0]][0]]

    def paint(axes: Any) -> None:
        for ax, key in zip(axes[0], keys):
            runs = [[run[key] for run in found[name]] for name in names]
            # points, not bars: what matters is a small part of the way from zero
            ax.plot([statistics.mean(values) for values in runs], range(len(names)), "o", color="#30638e")
            for place, values in enumerate(runs):
                ax.plot(values, [place] * len(values), "k|-", markersize=8, linewidth=1)
            ax.grid(axis="x", color="#dddddd")
            if key == "mIoU" and "teacher" in found:
                ax.axvline(found["teacher"][0][key], color="black", linestyle=":", label="teacher")
                ax.legend(fontsize=8)
            ax.set(xlabel={"cosine": "cosine to the teacher's tokens", "mIoU": "mIoU of a linear probe, %"}[key])
        axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
        axes[0][0].invert_yaxis()

    size = (1 + 5 * len(keys), 1.2 + 0.28 * len(names))
    draw(path, paint, columns=max(1, len(keys)), figsize=size, sharey=True)


DIGITS = {"cosine": 4, "relative error": 4, "stage 1 error": 3, "cosine after stage 1": 4, "stage 2 rise": 2}


def summary(found: dict[str, list[dict[str, float]]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A table row for each student: the mean over seeds, ± half their range."""
    rows = []
    for name in names or tuple(found):
        runs = found[name]
        row: dict[str, Any] = {"student": name, "seeds": len(runs)}
        for key in runs[0]:
            values = [run[key] for run in runs]
            digits = DIGITS.get(key, 1)
            spread = (max(values) - min(values)) / 2
            row[key] = f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(runs) > 1 else "")
        rows.append(row)
    return rows


def main(
    teacher: tyro.conf.Positional[str], config: QualityConfig, out: Path = Path("runs/bench"), commit: str = ""
) -> None:
    """Train, measure and write.

    Args:
        teacher: a checkpoint (file, folder or hub id) or "embedded".
        config: data, budget, rates, rows.
        out: folder for the results.
        commit: commit to record in the results; by default that of the working tree.
    """
    run(config, teacher, out, torch.device("cuda" if torch.cuda.is_available() else "cpu"), commit=commit)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
