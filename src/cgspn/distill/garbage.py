"""Garbage collection at fixed steps, so that processes do not wait for one another's collections."""

from __future__ import annotations

import gc

FULL = 1000  # steps between full collections, which take about a second; the same steps on all processes


class Garbage:
    """Within the context, garbage is collected only by the calls below, if enabled.

    This takes effect from the first step on. Data workers, which were started before, use Python's defaults.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.steps = wanted, 0

    def __enter__(self) -> Garbage:
        self.before = gc.isenabled()
        return self

    def __exit__(self, *error: object) -> None:
        if self.before:
            gc.enable()

    def after_launch(self) -> None:
        """Called once per step while the device is busy: collect the young generation."""
        if self.wanted:
            gc.disable()
            self.steps += 1
            gc.collect(1 if self.steps % FULL else 2)

    def at_snapshot(self) -> None:
        """Run a full collection, since all processes are about to wait for the disk."""
        if self.wanted:
            gc.collect()
