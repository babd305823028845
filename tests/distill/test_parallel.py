"""Several processes against one, and runs that were killed or ran out of disk against an uninterrupted one."""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import parallel_run
import pytest
import torch

pytestmark = pytest.mark.slow
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["cgspn.distill", "cgspn.teachers", "cgspn.data"])  # imports once, not in every process


@dataclass
class Result:
    codes: list[int | None]
    said: str


def launch(out, processes=1, **settings):
    log = out.with_suffix(".log")
    log.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.loads(json.dumps(settings, default=str))
    running = [
        fork.Process(target=parallel_run.enter, args=(rank, processes, port, str(log), str(out), settings))
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
        process.kill()
    return Result([process.exitcode for process in running], log.read_text())


def loaded(out):
    return json.loads(out.read_text()), torch.load(out.with_suffix(".pt"))


def finished(out, processes=1, **settings):
    result = launch(out, processes, **settings)
    assert result.codes == [0] * processes, result.said[-3000:]
    return loaded(out)


def apart(a, b):
    """Largest relative difference of losses, and that of all weights."""
    (losses, weights), (others, other_weights) = a, b
    assert [len(stage) for stage in losses] == [len(stage) for stage in others]
    rows = [(x, y) for stage, other in zip(losses, others) for x, y in zip(stage, other)]
    assert all(x.keys() == y.keys() for x, y in rows)
    errors = [abs(x[k] - y[k]) / (abs(x[k]) + 1e-9) for x, y in rows for k in x]
    flat, other = (torch.cat([w.double().flatten() for w in state.values()]) for state in (weights, other_weights))
    return max(errors), float((flat - other).norm() / flat.norm())


def close(a, b):
    losses, weights = apart(a, b)
    # the order of float32 sums differs; AdamW's first steps have the size of the rate whatever the gradient's
    assert losses < 2e-3
    assert weights < 2e-3


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("alone") / "run.json")


@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_two_processes_learn_what_one_does(alone, parallel, tmp_path):
    close(alone, finished(tmp_path / "run.json", 2, parallel=parallel))


@pytest.fixture(scope="module")
def alone_mixed(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("mixed") / "run.json", mixed=True, accumulate=2)


@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_two_processes_learn_at_mixed_sizes_what_one_does(alone_mixed, parallel, tmp_path):
    close(alone_mixed, finished(tmp_path / "run.json", 2, parallel=parallel, mixed=True, accumulate=2))


def test_two_processes_draw_the_pairs_of_a_sigmoid_loss_together_as_one_does(tmp_path, alone):
    one = finished(tmp_path / "one.json", loss="sigmoid", steps=2)
    close(one, finished(tmp_path / "two.json", 2, loss="sigmoid", steps=2))
    assert abs(one[0][1][0]["contrastive"] - alone[0][1][0]["contrastive"]) > 0.1  # it is another loss


def test_accumulation_changes_rounding_only(tmp_path):
    """In four parts, against two: without the contrastive loss, whose negatives are those of a part."""
    two = finished(tmp_path / "two.json", accumulate=2)
    close(two, finished(tmp_path / "four.json", accumulate=4))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_killed_and_runs_out_of_disk_goes_on_bit_for_bit(tmp_path, optimizer):
    seed = random.randrange(1000)
    print(f"the steps are those of seed {seed}")
    draw = random.Random(seed)
    settings = {"save_every": 2, "steps": 6, "optimizer": optimizer}
    whole = finished(tmp_path / "whole.json", **settings)
    settings["folder"], out = tmp_path / "run", tmp_path / "run.json"

    killed = launch(out, **settings, hazards={"stage 1": ("kill", draw.randrange(6))})
    assert killed.codes == [-9]
    full = launch(out, **settings, hazards={"stage 2": ("full", draw.choice((2, 3)))})
    assert full.codes == [1]
    assert "SnapshotError: the snapshot after step 4 could not be written" in full.said
    assert "the run can resume from the one after step 2" in full.said
    assert [path.name for path in (tmp_path / "run/snapshots/1").iterdir()] == ["00000002"]
    killed = launch(out, **settings, hazards={"stage 2": ("kill", draw.randrange(2, 6))})
    assert killed.codes == [-9]
    full = launch(out, **settings, hazards={"56 px": ("full", draw.choice((4, 5)))})
    assert full.codes == [1]
    assert "OSError" in full.said
    killed = launch(out, **settings, hazards={"56 px": ("kill", 5)})
    assert killed.codes == [-9]
    assert apart(whole, finished(out, **settings)) == (0, 0)
    assert not list((tmp_path / "run/snapshots").glob("*/*"))  # a finished run leaves none


@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path, parallel):
    settings = {"save_every": 1, "parallel": parallel, "folder": tmp_path / "run"}
    stopped = launch(tmp_path / "run.json", 2, **settings, hazards={"stage 2": ("kill", 1)})
    assert -9 in stopped.codes
    assert (tmp_path / "run/snapshots/1/00000001").is_dir()
    close(alone, finished(tmp_path / "run.json", **settings))


def test_torchrun_starts_a_worker_that_died_again_and_the_run_goes_on(alone, tmp_path):
    out, settings = tmp_path / "run.json", {"save_every": 1, "folder": tmp_path / "run"}
    settings |= {"hazards": {"stage 2": ("kill", 2)}, "only_once": tmp_path / "died"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(parallel_run.__file__)), str(out), json.dumps(settings, default=str)]
    result = subprocess.run(
        [*torchrun, "--max-restarts", "1", *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "died").exists()
    close(alone, loaded(out))
