"""Scaling on processors: rows of one and two processes in one file, intervals, and what a simulation makes of them."""

import json
import multiprocessing
import os
import socket
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgspn import cli
from cgspn.bench.communication import busy_and_exposed, of_trace
from cgspn.bench.scaling import ScalingConfig, load, merge, run, settings_of
from cgspn.bench.scaling_report import loss_rows, speed_rows
from cgspn.distill import ComputeConfig, World

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["cgspn.commands.bench", "cgspn.bench.scaling"])
MODELS = ("vit_mini_patch4_28", "cgspn_mini_patch4_28")
CPU = torch.device("cpu")
TINY = ScalingConfig(
    *MODELS, sizes=(28,), batches=(4,), steps=2, check_size=28, check_batch=4, link=1, compute=ComputeConfig()
)


@pytest.mark.parametrize(
    ("communication", "other", "wanted"),
    [
        ([], [(0, 9)], (0, 0)),
        ([(0, 4)], [], (4, 4)),
        ([(0, 4), (2, 6)], [(1, 3), (5, 9)], (6, 3)),
        ([(0, 1), (2, 3)], [(0, 3)], (2, 0)),
        ([(3, 4), (0, 1), (0.5, 2), (2, 2.5), (3, 3)], [], (3.5, 3.5)),
    ],
)
def test_communication_is_exposed_where_nothing_else_runs(communication, other, wanted):
    assert busy_and_exposed(communication, other) == wanted


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


@given(spans, spans)
def test_intervals_agree_with_a_timeline_of_ticks(communication, other):
    def ticks(intervals):
        return {t for begin, end in intervals for t in range(begin, end)}

    mine, theirs = ticks(communication), ticks(other)
    assert busy_and_exposed(communication, other) == (len(mine), len(mine - theirs))


def test_a_trace_is_read_by_category_and_name():
    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 1e6, 2e6),
        event("kernel", "gemm", 2e6, 5e5),
        event("gpu_memcpy", "Memcpy DtoD", 5e6, 1e6),
        event("gpu_user_annotation", "nccl:all_reduce", 0, 9e6),  # of the time between launches, not a kernel
        event("cuda_runtime", "cudaLaunchKernel", 0, 9e6),
        {"ph": "M", "name": "process_name"},
    ]
    assert of_trace(events) == pytest.approx((2, 1.5))
    assert of_trace(events[3:]) is None


def test_a_row_takes_the_place_of_its_older_self():
    rows = [{"a": 1, "b": 1, "v": 0}, {"a": 1, "b": 2, "v": 0}]
    merge(rows, {"a": 1, "b": 2, "v": 5}, ("a", "b"))
    merge(rows, {"a": 2, "b": 2, "v": 6}, ("a", "b"))
    assert [row["v"] for row in rows] == [0, 5, 6]


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "scaling.json"
    settings = settings_of(TINY, CPU)
    path.write_text(json.dumps(load(path, settings)))
    other = ScalingConfig(
        *MODELS, modes=("stage 1 ddp",), sizes=(56,), batches=(2,), check_size=56, compute=TINY.compute
    )
    same = {"steps": 2, "check_size": 28, "check_batch": 4, "link": 1}
    assert load(path, settings_of(other, CPU) | same)["rows"] == []
    with pytest.raises(ValueError, match="holds rows with steps 2, not 8"):
        run(other, tmp_path, World())


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="one number for each of the sizes"):
        ScalingConfig(sizes=(28,), batches=(1, 2))
    with pytest.raises(ValueError, match="steps is 1"):
        ScalingConfig(steps=1)


def test_memory_that_ends_halves_the_batch_of_one_process(tmp_path, monkeypatch):
    import cgspn.bench.scaling as bench

    real = bench.run_steps

    def small_memory(task, config, size, batch, steps, after):
        if batch > 2 or size > 28:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(task, config, size, batch, steps, after)

    monkeypatch.setattr(bench, "run_steps", small_memory)
    config = ScalingConfig(
        **{**vars(TINY), "modes": ("stage 2 ddp", "stage 2 fsdp"), "sizes": (28, 56), "batches": (8, 2)}
    )
    said = []
    saved = run(config, tmp_path, World(), commit="abc", say=said.append)
    assert [(row["mode"], row["batch"], row.get("note")) for row in saved["rows"]] == [
        ("stage 2", 2, None),
        ("stage 2", 1, "out of memory"),
    ]
    assert len(said) == 3


def test_a_processor_captures_nothing_and_the_file_takes_both_kinds(tmp_path):
    config = replace(TINY, modes=("stage 2 ddp", "stage 2 fsdp", "stage 1 ddp"), compute=ComputeConfig(capture=True))
    saved = run(config, tmp_path, World(), say=lambda _: None)
    kinds = [("stage 2", False), ("stage 1", False)]
    assert [(row["mode"], row["captured"]) for row in saved["rows"]] == kinds
    assert [(row["mode"], row["captured"]) for row in saved["losses"]] == kinds
    assert settings_of(config, CPU) == settings_of(TINY, CPU)  # capture belongs to rows, not to the file


def test_captured_steps_are_compared_with_captured_ones():
    def row(mode, gpus, rate, **more):
        times = {"step_ms": 1.0, "spread_ms": 0.0, "images/s": rate, "captured": False}
        return {"mode": mode, "image": 378, "batch": 64, "gpus": gpus} | times | more

    old = [row("stage 2", 1, 100.0), row("stage 2 fsdp", 2, 150.0)]
    new = [row("stage 2", 1, 120.0, captured=True), row("stage 2 ddp", 2, 228.0, captured=True)]
    rows = speed_rows({"rows": [*old, *new]})
    assert [(r["mode"], r["captured"], r["GPUs"], r["efficiency"]) for r in rows] == [
        *(("stage 2", "no", 1, 1.0), ("stage 2", "yes", 1, 1.0)),
        *(("stage 2 ddp", "yes", 2, 0.95), ("stage 2 fsdp", "no", 2, 0.75)),
    ]
    assert "efficiency" not in speed_rows({"rows": [old[0], new[1]]})[1]


def enter(rank, port, log, command):
    """One of two processes, as torchrun starts them, without the seconds that its imports take."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        cli.run(command)
        sys.stdout.flush()


@pytest.mark.slow
def test_two_processes_are_measured_against_one(tmp_path, capsys):
    command = ["bench", "scaling", "--out", str(tmp_path), "--commit", "abc", "--steps", "2", "--link", "1"]
    command += ["--teacher", MODELS[0], "--student", MODELS[1], "--sizes", "28", "--batches", "4"]
    command += ["--check-size", "28", "--check-batch", "4", "--precision", "float32"]
    cli.run(command)
    assert "wrote the results" in capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork.Process(target=enter, args=(rank, port, tmp_path / f"{rank}.txt", command)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert ["wrote the results" in each for each in said] == [True, False]  # the first process speaks for all
    saved = json.loads((tmp_path / "scaling.json").read_text())
    assert sorted(saved["machines"]) == ["1", "2"]
    rows = speed_rows(saved)
    assert [(row["mode"], row["GPUs"]) for row in rows] == [
        *(("stage 1", 1), ("stage 1 ddp", 2), ("stage 1 placed", 2)),
        *(("stage 2", 1), ("stage 2 ddp", 2), ("stage 2 fsdp", 2)),
    ]
    assert all(row["efficiency"] == pytest.approx(row["speed-up"] / row["GPUs"]) for row in rows)
    assert all(row["communication"] is None for row in rows)  # no device to look at
    assert [row["equal"] for row in loss_rows(saved) if row["GPUs"] == 2] == ["yes"] * 4
    assert all(len(row["totals"]) == 5 and row["totals"][-1] < row["totals"][0] for row in saved["losses"])
    assert saved["links"][0]["all_reduce"] > 0
    text = (tmp_path / "scaling.md").read_text()
    assert "## links" in text
