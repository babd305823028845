"""`cgspn demo`: convert, distill and evaluate with the embedded images and teacher."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..console import console, duration_text, progress_watcher, waiting
from ..demo import DemoConfig, run_demo
from ..models.checkpoint import write_atomically
from .checks import check_folder
from .command import Command


@dataclass(frozen=True)
class Demo(Command):
    """Convert the embedded teacher, distill a C-GSPN and a ViT student, evaluate, and write an HTML report.

    Takes about four minutes on two CPU cores and downloads nothing.

    Examples:
        cgspn demo
        cgspn demo --out /tmp/demo --config.distill.keep-attention 1
    """

    usual: ClassVar = ("out", "config.distill.compression", "config.distill.keep_attention", "config.test_images")

    out: Path = Path("demo")
    """Folder for report.html, table.json and the checkpoints of the students."""
    config: DemoConfig = field(default_factory=DemoConfig)
    """Settings of the demo."""

    def run(self) -> None:
        """Raises ValueError, OSError or DivergedError."""
        from ..report.demo import demo_report

        began = time.monotonic()
        out = check_folder(self.out, "out")
        console.print(f"results will be in {out}", soft_wrap=True)
        with progress_watcher() as watcher:
            result = run_demo(self.config, watcher)
        with waiting("writing the report"):
            for name, model in result.models.items():
                if name in result.histories:
                    model.save_pretrained(out / name.lower())
            write_atomically(out / "table.json", result.table.to_json() + "\n")
            write_atomically(out / "report.html", demo_report(result))
        console.print(result.table.to_rich())
        console.print(f"{duration_text(time.monotonic() - began)}; report: {out / 'report.html'}", soft_wrap=True)
