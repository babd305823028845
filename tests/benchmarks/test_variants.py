"""Which cuts are timed, and what is said of them; no GPU needed."""

from __future__ import annotations

import pytest
from benchmarks.variants import LINE_SCAN, SCANS, best, jobs, rival_cuts

from cgspn.ops.cuda.plan import Problem
from cgspn.ops.gpu import Machine

HOPPER, AMPERE = Machine(132, 227 * 1024, True), Machine(108, 163 * 1024, False)


@pytest.mark.parametrize("backward", [False, True])
def test_rivals_fit_and_cover_the_lines(backward: bool) -> None:
    problems = [Problem(backward, True, 2, b, c, 4, n, 16) for b, n, c in SCANS] + [LINE_SCAN]
    for p in problems:
        for cut in rival_cuts(p, HOPPER):
            assert cut.fits(p, HOPPER)
            assert cut.own(p) * cut.split >= p.longest
            assert cut.rows(p) >= cut.own(p) + 2 * cut.halo_width()
            assert cut.groups(p) * cut.lanes * cut.vec >= p.channels


def test_small_batches_are_cut_along_lines_in_runs_of_all_widths() -> None:
    cuts = {b: rival_cuts(Problem(False, True, 2, b, 64, 4, 147, 16), HOPPER) for b in (1, 32)}
    assert all(cut.split > 1 and cut.halo > 1 for cut in cuts[1])
    assert {(cut.vec, cut.lanes) for cut in cuts[1]} >= {(8, 8), (8, 4), (8, 2), (4, 8), (4, 4), (4, 2)}
    assert {(cut.split, cut.halo) for cut in cuts[32]} >= {(1, 1), (2, 2), (4, 8)}


def test_the_whole_run_stays_short() -> None:
    """About a tenth of a second each."""
    assert len(list(jobs(HOPPER))) < 700


def test_every_job_names_the_macros_of_its_kernel() -> None:
    for name, defines in jobs(HOPPER):
        assert {"DTYPE", "VEC", "THREADS", "HALO"} <= defines.keys()
        assert ("SAVE" in defines) == (name == "forward")


def test_a_variant_that_differs_is_not_the_best() -> None:
    size = {"B": 1, "grid": 74, "C": 64, "pass": "forward"}
    rows = [
        size | {"cut": "the plan's", "ms": 2.0, "difference": 0.0},
        size | {"cut": "wrong", "ms": float("nan"), "difference": 0.9},
        size | {"cut": "fast", "ms": 1.0, "difference": 1e-3},
    ]
    (row,) = best(rows)
    assert (row["cut"], row["the plan's ms"], row["that differ"], row["variants"]) == ("fast", 2.0, 1, 3)
