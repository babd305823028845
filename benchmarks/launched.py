"""Blocks and encoders in eager mode, compared with CUDA graphs.

    python -m benchmarks.launched --out launched.json

Times are medians of interleaved rounds. "launched ms" is the time of a call in a loop of 50 ms, until the device is
idle. "host ms" is the time until the last call has returned. If both are equal, the CPU is the bottleneck.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from cgspn import create_model
from cgspn.bench.contenders import OURS, Shape, build
from cgspn.bench.timing import launched, medians
from cgspn.environment import describe
from cgspn.layers import Grid

ATTENTION = "attention, cuDNN, fused MLP"
PLAIN_ATTENTION = "attention, cuDNN"
Row = dict[str, Any]


@dataclass(frozen=True)
class LaunchedConfig:
    """Settings.

    Args:
        out: JSON file for the results.
        sizes: of square images, in pixels.
        batches: numbers of images per call.
        contenders: names of the blocks to compare.
        rounds: number of timings of each.
        encoders: also time whole SO400M encoders.
    """

    out: Path = Path("launched.json")
    sizes: tuple[int, ...] = (378, 1008, 1036, 2016, 2058)
    batches: tuple[int, ...] = (1, 8, 32)
    contenders: tuple[str, ...] = (PLAIN_ATTENTION, ATTENTION, OURS, "C-GSPN, values 6")
    rounds: int = 7
    encoders: bool = True


def captured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float | str]:
    """Median times of CUDA graphs, or the reason why there are none."""
    try:
        return dict(medians(calls, rounds=rounds, graph=True))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return dict.fromkeys(calls, str(error).splitlines()[0][:80])


def block_calls(names: tuple[str, ...], pixels: int, batch: int, trained: bool) -> dict[str, Callable[[], object]]:
    """A function for each contender's block: forward, or forward and backward to tokens and parameters."""
    shape = Shape()
    side = pixels // shape.patch
    grid = Grid(side, side)
    device = torch.device("cuda")
    tokens = torch.randn(batch, side * side, shape.width, device=device, dtype=torch.bfloat16, requires_grad=trained)
    direction = torch.randn_like(tokens)
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        contender = build(name, shape, device, torch.bfloat16)

        def infer(contender: Any = contender) -> object:
            with torch.no_grad():
                return contender.whole(tokens, grid)

        def train(contender: Any = contender) -> object:
            wanted = [tokens, *contender.block.parameters()]
            return torch.autograd.grad(contender.whole(tokens, grid), wanted, direction, allow_unused=True)

        calls[name] = train if trained else infer
    return calls


def launches_kept(calls: dict[str, Any]) -> dict[str, list[str]]:
    """For each contender's block and each shape, whether its launches are recorded, or the reason why not."""
    blocks = {name: getattr(call.__defaults__[0], "block", None) for name, call in calls.items()}
    states = {name: block._state for name, block in blocks.items() if block is not None and block._state}
    return {
        name: [plan if isinstance(plan, str) else type(plan).__name__ for plan in state.plans.values()]
        for name, state in states.items()
    }


def rows_of(
    config: LaunchedConfig, what: str, pixels: int, batch: int, calls: dict[str, Any], graph: bool
) -> list[Row]:
    """A row for each contender with its eager, CUDA graph and CPU times."""
    times = launched(calls, rounds=config.rounds)
    replays = captured(calls, config.rounds) if graph else {}
    rows, kept = [], launches_kept(calls)
    for name in calls:
        row: Row = {"what": what, "px": pixels, "B": batch, "name": name}
        row |= dict(zip(("launched ms", "host ms"), times[name], strict=True))
        rows.append(row | {"captured ms": replays.get(name), "kept": kept.get(name)})
        print(rows[-1], flush=True)
    return rows


def encoder_calls(pixels: int, batch: int) -> dict[str, Callable[[], object]]:
    """`encoder(images)` of the SO400M teacher and student."""
    calls: dict[str, Callable[[], object]] = {}
    images = torch.randn(batch, 3, pixels, pixels, device="cuda", dtype=torch.bfloat16)
    for name in ("vit_so400m_patch14_378", "cgspn_so400m_patch14_378"):
        with torch.device("cuda"):
            encoder = create_model(name, image_size=(pixels, pixels)).to(torch.bfloat16).eval()

        def call(encoder: Any = encoder) -> object:
            with torch.no_grad():
                return encoder(images)

        calls[name] = call
    return calls


def main(config: LaunchedConfig) -> None:
    """Measure and write, table by table."""
    rows: list[Row] = []
    plan: list[tuple[str, int, int, bool]] = [("block", p, b, True) for p in config.sizes for b in config.batches]
    training = [(378, 32), (1036, 1), (378, 1), (1036, 32)]
    plan += [("training step of a block", p, b, False) for p, b in training if p in config.sizes]
    if config.encoders:
        plan += [("encoder", p, b, b == 1) for p in (378, 1036) if p in config.sizes for b in (1, 8)]
    for what, pixels, batch, graph in plan:
        if what == "encoder":
            calls = encoder_calls(pixels, batch)
        else:
            calls = block_calls(config.contenders, pixels, batch, what.startswith("training"))
        rows += rows_of(config, what, pixels, batch, calls, graph)
        del calls
        torch.cuda.empty_cache()
        config.out.write_text(json.dumps({"machine": describe(""), "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(LaunchedConfig))
