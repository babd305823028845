"""Time and peak memory of `cgspn convert` on files of SO400M/14 at 378 px with random weights, in its own process.

    python -m benchmarks.conversion_cost --out results/teachers

Writes a file in OpenCLIP's layout (a timm trunk and a few keys of a text tower) and one in timm's, each in float32 and
float16, converts each with `cgspn convert --keep-attention 3`, and writes conversion_cost.json and .md. The files are
in the page cache, because they have just been written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file

from cgspn.bench.results import write
from cgspn.environment import describe
from cgspn.models import create_model
from cgspn.teachers.formats.timm import TIMM

MODEL = "vit_so400m_patch14_378"


def make_file(path: Path, prefix: str, dtype: torch.dtype) -> None:
    """SO400M's image tower in timm's layout. prefix: of its keys."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in create_model(MODEL).state_dict().items()}
    rules = {rule.ours: rule.theirs[0] for rule in TIMM.rules}
    state = {}
    for name, shape in shapes.items():
        _, _, rest = name.partition("blocks.")
        index, _, end = rest.partition(".")
        theirs = rules["blocks.{i}." + end].replace("{i}", index) if rest else rules[name]
        state[prefix + theirs] = torch.empty(shape, dtype=dtype).normal_(std=0.02)
    if prefix:
        state |= {"logit_scale": torch.tensor(2.3), "text.positional_embedding": torch.zeros(64, 1152, dtype=dtype)}
    save_file(state, path)


def convert(source: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident gigabytes of one conversion.

    Raises CalledProcessError if it fails.
    """
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "cgspn.cli", "convert", str(source), str(out), "--keep-attention", "3"],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise subprocess.CalledProcessError(status, child.args)
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e9


def main(out: Path = Path("results/teachers"), commit: str = "") -> None:
    """Measure and write the results. commit: commit to record in the results; by default that of the working tree."""
    rows: list[dict[str, Any]] = []
    for layout, prefix in (("OpenCLIP", "visual.trunk."), ("timm", "")):
        for dtype in (torch.float32, torch.float16):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "so400m.safetensors"
                make_file(source, prefix, dtype)
                seconds, busy, peak = convert(source, Path(folder) / "student")
                size = source.stat().st_size / 1e9
            kind = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "layout": layout,
                    "dtype": kind,
                    "file GB": size,
                    "seconds": seconds,
                    "CPU seconds": busy,
                    "peak GB": peak,
                }
            )
            print(rows[-1], flush=True)
    about = describe(commit, "python -m benchmarks.conversion_cost") | {"cores": str(os.cpu_count())}
    write(out, "conversion_cost", about, {"SO400M/14, 378 px, three attention layers kept": rows})


if __name__ == "__main__":
    # Unix alone: wait4 gives the peak memory of one process
    tyro.cli(main, description=__doc__)
