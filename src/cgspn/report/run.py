"""The report of a distillation: losses per stage and block, speed, data and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..console import duration_text, rate_text
from . import page
from .charts import legend, loss_chart
from .losses import block_panels, ends, step_panels, twentieths
from .page import Section

Record = Mapping[str, Any]
ENDS = ("first steps", "last steps")
RISEN = 1.05  # a loss that ends above this multiple of its lowest twentieth is reported as rising


def run_report(record: Record) -> str:
    """The report of a run as one self-contained HTML document.

    record: the content of distill.json: "command", "versions", "config", "losses" (by stage, a list of steps),
    "throughput" (by stage), "images", "held_out" (`held_out.compare`), "skipped" (file and reason), "processes",
    "device". Raises ModuleNotFoundError without matplotlib, naming the extra.
    """
    losses: Mapping[str, list[dict[str, float]]] = record["losses"]
    stages = {title: steps for title, steps in losses.items() if steps}
    sections = [_summary(record, stages)]
    for number, (title, steps) in enumerate(stages.items(), 1):
        sections.append(_stage(f"stage-{number}", title, steps, record["throughput"].get(title, {})))
    sections += [_data(record), _settings(record)]
    return page.page(
        "How the student was distilled",
        f"From {record['teacher']} with {record['images']:,} images, in {len(stages)} "
        f"{'stage' if len(stages) == 1 else 'stages'}: losses, blocks, speed, data and settings.",
        sections,
        footer="Made by cgspn distill. This file is self-contained and makes no network requests.",
    )


def _summary(record: Record, stages: Mapping[str, Sequence[Mapping[str, float]]]) -> Section:
    cards = []
    for title, steps in stages.items():
        first, last = (fmean(step["total"] for step in part) for part in twentieths(steps))
        speed = record["throughput"].get(title, {})
        time = duration_text(speed["seconds"]) if "seconds" in speed else ""
        rate = rate_text(speed["images_per_second"]) if "images_per_second" in speed else ""
        parts = [f"loss {first:.3g} at first; {len(steps):,} steps", rate, time, rising(steps)]
        cards.append(page.card(title, f"{last:.3g}", ", ".join(part for part in parts if part), "var(--link)"))
    held = record.get("held_out") or {}
    if "cosine" in held:
        seen = "training images (there are fewer than 100)" if held["trained_on"] else "held-out images"
        note = f"of the final grid tokens at the native size, mean over {held['images']} {seen}"
        cards.insert(0, page.card("Cosine to the teacher", f"{held['cosine']:.3f}", note, "var(--link)"))
    body = [
        page.paragraph("The final loss of each stage, averaged over the last twentieth of its steps. Lower is better."),
        page.group(cards, "cards") if cards else page.paragraph("This run trained nothing."),
    ]
    if "picture" in held:
        words = "PCA visualisation of the features; the student's components are rotated to match the teacher's"
        picture = page.picture(held["picture"], f"Images and {words}", "Image, teacher, student", words)
        body.append(page.group([picture], "wide"))
    return Section("summary", "In short", "\n".join(body), "In short")


def _stage(key: str, title: str, steps: Sequence[Mapping[str, float]], speed: Mapping[str, Any]) -> Section:
    body = [page.group(step_panels(title, {"student": steps}), "wide")]
    if panels := block_panels(title, dict(zip(ENDS, ends(steps))), "first and last steps"):
        body += [page.heading("Block by block"), legend(ENDS), page.group(panels, "wide")]
    body += _speed(title, speed)
    return Section(key, title[:1].upper() + title[1:], "\n".join(body), title.rpartition(", ")[2])


def _speed(title: str, speed: Mapping[str, Any]) -> list[str]:
    if not speed:
        return []
    cards = [page.card("Images/s", f"{speed['images_per_second']:,.1f}", "all processes, after the first steps")]
    if "mfu" in speed:
        cards.append(page.card("MFU", f"{speed['mfu']:.0%}", "FLOPs of teacher and student / peak of the device"))
    note = f"first batch after {duration_text(speed['first_batch_seconds'])}"
    cards.append(page.card("Waiting for data", f"{speed['data_wait_share']:.1%}", note))
    chart = loss_chart({"images/s": speed["curve"]}, label=f"{title}: images/s over the stage")
    panel = page.panel(chart, "Images/s", "since the stage was last started")
    return [page.heading("Speed"), page.group(cards, "cards"), page.group([panel], "wide")]


def _data(record: Record) -> Section:
    skipped: Mapping[str, Mapping[str, Any]] = record.get("skipped", {})
    facts = {"data": str(record["data"]), "images": f"{record['images']:,}"}
    facts |= {f"skipped {kind}": f"{each['count']:,} of {each['of']:,}" for kind, each in skipped.items() if each["of"]}
    if names := (record.get("held_out") or {}).get("names"):
        facts["held out of training"] = ", ".join(names)
    body = [page.fact_list(facts)]
    for kind, each in skipped.items():
        if each["files"]:
            names = {name: str(reason) for name, reason in each["files"].items()}
            body += [page.heading(f"Skipped {kind}"), page.fact_list(names)]
    return Section("data", "Training data", "\n".join(body), "Data")


def _settings(record: Record) -> Section:
    facts = {"command": record["command"], "device": record["device"], "processes": str(record["processes"])}
    if record.get("peak_memory"):
        facts["peak memory"] = f"{record['peak_memory'] / 2**30:.1f} GiB, the maximum over processes"
    facts |= {name: str(version) for name, version in record["versions"].items()}
    body = [page.fact_list(facts), page.heading("Settings"), page.fact_list(dict(_flat(record["config"])))]
    return Section("settings", "Command and settings", "\n".join(body), "Settings")


def rising(steps: Sequence[Mapping[str, float]]) -> str:
    """A warning for a stage whose loss ends higher than an earlier twentieth of its steps, or ""."""
    totals = [step["total"] for step in steps]
    size = max(1, len(totals) // 20)
    means = [sum(totals[start : start + size]) / size for start in range(0, len(totals) - size + 1, size)]
    lowest = min(means)
    return f"the loss rises: it was {lowest:.3g}" if means[-1] > RISEN * lowest else ""


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings to command-line names, without those that are not set."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if value is None:
            continue
        rows += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [(before + name, str(value))]
    return rows
