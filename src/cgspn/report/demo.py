"""The report of the demo: what was distilled, how well it went, and what teacher and student see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import ImageSet, one_pass
from ..distill.batches import eval_transform
from ..distill.taps import tapped_forward
from ..distill.trainer import History
from ..evaluate import BlockAlignment, SummaryTable, align
from ..layers import AttentionMixer
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from . import page
from .charts import block_chart, legend, loss_chart
from .page import Section
from .pca import fit_colours
from .pictures import HEAT, enlarge, heat_overlay, mosaic, png_uri
from .theme import series_colours
from .views import canvases, encoder_view, feature_maps, reach, snap, sublayer_view, walk

TEACHER, STUDENT = "teacher", "C-GSPN"
SIDES = (1, 2, 4)  # images to a side of a canvas: three resolutions
SHOWN = SIDES[-1] ** 2
ALIGNED = 200  # test images that the blocks are compared on
PROBES = 16  # random directions for the influence through a whole encoder

# Places on the canvas: two on objects, one on the ground beside them.
PLACES: tuple[tuple[tuple[float, float], bool, str], ...] = (
    ((0.36, 0.36), True, "On an object in the middle"),
    ((0.87, 0.87), True, "On an object in a corner"),
    ((0.50, 0.75), False, "On the empty ground between objects"),
)


@dataclass(frozen=True)
class DemoResult:
    """What a run of the demo found.

    Attributes:
        table: one row a model.
        histories: the stages of each student, in order, by its name.
        models: "teacher", "C-GSPN" and others, on the CPU, in eval mode; "teacher" and "C-GSPN" are needed.
        images: test images, at least 16.
        facts: what else there is to know, shown as it is: counts, seconds, versions, machine, seeds.
    """

    table: SummaryTable
    histories: dict[str, list[History]]
    models: dict[str, DualEncoder]
    images: ImageSet
    facts: dict[str, str]


def demo_report(result: DemoResult, progress: Callable[[str], object] | None = None) -> str:
    """The report as one self-contained HTML document.

    Args:
        result: of the demo.
        progress: called with the title of each section before it is made.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
        ValueError: "teacher" or "C-GSPN" is not among the models, or too few images.
    """
    missing = [name for name in (TEACHER, STUDENT) if name not in result.models]
    if missing:
        raise ValueError(f"models lacks {missing[0]!r}; expected at least {TEACHER!r} and {STUDENT!r}")
    if len(result.images) < SHOWN:
        raise ValueError(f"images holds {len(result.images)}; expected at least {SHOWN}")
    made = []
    for title, make in (
        ("results", _results),
        ("training", _training),
        ("blocks", _blocks),
        ("features", _features),
        ("influence", _influence),
        ("facts", _facts),
    ):
        if progress is not None:
            progress(title)
        made.append(make(result))
    return page.page(
        "From attention to C-GSPN",
        "A small attention encoder was turned into one that scans the picture line by line, distilled back to quality "
        "in two stages, and compared with its teacher and with an attention student of the same budget.",
        made,
        footer="Made by cgspn demo. This file holds everything it shows and asks nothing of the network.",
    )


def _results(result: DemoResult) -> Section:
    colours = series_colours(list(result.models))
    metric = next((m for m in result.table.metrics if m.key == "zeroshot"), None)
    scores = {name: row.get("zeroshot") for name, row in result.table.rows.items()}
    cards = []
    teacher = scores.get(TEACHER)
    for name in result.models:
        score = scores.get(name)
        if metric is None or score is None:
            continue
        note = "what the students learn from"
        if name != TEACHER and teacher is not None:
            points = (score - teacher) * metric.scale
            note = f"{'+' if points >= 0 else '−'}{abs(points):.{metric.digits}f} points against the teacher"
        if name == TEACHER:
            what = "Teacher: attention"
        elif name == "converted":
            what = "Converted, not distilled"
        else:
            what = f"{name} student"
        cards.append(page.card(what, f"{metric.show(score)} {metric.unit}".strip(), note, colours[name].css))
    sizes = {name: sum(p.numel() for p in model.image.parameters()) for name, model in result.models.items()}
    share = sizes[STUDENT] / sizes[TEACHER] - 1
    note = f"the teacher has {_millions(sizes[TEACHER])}: {abs(share):.0%} {'fewer' if share < 0 else 'more'}"
    cards.append(page.card("Parameters, C-GSPN image encoder", _millions(sizes[STUDENT]), note))
    body = [
        page.paragraph(
            "Zero-shot top-1: how often the class whose name lies nearest to the image is the right one, on images "
            "that no model was trained on. No classifier is trained for it."
        ),
        page.group(cards, "cards"),
        page.scroll(result.table.to_html(), result.table.title),
        page.paragraph(
            "Retrieval (R@1) asks whether the first caption found for an image, or the first of a hundred images "
            "found for a caption, is of its class. Segmentation (mIoU) reads the class of every pixel from the frozen "
            "features with one linear map. The best value of each column is marked; “converted” is the C-GSPN student "
            "before distillation and shows what the inherited weights alone are worth.",
            "read",
        ),
    ]
    return Section("results", "What was kept", "\n".join(body), "Results")


def _training(result: DemoResult) -> Section:
    stages: dict[str, dict[str, History]] = {}
    for name, histories in result.histories.items():
        for history in histories:
            if history.steps:
                stage = history.title.removeprefix(f"{name}, ")
                stages.setdefault(stage, {})[name] = history
    body = [
        page.paragraph(
            "Stage 1 aligns each mixing sub-layer alone: it is given what the teacher's layer was given and learns to "
            "return what it returned. Stage 2 trains the whole student end to end, comparing it with the teacher "
            "after every sub-layer (PP) and after every block (PB) through small adapters that are thrown away "
            "afterwards, and comparing the pooled vector without one."
        ),
        page.paragraph(
            "Lower is better. Faint lines are single steps, strong lines their moving average; where the losses span "
            "a wide range the vertical axis is logarithmic. Both students saw the same images in the same order.",
            "read",
        ),
        legend(list(result.histories)),
    ]
    for stage, by_student in stages.items():
        body.append(page.heading(stage[:1].upper() + stage[1:]))
        body.append(page.group(_loss_panels(stage, by_student), "wide"))
    if not stages:
        body.append(page.paragraph("This run trained nothing, so there are no curves."))
    return Section("training", "How the students learned", "\n".join(body), "Training")


def _loss_panels(stage: str, histories: dict[str, History]) -> list[str]:
    """Total and parts, a chart each; the sub-layer losses of stage 1 as their mean, and the last ones a block."""
    names = [k for k in next(iter(histories.values())).steps[0] if k not in ("step", "lr", "gradient")]
    names = [name for name in names if " block " not in name]  # single taps of stage 2: their means are shown
    blocks = [name for name in names if name.startswith("block ")]
    panels = []
    if blocks:
        means = {
            who: [
                sum(step[b] for b in blocks if b in step) / len([b for b in blocks if b in step])
                for step in h.steps
                if any(b in step for b in blocks)
            ]
            for who, h in histories.items()
        }
        chart = loss_chart(means, label=f"{stage}: mean relative error of the sub-layers over the steps")
        panels.append(
            page.panel(chart, "All sub-layers", "mean relative error; 1 is what a student that returns zeros has")
        )
        last = {
            who: [_tail([step[b] for step in h.steps if b in step]) for b in blocks] for who, h in histories.items()
        }
        chart = block_chart(last, label=f"{stage}: relative error of each sub-layer at the end")
        panels.append(
            page.panel(chart, "Each sub-layer at the end", "relative error, mean of the last tenth of the steps")
        )
        return panels
    titles = {
        "total": ("Total", "the weighted sum that is minimised"),
        "PP": ("After sub-layers (PP)", "mean over blocks, through adapters"),
        "PB": ("After blocks (PB)", "mean over blocks, through adapters"),
        "pooled": ("Pooled vector", "relative error, no adapter"),
        "contrastive": ("Contrastive", "images against captions"),
    }
    for name in names:
        curves = {who: h.curve(name) for who, h in histories.items() if name in h.steps[0]}
        title, note = titles.get(name, (name, ""))
        panels.append(page.panel(loss_chart(curves, label=f"{stage}: {title} over the steps"), title, note))
    return panels


def _tail(values: Sequence[float]) -> float:
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def _blocks(result: DemoResult) -> Section:
    images = result.images.subset(torch.arange(min(ALIGNED, len(result.images))))
    teacher = result.models[TEACHER].image
    transform = eval_transform(teacher.config)
    with torch.no_grad():
        batch = next(iter(one_pass(images, len(images), transform=transform))).images
        theirs = tapped_forward(teacher, batch)
        found: dict[str, tuple[list[BlockAlignment], list[BlockAlignment]]] = {}
        for name, model in result.models.items():
            if name == TEACHER or model.image.config.depth != teacher.config.depth:
                continue
            mine = tapped_forward(model.image, batch)
            found[name] = (align(mine.sublayers, theirs.sublayers), align(mine.blocks, theirs.blocks))
    panels = []
    for tap, where in ((0, "after the sub-layer (PP)"), (1, "after the block (PB)")):
        cosines = {name: [a.cosine for a in pair[tap]] for name, pair in found.items()}
        lowest = min(v for line in cosines.values() for v in line)
        chart = block_chart(cosines, label=f"Cosine {where}, block by block", limits=(min(0.0, lowest - 0.05), 1.0))
        panels.append(page.panel(chart, f"Cosine {where}", "higher is better, 1 is the same direction"))
        errors = {name: [a.relative_error for a in pair[tap]] for name, pair in found.items()}
        chart = block_chart(errors, label=f"Relative error {where}, block by block")
        panels.append(page.panel(chart, f"Relative error {where}", "lower is better, 0 is equal, 1 is as far as zeros"))
    body = [
        page.paragraph(
            f"{len(images)} held-out images go through teacher and students from end to end, and every block of a "
            "student is compared with the same block of the teacher, patch by patch."
        ),
        page.paragraph(
            "Adapters are gone here, so a student may hold what the teacher holds in a form of its own and still look "
            "far away in the middle; the end of the encoder is what users get. Sub-layers are only the mixing branch; "
            "blocks include the path around it, which is why they agree more.",
            "read",
        ),
        legend(list(found)),
        page.group(panels, "wide"),
    ]
    return Section("blocks", "How near each block is to the teacher's", "\n".join(body), "Blocks")


def _features(result: DemoResult) -> Section:
    names = (TEACHER, STUDENT)
    encoders = {name: result.models[name].image for name in names}
    config = encoders[TEACHER].config
    images = result.images.images[:SHOWN]
    photos, maps = {}, {name: {} for name in names}  # type: dict[int, Tensor], dict[str, dict[int, Tensor]]
    for side in SIDES:
        photos[side], canvas = canvases(_for_sides(images, side), config, side)
        for name in names:
            maps[name][side] = feature_maps(encoders[name], canvas)
    basis = {TEACHER: fit_colours(list(maps[TEACHER].values()))}
    basis[STUDENT] = fit_colours(list(maps[STUDENT].values()), like=(basis[TEACHER], list(maps[TEACHER].values())))
    body = [
        page.paragraph(
            "Sixteen held-out images, seen in three ways: each alone, four to a canvas, and all on one canvas. Every "
            "square is one patch, and its colour is what the encoder says of it at the very end: patches of the same "
            "colour mean the same to the model."
        ),
        page.paragraph(
            "The three strongest directions of a model's features become red, green and blue, one choice for all its "
            "pictures. The student's colours are turned as a whole to fit the teacher's, because a direction has no "
            "sign of its own; "
            f"after that they correlate at {page.words([f'{r:.2f}' for r in basis[STUDENT].agreement or ()])}. These "
            f"directions hold {basis[TEACHER].explained:.0%} of the teacher's variance and "
            f"{basis[STUDENT].explained:.0%} of the student's. Look for clothes that keep their colour from one row "
            "to the next: neither model was trained on anything but single images.",
            "read",
        ),
    ]
    for side in SIDES:
        h, w = config.image_size[0] * side, config.image_size[1] * side
        grid = maps[TEACHER][side].shape[1:3]
        title = {1: "Each image alone", 2: "Four to a canvas", 4: "All sixteen on one canvas"}[side]
        body.append(page.heading(f"{title}: {h} × {w} pixels, {grid[0]} × {grid[1]} patches"))
        columns, factor = SIDES[-1] // side, max(1, 448 // (SIDES[-1] * grid[0] // side))
        patch = config.patch_size
        pictures = [enlarge(p, max(1, round(factor / patch))) for p in photos[side]]
        gap = 6
        cells = [_shown(pictures, columns, gap, f"The images, {title.lower()}", "pictures")]
        for name in names:
            colours = [enlarge(basis[name].colours(m), factor) for m in maps[name][side]]
            cells.append(_shown(colours, columns, gap, f"Features of {name} as colours, {title.lower()}", name))
        body.append(page.group(cells, "three"))
    return Section("features", "What the features look like", "\n".join(body), "Features")


def _for_sides(images: Tensor, side: int) -> Tensor:
    """The images in an order in which canvases of side x side keep every image where it is on the largest canvas."""
    most = SIDES[-1]
    places = torch.arange(most * most).view(most // side, side, most // side, side).transpose(1, 2).flatten()
    return images[places]


def _shown(pictures: Sequence[Tensor], columns: int, gap: int, alt: str, caption: str) -> str:
    return page.picture(png_uri(mosaic(pictures, columns, gap)), alt, caption)


def _influence(result: DemoResult) -> Section:
    teacher, student = result.models[TEACHER].image, result.models[STUDENT].image
    photos, canvas = canvases(result.images.images[:SHOWN], teacher.config, SIDES[-1])
    photo = photos[0]
    layer = _layer(student)
    attention = isinstance(teacher.each_block()[layer].mixer, AttentionMixer)
    taps = {STUDENT: walk(student, canvas), TEACHER: walk(teacher, canvas)}
    factor = max(1, 448 // photo.shape[0])
    body = [
        page.paragraph(
            "One patch is chosen, marked by the ring, on the canvas of sixteen images. The colour of every other patch "
            "says how much the chosen one takes from it: by the layer alone, as attention weights where the layer is "
            "attention and as the size of the derivative where it is a scan; and by the whole encoder, as the size of "
            "the derivative for both."
        ),
        page.paragraph(
            "Attention picks patches anywhere. A scan hands information from line to line, so one C-GSPN layer sees "
            "the whole picture through four triangles that meet in the chosen patch, and near patches count more "
            "than far ones. “Half within” says how many patches away half of the influence has been collected. Each "
            "picture has its own scale, which ends at the strongest patch other than the chosen one; the whole-encoder "
            f"maps are estimated from {PROBES} random directions.",
            "read",
        ),
        page.colour_scale(HEAT, "least", "most"),
    ]
    for near, bright, title in PLACES:
        position = snap(photo, teacher.config.patch_size, near, bright=bright)
        views = (
            (f"C-GSPN, layer {layer + 1}", sublayer_view(student, taps[STUDENT], layer, position, probes=32)),
            (
                f"teacher, layer {layer + 1}{', attention' if attention else ''}",
                sublayer_view(teacher, taps[TEACHER], layer, position, probes=32),
            ),
            ("C-GSPN, whole encoder", encoder_view(student, taps[STUDENT], position, probes=PROBES)),
            ("teacher, whole encoder", encoder_view(teacher, taps[TEACHER], position, probes=PROBES)),
        )
        cells = []
        for name, values in views:
            uri = png_uri(heat_overlay(photo, values, position, factor=factor))
            note = f"half within {reach(values, position):.1f} patches"
            cells.append(page.picture(uri, f"What one patch sees, {name}, {note}", name, note))
        body.append(page.heading(f"{title}: row {position[0] + 1}, column {position[1] + 1}"))
        body.append(page.group(cells, "four"))
    return Section("influence", "What a patch sees", "\n".join(body), "Influence")


def _layer(student: Encoder) -> int:
    """The scan nearest to the middle of the encoder; the middle block if it has none."""
    blocks = student.each_block()
    middle = len(blocks) // 2
    scans = [i for i, block in enumerate(blocks) if not isinstance(block.mixer, AttentionMixer)]
    return min(scans or [middle], key=lambda i: abs(i - middle))


def _facts(result: DemoResult) -> Section:
    facts = {
        "parameters of the image encoders": ", ".join(
            f"{name} {_millions(sum(p.numel() for p in model.image.parameters()))}"
            for name, model in result.models.items()
        ),
        "model names": ", ".join(dict.fromkeys(model.image.config.name for model in result.models.values())),
        **result.facts,
    }
    return Section("facts", "What was run", page.fact_list(facts), "Run")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
