"""How the CUDA backend cuts a scan, and that what it asks for compiles; no GPU needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgspn.ops.cuda.compile import compile_cubin, macros
from cgspn.ops.cuda.plan import MAX_THREADS, Machine, Problem, choose

HOPPER, AMPERE = Machine(132, 227 * 1024, True), Machine(108, 163 * 1024, False)


@given(
    backward=st.booleans(),
    normalise=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
    batch=st.integers(1, 64),
    channels=st.integers(1, 4096),
    directions=st.integers(1, 4),
    longest=st.integers(1, 1024),
    alignment=st.sampled_from([2, 4, 8, 16]),
    machine=st.sampled_from([HOPPER, AMPERE]),
)
def test_every_size_has_a_cut_that_covers_it(machine: Machine, itemsize: int, alignment: int, **sizes) -> None:
    p = Problem(itemsize=itemsize, alignment=max(alignment, itemsize), **sizes)
    cut = choose(p, machine)
    assert cut is not None
    assert cut.rows(p) * cut.pos * cut.split >= p.longest
    assert cut.groups(p) * cut.lanes * cut.vec >= p.channels
    assert p.channels % cut.vec == 0
    assert p.alignment % (cut.vec * itemsize) == 0
    assert cut.rows(p) * cut.lanes <= cut.threads(p) <= MAX_THREADS
    assert cut.shared_bytes(p) <= machine.shared_bytes
    assert cut.split == 1 or machine.clusters


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_compiles_without_a_gpu(name: str, arch: str) -> None:
    pytest.importorskip("cuda.core")
    defines = {"DTYPE": 2, "VEC": 4, "POS": 1, "STAGES": 2, "THREADS": 256, "NORMALISE": 1, "MASKED": 1}
    defines |= {"MERGE": 1, "NARROW": 0, "SPLIT": 1 if arch == "sm_80" else 2} | (
        {"SAVE": 1} if name == "forward" else {}
    )
    code, report = compile_cubin(name, macros(defines), arch)
    assert code.startswith(b"\x7fELF")
    assert " 0 bytes spill stores" in report
