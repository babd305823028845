"""The CPU time of a block apart from kernel launches, measured without a GPU.

    python -m benchmarks.host --out results/efficiency/host

Tensors are tiny and on the CPU. A substitute for the GPU receives launches and prepared matrix products and drops them.
The remaining time is spent in Python, PyTorch's dispatcher, memory allocation and packing of arguments. Operations that
PyTorch runs itself, as in the row of attention, count with the time that they take on the tiny tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch import Tensor

from cgspn.bench.checks import at_least, not_empty
from cgspn.bench.contenders import OURS, VALUES, Shape, build
from cgspn.bench.results import write
from cgspn.environment import describe
from cgspn.layers import Grid
from cgspn.ops.gpu import Launch, Machine, registered
from cgspn.ops.products import Pointer

Row = dict[str, Any]
CPU = torch.device("cpu")
SHAPE = Shape(width=64, heads=2, hidden=64, compression=4)  # so small that products take as long as their dispatch


@dataclass(frozen=True)
class HostConfig:
    """Settings.

    Args:
        out: folder for host.json and host.md.
        contenders: blocks of `cgspn.bench.contenders`.
        calls: number of calls of a block per timing.
        rounds: number of timings, of which the shortest counts.
    """

    out: Path = Path("runs/host")
    contenders: tuple[str, ...] = ("attention, flash, fused MLP", OURS, *VALUES)
    calls: int = 50
    rounds: int = 20

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot be measured."""
        not_empty(self, "contenders")
        at_least(self, 1, "calls", "rounds")


class DroppedLaunches:
    """A substitute for a Hopper GPU that counts and drops launches."""

    index, capability, arch, runs_triton = -1, (9, 0), "sm_90", True
    computes = False
    machine = Machine(132, 227 * 1024, True)

    def __init__(self) -> None:
        """Counters of launches and matrix products, at zero."""
        self.launches = self.products = 0

    def load(self, name: str, entry: str, defines: tuple[tuple[str, int], ...], shared: int) -> int:
        """A handle of no kernel."""
        return 0

    def compiler_reason(self) -> None:
        """None, because nothing is compiled."""

    def through_triton(self, launch: Any, tensors: Sequence[Tensor | None], wanted: bool) -> Launch:
        """Count the launch as if Triton had compiled the kernel."""
        slots = [(n, 0) for n in range(len(tensors))]
        return Launch(self, 0, launch.grid, 128, 0, [bytes(8)] * len(tensors), slots)  # type: ignore[arg-type]

    def submit(self, launch: Launch) -> None:
        """Drop a launch."""
        self.launches += 1

    def submission(self, launch: Launch, stream: int) -> Callable[[], None]:
        """A function that drops a launch."""
        return partial(self.submit, launch)

    def product(self, stream: int, scratch: Tensor, *matrices: Tensor, **options: Any) -> SimpleNamespace:
        """A prepared matrix product that does nothing."""
        pointers = [Pointer(0 if m is None else m.data_ptr()) for m in (*matrices, options.get("add"))]
        return SimpleNamespace(pointers=pointers, run=self._drop_product)

    def _drop_product(self) -> int:
        self.products += 1
        return 0

    def is_current(self) -> bool:
        """True."""
        return True

    def stream(self) -> int:
        """The number of the only stream."""
        return 0


def microseconds(call: Callable[[], object], config: HostConfig) -> float:
    """The shortest of the timings of a call, in CPU time of this thread, which other threads do not affect."""
    found = []
    for _ in range(config.rounds):
        began = time.thread_time()
        for _ in range(config.calls):
            call()
        found.append((time.thread_time() - began) / config.calls)
    return 1e6 * min(found)


def host_row(name: str, config: HostConfig) -> Row:
    """CPU microseconds of a block, and its numbers of launches and prepared matrix products in inference."""
    grid = Grid(2, 2)
    block = build(name, SHAPE, CPU, torch.bfloat16)
    tokens = torch.zeros(1, 4, SHAPE.width, dtype=torch.bfloat16)
    gpu = DroppedLaunches()
    with registered(CPU, gpu), torch.no_grad():  # type: ignore[arg-type]
        for _ in range(4):
            gpu.launches = gpu.products = 0
            block.whole(tokens, grid)
        row: Row = {"block": name, "launches": gpu.launches, "products": gpu.products}
        row["host us"] = microseconds(lambda: block.whole(tokens, grid), config)
    leaf, wanted = tokens.requires_grad_(), list(block.block.parameters())

    def step() -> object:
        return torch.autograd.grad(
            block.whole(leaf, grid), [leaf, *wanted], torch.zeros_like(tokens), allow_unused=True
        )

    with registered(CPU, gpu):  # type: ignore[arg-type]
        row["training, host us"] = microseconds(step, config)
    return row


def main(config: HostConfig) -> list[Row]:
    """Measure, and write. Raises ValueError for an unknown contender, OSError if `out` cannot be written."""
    rows = [host_row(name, config) for name in config.contenders]
    write(config.out, "host", describe(program="python -m benchmarks.host"), {"a block, launches dropped": rows})
    return rows


if __name__ == "__main__":
    for row in main(tyro.cli(HostConfig)):
        print(", ".join(f"{key} {value}" for key, value in row.items()))
