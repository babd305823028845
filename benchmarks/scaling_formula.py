"""Predict the scaling to more GPUs with a formula, from the measured times of steps and links and stated assumptions.

    python -m benchmarks.scaling_formula --out results/scaling --gpus 64 512

Reads scaling.json of a `cgspn bench scaling` in that folder; writes simulation.json and simulation.md. Needs no GPU.

A step on n GPUs takes

    t(n) = t(1) + sigma sqrt(2 ln n) + max(0, c(n) - overlap x window)

- t(1), sigma: mean and standard deviation of a step on one GPU. The middle term is the expected delay of the slowest of
  n processes with normally distributed times, for large n.
- c(n) = moved (n - 1) / n x bytes / bandwidth + collectives x hops x latency. "ddp" moves gradients by all-reduce,
  2 x bytes, in buckets of 25 MiB; "fsdp" gathers weights in the forward, again in the backward if they were freed, and
  scatters gradients: 2 or 3 x bytes, and as many collectives per unit of blocks. bytes: all trained weights in float32.
- bandwidth: the bus bandwidth measured in a node. With several nodes, at most the total bandwidth of a node's network
  cards, because each GPU has its own card and its own ring.
- hops: n - 1 in a ring (fsdp); two ways through a node and a binary tree over nodes (ddp).
- window: the part of t(1) with which communication can overlap. With ddp it is the backward (nothing with `capture`,
  where gradients are averaged afterwards); with fsdp all of the student's time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cgspn.bench.checks import at_least, not_empty
from cgspn.bench.results import table, write
from cgspn.bench.scaling_report import report

BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's
STAGE_2 = {"stage 2 ddp": "all_reduce", "stage 2 fsdp": "all_gather"}


@dataclass(frozen=True)
class SimulationConfig:
    """The assumptions that were not measured.

    Args:
        gpus: numbers of GPUs to predict.
        node: number of GPUs in a node.
        between: GB/s between each GPU and other nodes, through its own network card; 50 is 400 Gb/s.
        hop: latency of a hop of a collective in microseconds.
        backward: fraction of the student's time spent in the backward.
        overlap: fraction of the window that communication can use, 0 to 1: its kernels take SMs from others, and the
            last bucket overlaps with nothing.
    """

    gpus: tuple[int, ...] = (64, 512)
    node: int = 8
    between: float = 50.0
    hop: float = 5.0
    backward: float = 2 / 3
    overlap: float = 0.8

    def __post_init__(self) -> None:
        """Raise ValueError for impossible settings."""
        not_empty(self, "gpus")
        at_least(self, 1, "gpus", "node")
        at_least(self, 0, "hop")
        for name in ("backward", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 to 1")
        if not self.between > 0:
            raise ValueError(f"between is {self.between}; accepted: more than 0")


def communication(
    mode: str, n: int, size: float, units: int, bandwidth: float, config: SimulationConfig, passes: int = 3
) -> float:
    """Seconds of a step's collectives on n GPUs, c(n) above.

    size: bytes; units: number of FSDP2 units; passes: how often FSDP2 moves the weights; bandwidth: bytes/s in a node.
    """
    nodes = math.ceil(n / config.node)
    within = min(n, config.node)
    if nodes > 1:
        bandwidth = min(bandwidth, within * config.between * 1e9)
    if mode == "stage 2 ddp":
        moved, collectives = 2, math.ceil(size / BUCKET)
        hops = 2 * (within - 1 + math.ceil(math.log2(nodes)))
    else:
        moved, collectives, hops = passes, passes * (units + 1), n - 1
    return moved * (n - 1) / n * size / bandwidth + collectives * hops * config.hop * 1e-6


def simulate(saved: Mapping[str, Any], config: SimulationConfig) -> list[dict[str, Any]]:
    """Rows for stage 2 from the scaling.json of `bench scaling`; measured numbers of GPUs come first.

    Raises ValueError if a step on one GPU or the links of several are missing.
    """
    alone = [row for row in saved["rows"] if row["gpus"] == 1 and row["mode"] == "stage 2" and "step_ms" in row]
    links = [link for link in saved["links"] if link["gpus"] <= config.node]
    if not alone or not links:
        raise ValueError("scaling.json lacks steps of stage 2 on 1 GPU, or links of several; expected both measured")
    link = max(links, key=lambda link: link["gpus"])
    compute = saved["settings"]["compute"]  # files from before there was a choice: single blocks, let go
    per_unit, passes = compute.get("blocks_per_unit", 1), 3 if compute.get("reshard_after_forward", True) else 2
    rows = []
    for one in alone:
        replayed = one["captured"]
        alike = {"image": one["image"], "batch": one["batch"], "captured": replayed}
        same = [row for row in saved["rows"] if alike.items() <= row.items()]
        for mode, collective in STAGE_2.items():
            measured = {row["gpus"]: row for row in same if row["mode"] == mode and "step_ms" in row}
            for n in sorted({*measured, *config.gpus} - {1}):
                step, sent = one["step_ms"] * 1e-3, communication(
                    mode, n, one["bytes"], math.ceil(one["blocks"] / per_unit), link[collective], config, passes
                )  # fmt: skip
                ddp = mode == "stage 2 ddp"
                window = 0 if replayed and ddp else step * one["student"] * (config.backward if ddp else 1)
                exposed = max(0.0, sent - config.overlap * window)
                jitter = one["spread_ms"] * 1e-3 * math.sqrt(2 * math.log(n))
                then = step + jitter + exposed
                real = one["step_ms"] / measured[n]["step_ms"] if n in measured else None
                rows.append(
                    {
                        "mode": mode,
                        "captured": "yes" if replayed else "no",
                        "image": one["image"],
                        "batch a GPU": one["batch"],
                        "GPUs": n,
                        "ms a step": 1e3 * then,
                        "communication (ms)": 1e3 * sent,
                        "not hidden (ms)": 1e3 * exposed,
                        "waiting for the slowest (ms)": 1e3 * jitter,
                        "images/s": n * one["batch"] / then,
                        "efficiency": step / then,
                        "measured efficiency": real,
                    }
                )
    return rows


def assumptions(saved: Mapping[str, Any], config: SimulationConfig) -> dict[str, str]:
    """The head of the table: what was measured, and what is assumed."""
    link = max((link for link in saved["links"] if link["gpus"] <= config.node), key=lambda link: link["gpus"])
    return {
        "no measurement": "a formula (benchmarks/scaling_formula.py) over steps of stage 2 on one GPU and links within "
        "a node; data and the host's launches come free",
        "links": f"all-reduce {link['all_reduce'] / 1e9:.3g} GB/s, all-gather {link['all_gather'] / 1e9:.3g} GB/s of "
        f"bus bandwidth, measured on {link['gpus']} GPUs and taken for any number in a node of {config.node}",
        "between nodes": f"{config.between:g} GB/s for each GPU, {config.node * config.between:g} GB/s a node, "
        f"{config.hop:g} us a hop",
        "hidden": f"communication behind {config.overlap:.0%} of backward, {config.backward:.0%} of the student's time "
        "(ddp), or of all of the student's time (fsdp); the teacher's share of a step by FLOP hides nothing, and "
        "nothing hides the gradients of captured steps (ddp)",
        "waiting": "steps vary as one GPU's did, normally, each GPU for itself",
    }


def run(config: SimulationConfig, out: Path, *, say: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Write simulation.json and .md to a folder with scaling.json, whose tables and plot are written again.

    Raises ValueError as `simulate`, and without the file.
    """
    if not (out / "scaling.json").exists():
        raise ValueError(
            f"{out} has no scaling.json; expected the folder of a `cgspn bench scaling` on 1 and more GPUs"
        )
    saved = json.loads((out / "scaling.json").read_text())
    rows = simulate(saved, config)
    report(saved, out)
    gpu = {"gpu": saved["settings"]["gpu"], "settings": str(config)}
    assumed = assumptions(saved, config)
    write(out, "simulation", assumed | gpu, {"stage 2": rows})
    say("\n".join(f"{name}: {value}" for name, value in assumed.items()) + "\n\n" + table(rows))
    return rows


def main(config: SimulationConfig = SimulationConfig(), out: Path = Path("runs/bench")) -> None:
    """Measure and write.

    Args:
        config: settings.
        out: folder with scaling.json.
    """
    run(config, out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
