"""Tables and a plot of scaling.json: efficiency and losses relative to one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.checkpoint import write_atomically
from ..report.drawing import draw, lines
from .results import table

YES = {True: "yes", False: "no"}
TOLERANCES = {"bfloat16": 1e-3, "float32": 1e-5}  # relative differences of losses, because the order of sums differs

HOW = """Weak scaling: the batch per GPU is constant. ms per step: mean of the slowest process; ±: standard deviation in
the first process. Captured: forward and backward replay one CUDA graph. Efficiency: images/s relative to one GPU (same
stage, size and batch) times the number of GPUs; "of the fastest": relative to the faster of captured and eager steps on
one GPU. Communication: fraction of the wall time of two profiled steps in which an NCCL kernel runs, including waiting;
exposed: without any other kernel; means over processes, empty without GPUs. Memory: the largest peak of a process,
which holds the whole frozen teacher."""


def stage_of(mode: str) -> str:
    """The stage of a mode: "stage 2" for "stage 2 ddp"."""
    return mode[:7]


def speed_rows(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every measured row, compared with one GPU at the same stage, size and batch."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return stage_of(row["mode"]), row["image"], row["mode"], row["captured"], row["gpus"]

    rows = []
    for row in sorted(saved["rows"], key=place):
        shown = {"mode": row["mode"], "captured": YES[row["captured"]]}
        shown |= {"image": row["image"], "batch a GPU": row["batch"], "GPUs": row["gpus"]}
        if "step_ms" not in row:
            rows.append(shown | {"note": row["note"]})
            continue
        rate = row["images/s"]
        shown |= {"ms a step": row["step_ms"], "± (ms)": row["spread_ms"], "images/s": rate}
        alone = {"mode": stage_of(row["mode"]), "image": row["image"], "batch": row["batch"], "gpus": 1}
        same = [one for one in saved["rows"] if alone.items() <= one.items() and "step_ms" in one]
        bases = {one["captured"]: one["images/s"] for one in same}
        if base := bases.get(row["captured"]):
            of_fastest = rate / max(bases.values()) / row["gpus"]
            shown |= {"speed-up": rate / base, "efficiency": rate / base / row["gpus"], "of the fastest": of_fastest}
        shown |= {"communication": row.get("communication"), "exposed": row.get("exposed")}
        rows.append(shown | {"peak memory (GiB)": row.get("peak memory (GiB)")})
    return rows


def loss_rows(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The largest relative difference of losses to those on one GPU, and whether it is within tolerance."""
    tolerance = TOLERANCES[saved["settings"]["compute"]["precision"]]
    rows = []
    for row in sorted(saved["losses"], key=lambda row: (row["mode"], row["captured"], row["gpus"])):
        shown = {"mode": row["mode"], "captured": YES[row["captured"]], "GPUs": row["gpus"]}
        shown |= {"image": row["image"], "batch of all": row["batch"]}
        shown["losses"] = ", ".join(f"{total:.6g}" for total in row["totals"])
        alone = {"mode": stage_of(row["mode"]), "gpus": 1, "captured": row["captured"]}
        base = next((one["totals"] for one in saved["losses"] if alone.items() <= one.items()), None)
        if base is not None and row["gpus"] > 1:
            apart = max(abs(a - b) / abs(b) for a, b in zip(row["totals"], base, strict=True))
            shown |= {"relative difference": f"{apart:.1e}", "tolerance": f"{tolerance:.0e}"}
            shown["equal"] = YES[apart <= tolerance]
        rows.append(shown)
    return rows


def link_rows(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bus bandwidths in GB/s."""
    names = ("all_reduce", "all_gather")
    return [
        {"GPUs": link["gpus"], **{f"{name} (GB/s)": link[name] / 1e9 for name in names}}
        for link in sorted(saved["links"], key=lambda link: link["gpus"])
    ]


def report(saved: Mapping[str, Any], out: Path) -> None:
    """Write scaling.md, and scaling.png if there are several numbers of GPUs."""
    rows = speed_rows(saved)
    parts = ["# scaling", "\n".join(f"- {name}: {value}" for name, value in saved["settings"].items())]
    for gpus, machine in sorted(saved["machines"].items(), key=lambda item: int(item[0])):
        parts.append(f"{gpus} GPUs: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    parts += [
        "## weak scaling",
        HOW,
        table(rows),
        "## losses",
        "One batch, the same for any number of GPUs; the total loss of every step.",
        table(loss_rows(saved)),
    ]
    if saved["links"]:
        mebibytes = saved["settings"]["link"]
        parts += ["## links", f"Bus bandwidths as NCCL's tests define them, {mebibytes} MiB.", table(link_rows(saved))]
    write_atomically(out / "scaling.md", "\n\n".join(parts) + "\n")
    if any("efficiency" in row and row["GPUs"] > 1 for row in rows):
        plot(rows, out / "scaling.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the efficiency over the number of GPUs, with a line per mode and size."""

    def paint(axes: Any) -> None:
        ax, shown = axes[0, 0], [row for row in rows if "efficiency" in row and row["GPUs"] > 1]
        named = [
            row | {"line": f"{row['mode']}{', captured' if row['captured'] == 'yes' else ''}, {row['image']} px"}
            for row in shown
        ]
        alone = [{"line": line, "GPUs": 1, "efficiency": 1.0} for line in dict.fromkeys(row["line"] for row in named)]
        lines(ax, alone + named, "GPUs", "efficiency", "line")
        ticks = sorted({1, *(row["GPUs"] for row in shown)})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.set(xlabel="GPUs", ylabel="images/s relative to one GPU, per GPU")
        values = [row["efficiency"] for row in shown]
        ax.set_ylim(min(0.8, *values) - 0.02, max(1.0, *values) + 0.005)  # exceed 1 only for measured values

    draw(path, paint, figsize=(6, 3.6))
