"""Charts of the losses of a stage over steps and over blocks, for one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from . import page
from .charts import block_chart, loss_chart

Steps = Sequence[Mapping[str, float]]
TITLES = {
    "total": ("Total", "the weighted sum that is minimised"),
    "PP": ("After sub-layers (PP)", "mean over blocks, with adapters if enabled"),
    "PB": ("After blocks (PB)", "mean over blocks, with adapters if enabled"),
    "pooled": ("Pooled vector", "relative MSE, no adapter"),
    "contrastive": ("Contrastive", "between images and captions"),
    "gradient": ("Gradient", "norm before clipping"),
    "lr": ("Learning rate", "of new weights; inherited ones have a multiplier"),
}
LAST = ("gradient", "lr")  # panels after the losses
TAPS = {"": "Each sub-layer", "PP ": "Each sub-layer (PP)", "PB ": "Each block (PB)"}


def step_panels(stage: str, runs: Mapping[str, Steps], schedule: bool = True) -> list[str]:
    """Charts of the total loss and each of its parts over the steps, with a line per run.

    schedule: also show gradient norm and learning rate.
    """
    names = [name for name in next(iter(runs.values()))[0] if name != "step" and "block" not in name]
    panels = []
    for name in [name for name in names if name not in LAST] + [name for name in LAST if schedule and name in names]:
        found = {run: [step[name] for step in steps if name in step] for run, steps in runs.items()}
        curves = {run: values for run, values in found.items() if values}
        chart = loss_chart(curves, label=f"{stage}: {name} over the steps")
        panels.append(page.panel(chart, *TITLES.get(name, (name, ""))))
    return panels


def block_panels(stage: str, lines: Mapping[str, Steps], when: str) -> list[str]:
    """One chart per kind of tap: the mean loss of every block, with a line per set of steps (`ends`)."""
    first = next((steps[0] for steps in lines.values() if steps), {})
    panels = []
    for tap, caption in TAPS.items():
        names = [name for name in first if name.startswith(f"{tap}block ")]
        if not names:
            continue
        means = {line: [fmean(step[n] for step in steps if n in step) for n in names] for line, steps in lines.items()}
        numbers = [int(name.rpartition(" ")[2]) for name in names]
        skips = numbers != list(range(len(names)))
        note = f"loss; the blocks with indices {', '.join(map(str, numbers))}" if skips else "loss"
        chart = block_chart(means, label=f"{stage}: {caption.lower()}, {when}")
        panels.append(page.panel(chart, caption, note))
    return panels


def ends(steps: Steps) -> tuple[Steps, Steps]:
    """The first and the last twentieth of the steps that record single blocks; in long stages, these are few."""
    return twentieths([step for step in steps if any("block" in name for name in step)])


def twentieths(steps: Steps) -> tuple[Steps, Steps]:
    """The first and the last twentieth of some steps, at least one step each."""
    size = max(1, len(steps) // 20)
    return steps[:size], steps[-size:]
