"""Several processes against one, and a killed run against an uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("parallel_run.py")


def launch(out, processes=1, **settings):
    arguments = [str(SCRIPT), str(out), json.dumps(settings, default=str)]
    if processes > 1:
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def finished(out, processes=1, **settings):
    result = launch(out, processes, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text()), torch.load(out.with_suffix(".pt"))


def apart(a, b):
    """Largest relative difference of losses, and that of all weights."""
    (losses, weights), (others, other_weights) = a, b
    assert [len(stage) for stage in losses] == [len(stage) for stage in others]
    rows = [(x, y) for stage, other in zip(losses, others) for x, y in zip(stage, other)]
    assert all(x.keys() == y.keys() for x, y in rows)
    errors = [abs(x[k] - y[k]) / (abs(x[k]) + 1e-9) for x, y in rows for k in x]
    flat, other = (torch.cat([w.double().flatten() for w in state.values()]) for state in (weights, other_weights))
    return max(errors), float((flat - other).norm() / flat.norm())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("alone") / "run.json")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_two_processes_learn_what_one_does(alone, parallel, tmp_path):
    losses, weights = apart(alone, finished(tmp_path / "run.json", 2, parallel=parallel))
    # the order of float32 sums differs; AdamW's first steps have the size of the rate whatever the gradient's
    assert losses < 2e-3
    assert weights < 2e-3


@pytest.mark.slow
def test_accumulation_changes_rounding_only(tmp_path):
    """In four parts, against two: without the contrastive loss, whose negatives are those of a part."""
    two = finished(tmp_path / "two.json", accumulate=2)
    losses, weights = apart(two, finished(tmp_path / "four.json", accumulate=4))
    assert losses < 2e-3
    assert weights < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, optimizer):
    settings = {"save_every": 2, "steps": 5, "optimizer": optimizer}
    whole = finished(tmp_path / "whole.json", **settings, folder=tmp_path / "whole")
    killed = launch(tmp_path / "run.json", **settings, folder=tmp_path / "run", die_at=3)
    assert killed.returncode == -9
    assert (tmp_path / "run/snapshots/1/00000002").is_dir()
    assert apart(whole, finished(tmp_path / "run.json", **settings, folder=tmp_path / "run")) == (0, 0)
    assert not list((tmp_path / "run/snapshots").glob("*/*"))  # a finished run leaves none


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path, parallel):
    settings = {"save_every": 1, "parallel": parallel, "folder": tmp_path / "run"}
    assert launch(tmp_path / "run.json", 2, **settings, die_at=1).returncode != 0
    losses, weights = apart(alone, finished(tmp_path / "run.json", **settings))
    assert losses < 2e-3
    assert weights < 2e-3
