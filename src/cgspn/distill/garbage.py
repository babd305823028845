"""When Python collects garbage: not wherever a process happens to be, while the others wait for it."""

from __future__ import annotations

import gc

FULL = 1000  # steps between collections of everything: about a second each, at the same step everywhere


class Garbage:
    """Within the context, collections happen where they are asked for, if that is wanted, and nowhere else.

    From the first step on, that is: workers that were started before, for data, collect as Python does.
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
        """Once a step, when the device has work to do: collect what is young."""
        if self.wanted:
            gc.disable()
            self.steps += 1
            gc.collect(1 if self.steps % FULL else 2)

    def at_snapshot(self) -> None:
        """Collect everything: all processes are about to wait for a disk."""
        if self.wanted:
            gc.collect()
