"""Measurement of communication: link bandwidth, and the fraction of a step spent on it, overlapped or exposed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..distill.parallel import barrier, gather_objects, world_size

Interval = tuple[float, float]  # begin and end
WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of device activity in a trace
ROUNDS = 10  # timed rounds of a collective, after three for warm-up


def busy_and_exposed(communication: Iterable[Interval], other: Iterable[Interval]) -> tuple[float, float]:
    """Time with a communication kernel running, and its part without other GPU work, in the unit of the intervals."""
    both = enumerate((communication, other))
    marks = [(at, kind, step) for kind, found in both for one in found for at, step in zip(one, (1, -1), strict=True)]
    active, busy, exposed, last = [0, 0], 0.0, 0.0, 0.0
    for at, kind, step in sorted(marks):
        if active[0]:
            busy += at - last
            exposed += 0.0 if active[1] else at - last
        active[kind] += step
        last = at
    return busy, exposed


def of_trace(events: Iterable[dict[str, Any]]) -> tuple[float, float] | None:
    """`busy_and_exposed` of a Chrome trace's events, in seconds; None without device activity."""
    done = [event for event in events if event.get("ph") == "X" and event.get("cat") in WORK]
    if not done:
        return None
    parts: dict[bool, list[Interval]] = {True: [], False: []}
    for event in done:
        talks = event["cat"] == "kernel" and "nccl" in event["name"].lower()
        parts[talks].append((event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6))
    return busy_and_exposed(parts[True], parts[False])


class Watched:
    """A profile of some steps of a run, started and stopped on all processes together."""

    def __init__(self, device: torch.device) -> None:
        """device: of this process; nothing is recorded on a CPU."""
        self.device, self.seconds = device, 0.0
        self.profile: profile | None = None

    def begin(self) -> None:
        """Start recording between two steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.start()
            barrier()  # start together, so that no process waits in a collective for another's profiler
            torch.cuda.synchronize(self.device)
            self.began = time.perf_counter()

    def end(self) -> None:
        """Stop recording."""
        if self.profile is not None:
            torch.cuda.synchronize(self.device)
            self.seconds = time.perf_counter() - self.began
            self.profile.stop()

    def shares(self) -> dict[str, float | None]:
        """Fractions of the wall time, averaged over processes: "communication", including waiting for the slowest
        process, and "exposed", without other work. None if not recorded. All processes must call this."""
        found = None
        if self.profile is not None:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                self.profile.export_chrome_trace(str(trace))
                with suppress(ValueError):  # keep the row's times even if the trace is broken
                    found = of_trace(json.loads(trace.read_text())["traceEvents"])
        self.profile = None
        each = gather_objects(None if found is None else [part / self.seconds for part in found])
        whole = [one for one in each if one is not None]
        if len(whole) < len(each):
            return {"communication": None, "exposed": None}
        means = (sum(part) / len(whole) for part in zip(*whole, strict=True))
        return dict(zip(("communication", "exposed"), means, strict=True))


def link_rates(device: torch.device, size: int) -> dict[str, float]:
    """Bus bandwidths in bytes/s, as defined by NCCL's tests, for float32 buffers with a total of `size` bytes.

    all_reduce: 2 (n - 1) / n x size / time. all_gather: (n - 1) / n x size / time. The slowest of at least two
    processes counts. All processes must call this.
    """
    ranks = world_size()
    own = torch.ones(size // 4 // ranks, device=device)
    all_of = torch.zeros(ranks * len(own), device=device)
    moved = (ranks - 1) / ranks * 4 * len(all_of)
    reduce = _seconds(lambda: dist.all_reduce(all_of), device)
    # its name since PyTorch 2.13, and the older name
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather = _seconds(lambda: into(all_of, own), device)
    return {"all_reduce": 2 * moved / reduce, "all_gather": moved / gather}


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        collective()
    barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        collective()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(gather_objects((time.perf_counter() - began) / ROUNDS))
