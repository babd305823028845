"""Timing of functions by medians over interleaved rounds, so that clock drift affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..compat import private

LEAD = 2_000_000  # cycles (about a millisecond) of busy-waiting on the device while the CPU launches the timed work


def captured(function: Callable[[], object], repeats: int) -> Callable[[], None]:
    """`repeats` calls of `function` as one CUDA graph, whose time is that of the device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()  # compile and allocate outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return graph.replay


def _once(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    private("cuda._sleep")(LEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(
    functions: dict[str, Callable[[], object]], *, rounds: int = 9, target_ms: float = 2.0, graph: bool = True
) -> dict[str, float]:
    """Median milliseconds of one call of each function, timed in turn `rounds` times.

    Each timing covers as many calls as take about `target_ms`; with `graph` they are replayed from one CUDA graph.
    Without a graph, the CPU starts to launch a millisecond before the timing, as in the middle of a longer run. The
    launch latency of the first kernel is then not included, but any time in which the GPU waits for the CPU is. Without
    a GPU the CPU's clock is used, without graphs. Raises the functions' errors.
    """
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    for name, function in functions.items():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count = max(1, min(50, int(target_ms / max(_once(function), 1e-3))))
        if graph and torch.cuda.is_available():
            runs[name] = (captured(function, count), count)
        else:
            runs[name] = (lambda f=function, n=count: [f() for _ in range(n)], count)  # type: ignore[misc]
    for run, _ in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, count) in runs.items():
            times[name].append(_once(run) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def launched(
    functions: dict[str, Callable[[], object]], *, rounds: int = 7, seconds: float = 0.05
) -> dict[str, tuple[float, float]]:
    """Median milliseconds per eager call, and the CPU time in it, of interleaved functions.

    Each timing is a loop of calls for at least `seconds`, with a synchronisation at the end. If both times are equal,
    the CPU is the bottleneck. Raises the functions' errors.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(3):
                function()
            _wait()
            began, count = time.perf_counter(), 0
            while (now := time.perf_counter()) - began < seconds or count < 3:
                function()
                count += 1
            _wait()
            found[name].append((1e3 * (time.perf_counter() - began) / count, 1e3 * (now - began) / count))
    return {n: (statistics.median(t for t, _ in f), statistics.median(h for _, h in f)) for n, f in found.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
