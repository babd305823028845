"""The report of the demo: training, results, and features of teacher and student."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data import ImageSet
from ..distill.batches import eval_transform
from ..distill.taps import tapped_forward
from ..distill.trainer import History
from ..evaluate import SummaryTable, cosine, relative_mse
from ..models.dual import DualEncoder
from . import page
from .charts import block_chart, colours_of, css, legend
from .losses import Steps, block_panels, ends, step_panels
from .page import Section
from .photographs import COLUMNS, canvases
from .show import look_at
from .show_page import assets, show_sections

TEACHER, STUDENT = "teacher", "C-GSPN"
CANVASES = 2  # canvases of sixteen images in the report
MEASURES = (
    (cosine, "Cosine", "higher is better, 1 for equal directions"),
    (relative_mse, "Relative MSE", "lower is better, 0 for equal features, 1 for zeros"),
)
ALIGNED = 200  # test images on which blocks are compared


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo: a table with one row per model, and the stages of each student by its name.

    models: "teacher", "C-GSPN" and others, on the CPU, in eval mode; "teacher" and "C-GSPN" are needed. images: test
    images, at least 16. facts: further facts to show: counts, seconds, versions, machine, seeds.
    """

    table: SummaryTable
    histories: dict[str, list[History]]
    models: dict[str, DualEncoder]
    images: ImageSet
    facts: dict[str, str]


def demo_report(result: DemoResult) -> str:
    """The report as one self-contained HTML document.

    Raises ModuleNotFoundError without matplotlib, naming the extra, and ValueError for too few images or if "teacher"
    or "C-GSPN" is not among the models.
    """
    missing = [name for name in (TEACHER, STUDENT) if name not in result.models]
    if missing:
        raise ValueError(f"models lacks {missing[0]!r}; expected at least {TEACHER!r} and {STUDENT!r}")
    if len(result.images) < COLUMNS**2:
        raise ValueError(f"images holds {len(result.images)}; expected at least {COLUMNS**2}")
    return page.page(
        "From attention to C-GSPN",
        "A small attention encoder was converted into a C-GSPN encoder, which scans the image line by line. The "
        "student was distilled in two stages and is compared with its teacher and a ViT student of equal budget.",
        [_results(result), _training(result), _blocks(result), *_seen(result), _facts(result)],
        footer="Made by cgspn demo. This file is self-contained and makes no network requests.",
        **assets(),
    )


def _results(result: DemoResult) -> Section:
    colours = colours_of(result.models)
    metric = next(m for m in result.table.metrics if m.key == "zeroshot")
    scores = {name: row[metric.key] or 0.0 for name, row in result.table.rows.items()}
    called = {TEACHER: "Teacher: attention", "converted": "Converted, not distilled"}
    cards = []
    for name, score in scores.items():
        points = (score - scores[TEACHER]) * metric.scale
        note = f"{'+' if points >= 0 else '−'}{abs(points):.{metric.digits}f} points relative to the teacher"
        note = "the teacher of both students" if name == TEACHER else note
        value = f"{metric.show(score)} {metric.unit}"
        cards.append(page.card(called.get(name, f"{name} student"), value, note, css(colours[name])))
    sizes = {name: sum(p.numel() for p in model.image.parameters()) for name, model in result.models.items()}
    share = sizes[STUDENT] / sizes[TEACHER] - 1
    note = f"the teacher has {_millions(sizes[TEACHER])}: {abs(share):.0%} {'fewer' if share < 0 else 'more'}"
    cards.append(page.card("Parameters, C-GSPN image encoder", _millions(sizes[STUDENT]), note))
    for timed in [m for m in result.table.metrics if m.unit == "ms"][-1:]:
        mine, theirs = (result.table.rows[name][timed.key] for name in (STUDENT, TEACHER))
        if mine and theirs:
            note = f"the teacher takes {timed.show(theirs)} ms: {theirs / mine:.1f} times as long"
            cards.append(page.card(f"C-GSPN, an image of {timed.label}", f"{timed.show(mine)} ms", note))
    body = [
        page.paragraph(
            "Zero-shot top-1: how often the class whose name is closest to the image is the right one, on test images. "
            "No classifier is trained."
        ),
        page.group(cards, "cards"),
        page.scroll(result.table.to_html(), result.table.title),
        page.paragraph(
            "Retrieval (R@1) tests whether the closest of a hundred images to a caption has its class. Segmentation "
            "(mIoU) predicts the class of every pixel from the frozen features with a linear layer. The best value of "
            "each column is marked. “converted” is the C-GSPN student before distillation.",
            "read",
        ),
        page.paragraph(
            "Times are for this machine. An image of 28 px has 49 tokens, one of 224 px has 3,136. The time of "
            "attention is quadratic in the number of tokens, that of a scan linear. A scan is slower for few tokens "
            "and faster for many. The page “Measurements” of the documentation shows larger encoders and GPUs.",
            "read",
        ),
    ]
    return Section("results", "Accuracy and speed", "\n".join(body), "Results")


def _training(result: DemoResult) -> Section:
    stages: dict[str, dict[str, Steps]] = {}
    for name, histories in result.histories.items():
        for history in histories:
            if history.steps:
                stage = history.title.removeprefix(f"{name}, ")
                stages.setdefault(stage, {})[name] = history.steps
    body = [
        page.paragraph(
            "Stage 1 trains each mixing sub-layer separately to match the teacher's output from the teacher's input. "
            "Stage 2 trains the whole student end to end. It compares the student with the teacher after every "
            "sub-layer (PP) and after every block (PB), through small adapters that are removed afterwards, and "
            "compares the pooled vectors without an adapter."
        ),
        page.paragraph(
            "Lower is better. Faint lines are single steps, strong lines their moving average. The vertical axis is "
            "logarithmic if losses span a wide range. Charts over blocks show the last twentieth of the steps. Both "
            "students were trained on the same images in the same order.",
            "read",
        ),
        legend(list(result.histories)),
    ]
    for stage, runs in stages.items():
        last = {name: ends(steps)[1] for name, steps in runs.items()}
        panels = step_panels(stage, runs, schedule=False) + block_panels(stage, last, "last steps")
        body += [page.heading(stage[:1].upper() + stage[1:]), page.group(panels, "wide")]
    if not stages:
        body.append(page.paragraph("This run trained nothing, so there are no curves."))
    return Section("training", "Losses", "\n".join(body), "Training")


def _blocks(result: DemoResult) -> Section:
    images = result.images.subset(torch.arange(min(ALIGNED, len(result.images))))
    teacher = result.models[TEACHER].image
    with torch.no_grad():
        batch = eval_transform(teacher.config)(images.images)
        theirs = tapped_forward(teacher, batch)
        mine = {
            name: tapped_forward(model.image, batch)
            for name, model in result.models.items()
            if name != TEACHER and model.image.config.depth == teacher.config.depth
        }
    panels = []
    for tap, where in (("sublayers", "after the sub-layer (PP)"), ("blocks", "after the block (PB)")):
        for measure, called, note in MEASURES:
            values = {
                name: [measure(s, t) for s, t in zip(getattr(taps, tap), getattr(theirs, tap), strict=True)]
                for name, taps in mine.items()
            }
            limits = (min(0.0, min(map(min, values.values())) - 0.05), 1.0) if measure is cosine else (None, None)
            chart = block_chart(values, label=f"{called} {where}, block by block", limits=limits)
            panels.append(page.panel(chart, f"{called} {where}", note))
    body = [
        page.paragraph(
            f"Teacher and students process {len(images)} held-out images end to end. Every block of a student is "
            "compared with the same block of the teacher, patch by patch."
        ),
        page.paragraph(
            "This comparison has no adapters, so a student's middle blocks may represent the same information "
            "differently from the teacher's. Only the final output matters to users. Sub-layers are only the mixing "
            "branch; blocks include the residual stream and are therefore more similar.",
            "read",
        ),
        legend(list(mine)),
        page.group(panels, "wide"),
    ]
    return Section("blocks", "Similarity of each block to the teacher's", "\n".join(body), "Blocks")


def _seen(result: DemoResult) -> list[Section]:
    """Features of teacher and student on canvases of sixteen images, larger than any training image."""
    student = result.models[STUDENT].image
    side, patch = COLUMNS * max(student.config.image_size), student.config.patch_size
    pictures = list(canvases(result.images.images, side, patch, CANVASES))
    shown = look_at(pictures, student, result.models[TEACHER].image)
    return show_sections(shown, "Features of the models")


def _facts(result: DemoResult) -> Section:
    facts = {
        "parameters of the image encoders": ", ".join(
            f"{name} {_millions(sum(p.numel() for p in model.image.parameters()))}"
            for name, model in result.models.items()
        ),
        "model names": ", ".join(dict.fromkeys(model.image.config.name for model in result.models.values())),
        **result.facts,
    }
    return Section("facts", "Settings and machine", page.fact_list(facts), "Run")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
