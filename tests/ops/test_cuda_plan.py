"""How the CUDA backend cuts a scan, and that what it asks for compiles; no GPU needed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgspn.ops.cuda import compile as compiling
from cgspn.ops.cuda.compile import compile_cubin, macros
from cgspn.ops.cuda.launch import scan_defines
from cgspn.ops.cuda.plan import MAX_THREADS, Problem, TileConfig, choose
from cgspn.ops.cuda.projected import projected_defines
from cgspn.ops.cuda.projected_plan import ProjectedTileConfig, is_faster
from cgspn.ops.cuda.projected_plan import choose as choose_projected
from cgspn.ops.gpu import Machine

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
    assert cut.rows(p) * cut.split >= p.longest
    assert cut.groups(p) * cut.lanes * cut.vec >= p.channels
    assert p.channels % cut.vec == 0
    assert p.alignment % (cut.vec * itemsize) == 0
    assert cut.rows(p) * cut.lanes <= cut.threads(p) <= MAX_THREADS
    assert cut.shared_bytes(p) <= machine.shared_bytes
    assert cut.split == 1 or machine.clusters


MEASURED = [
    # pass, batch, grid, the fastest of an H100's sweep or within 4% of it; 64 channels, bfloat16, four directions
    (False, 32, 74, TileConfig(8, 8, 1)),
    (True, 32, 74, TileConfig(8, 8, 2)),
    (False, 32, 147, TileConfig(8, 8, 1, 2, halo=2)),
    (True, 32, 147, TileConfig(8, 8, 2, 4, halo=4)),
    (False, 8, 74, TileConfig(4, 8, 3, 2, halo=16)),
    (True, 8, 74, TileConfig(8, 4, 3, 2, halo=16)),
    (False, 8, 147, TileConfig(8, 4, 3, 2, halo=16)),
    (True, 8, 147, TileConfig(8, 4, 2, 2, halo=4)),
    (False, 1, 74, TileConfig(2, 4, 4, 2, halo=16)),
    (True, 1, 74, TileConfig(4, 2, 3, 2, halo=16)),
    (False, 1, 147, TileConfig(2, 8, 4, 8, halo=8)),
    (True, 1, 147, TileConfig(4, 4, 3, 4, halo=8)),
    (False, 1, 294, TileConfig(2, 8, 4, 8, halo=4)),
    (True, 1, 294, TileConfig(4, 4, 3, 4, halo=8)),
]


@pytest.mark.parametrize(("backward", "batch", "grid", "cut"), MEASURED, ids=str)
def test_the_plan_is_what_was_measured_fastest(backward: bool, batch: int, grid: int, cut: TileConfig) -> None:
    assert choose(Problem(backward, True, 2, batch, 64, 4, grid, 16), HOPPER) == cut


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("batch", "channels"), [(b, 64) for b in (2, 4, 12, 16)] + [(8, 32), (8, 128), (8, 192)])
@pytest.mark.parametrize("grid", [74, 147])
def test_sizes_between_the_measured_fill_the_machine_once(grid: int, batch: int, channels: int, backward: bool) -> None:
    """A few blocks more than processors would take as long as twice as many."""
    p = Problem(backward, True, 2, batch, channels, 4, grid, 16)
    cut = choose(p, HOPPER)
    assert cut is not None
    waves = cut.blocks(p) / HOPPER.num_sms
    assert waves / -(-waves // 1) >= 0.7


SETS = [
    # backward, batch, grid: 4 x 96 channels in sets of eight with a forget gate
    (False, 32, 74, TileConfig(8, 6, 1)),
    (False, 32, 147, TileConfig(8, 4, 1)),
    (True, 32, 74, TileConfig(8, 12, 2, 2, halo=4)),
    (True, 32, 147, TileConfig(8, 12, 2, 4, halo=4)),
    (True, 128, 16, TileConfig(8, 12, 2)),
]


@pytest.mark.parametrize(("backward", "batch", "grid", "cut"), SETS, ids=str)
def test_sets_of_parameters_are_cut_as_was_measured_fast(
    backward: bool, batch: int, grid: int, cut: TileConfig
) -> None:
    assert choose(Problem(backward, True, 2, batch, 96, 4, grid, 16, 8, True), HOPPER) == cut


@pytest.mark.parametrize("backward", [False, True])
def test_line_scan_is_cut_as_was_measured_fastest(backward: bool) -> None:
    p = Problem(backward, False, 4, 16, 8, 1, 1024, 16)
    assert choose(p, HOPPER) == TileConfig(4, 2, 3 if backward else 2, 4, halo=8)


@pytest.mark.parametrize(
    ("batch", "grid", "cut", "faster"),
    [(32, 74, (4, 2, 5), True), (32, 147, (2, 4, 5), True), (8, 74, (1, 10, 1), True), (1, 74, (1, 10, 1), False)],
)
def test_the_projected_plan_is_what_was_measured_fastest(batch: int, grid: int, cut: tuple, faster: bool) -> None:
    """`faster`: than a projection and a scan apart."""
    assert choose_projected(batch, grid, 64, 4, HOPPER) == ProjectedTileConfig(*cut)
    assert is_faster(batch, grid, 64, 4, HOPPER) == faster


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["forward", "backward", "projected_forward"])
def test_compiles_without_a_gpu(name: str, arch: str) -> None:
    pytest.importorskip("cuda.core")
    backward = name == "backward"
    flag = None if backward else True
    if name.startswith("projected"):
        defines = projected_defines(ProjectedTileConfig(1, 2, 2, 2), 64, 2, masked=True)
    else:
        p = Problem(backward, True, 2, 1, 64, 4, 74, 16)
        cut = TileConfig(4, 1, 2) if arch == "sm_80" else TileConfig(4, 1, 2, 2, halo=8)
        defines = scan_defines(cut, p, 2, masked=True, merged=True, save=flag)
    code, report = compile_cubin(name, macros(defines), arch)
    assert code.startswith(b"\x7fELF")
    assert " 0 bytes spill stores" in report


def test_cubins_are_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at a time leave one whole file; other macros, architectures and compilers have files of their own."""
    compiled: list[str] = []

    def slow(name: str, defines: compiling.Macros, arch: str) -> tuple[bytes, str]:
        compiled.append(arch)
        time.sleep(0.02)
        return b"\x7fELF" + f"{name}{defines}{arch}".encode() * 1000, ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "compile_cubin", slow)
    monkeypatch.setattr(compiling, "compiler_version", lambda: "13.0")
    key = ("merge", macros({"VEC": 8}))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: compiling.cubin(*key, "sm_90"), range(16)))
    assert len(set(found)) == 1
    assert [file.suffix for file in compiling.cache_folder().iterdir()] == [".cubin"]
    compiled.clear()
    assert compiling.cubin(*key, "sm_90") == found[0]
    assert not compiled  # from the disk
    compiling.cubin(*key, "sm_80")
    compiling.cubin("merge", macros({"VEC": 4}), "sm_90")
    monkeypatch.setattr(compiling, "compiler_version", lambda: "13.1")
    compiling.cubin(*key, "sm_90")
    assert compiled == ["sm_80", "sm_90", "sm_90"]
    assert len(list(compiling.cache_folder().iterdir())) == 4


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgspn").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "compile_cubin", lambda *_: (b"\x7fELF", ""))
    monkeypatch.setattr(compiling, "compiler_version", lambda: "13.0")
    assert compiling.cubin("merge", macros({"VEC": 8}), "sm_90") == b"\x7fELF"


@given(
    batch=st.integers(1, 64),
    longest=st.integers(1, 512),
    channels=st.integers(1, 8).map(lambda n: 8 * n),
    directions=st.integers(1, 4),
    machine=st.sampled_from([HOPPER, AMPERE]),
)
def test_projected_cuts_cover_lines_and_channels(batch, longest, channels, directions, machine) -> None:
    cut = choose_projected(batch, longest, channels, directions, machine)
    if cut is None:  # what unsupported_reason says no to
        assert longest > {HOPPER: 448, AMPERE: 320}[machine]  # 1036 and 2058 px are lines of 74, 147
        return
    assert cut.line >= longest
    assert cut.threads <= MAX_THREADS
    assert cut.shared_bytes(channels) <= machine.shared_bytes
    assert cut.blocks(batch, channels, directions) * 16 * cut.groups >= batch * channels
