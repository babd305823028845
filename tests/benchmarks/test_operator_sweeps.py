"""Bends of sweeps; they are timed on a GPU alone."""

from __future__ import annotations

import pytest
from benchmarks.operator_sweeps import bent


def test_bent_finds_the_size_above_the_line() -> None:
    rows = [{"B": b, "pass": "forward", "ms": ms} for b, ms in ((1, 1.0), (2, 3.0), (4, 4.0))]
    (found,) = bent(rows, "B")
    assert found["times the line"] == pytest.approx(1.5)
    squares = [{"grid": n, "pass": "forward", "ms": float(n * n)} for n in (16, 24, 37)]  # work goes with the area
    assert bent(squares, "grid")[0]["times the line"] == pytest.approx(1.0)
