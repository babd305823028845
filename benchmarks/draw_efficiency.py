"""Draw results/efficiency/efficiency.png from the measurements in that folder.

python -m benchmarks.draw_efficiency
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent.parent / "results" / "efficiency"
NAMES = {"vit": "attention", "cgspn": "C-GSPN", "hybrid": "hybrid 3/27"}
COLOURS = {"attention": "#8a8f98", "C-GSPN": "#d1495b", "hybrid 3/27": "#30638e"}


def main() -> None:
    """Draw a panel with the throughput of whole encoders and one with the latency of one image."""
    measured = json.loads((FOLDER / "encoder" / "encoder.json").read_text())
    rows = measured["throughput"]
    graphs = [row for row in measured["one image"] if row["way"] == "CUDA graph"]
    panels = (
        (f"images / s, B = {rows[0]['B']}", "images / s", rows, "{:.0f}", "x the first"),
        ("ms for one image, CUDA graph", "ms", graphs, "{:.1f}", "the first / this"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for ax, (title, key, rows, form, ratio) in zip(axes, panels, strict=True):
        sizes = list(dict.fromkeys(row["px"] for row in rows))
        for row in rows:
            name = NAMES[row["model"].split("_")[0]]
            at = sizes.index(row["px"]) + 0.27 * (list(COLOURS).index(name) - 1)
            first = row["px"] == sizes[0]
            ax.bar(at, row[key], 0.25, color=COLOURS[name], label=name if first else None)
            said = form.format(row[key]) + (f"\n{row[ratio]:.1f}x" if name != "attention" else "\n")
            ax.annotate(said, (at, row[key]), ha="center", va="bottom", fontsize=8)
        ax.set(title=title, yscale="log")
        ax.set_xticks(range(len(sizes)), [f"{px} px" for px in sizes])
        ax.margins(y=0.18)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("SO400M encoders on one H100, bfloat16", fontsize=11)
    figure.savefig(FOLDER / "efficiency.png", dpi=130)


if __name__ == "__main__":
    main()
