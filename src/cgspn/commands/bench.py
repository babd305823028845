"""`cgspn bench`: measurements of speed on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..console import console, writable_folder


@dataclass(frozen=True)
class Bench:
    """Measure, and write JSON, a table and a plot.

    Examples:
        cgspn bench operator --out results/operator
    """

    what: tyro.conf.Positional[Literal["operator"]]
    """"operator": propagate_2d and line_scan against the memory bandwidth, PyTorch and attention."""
    out: Path = Path("runs/bench")
    """Folder for the results."""
    quick: bool = False
    """Leave out the slowest rivals."""
    commit: str = ""
    """The commit to note in the results; by default that of the working tree."""

    def run(self) -> None:
        """Measure and write. Raises ValueError without a CUDA GPU."""
        from ..bench.operator import run

        writable_folder(self.out, "--out")
        try:
            run(self.out, quick=self.quick, commit=self.commit, say=console.print)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        console.print(f"wrote {self.out}/operator.json, .md and .png")
