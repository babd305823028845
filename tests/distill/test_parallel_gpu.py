"""Two GPUs: one process killed in the middle of a run, which goes on from its snapshot on two or on the one left."""

import json
import os
import subprocess
import sys

import parallel_run
import pytest
import torch
from test_parallel import close, loaded

DEVICE = os.environ.get("CGSPN_TEST_DEVICE", "cuda")  # "cpu" tries these tests out where there is no GPU
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SETTINGS = {"device": DEVICE, "save_every": 1}


def start(out, processes=1, restarts=0, **settings):
    """Run to the end, or to the death of a process that is not started again."""
    script = [parallel_run.__file__, str(out), json.dumps(settings, default=str)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ORDER": str(out.with_suffix(".order"))},
        capture_output=True,
        text=True,
        timeout=240,
    )


def order(out):
    """Lines of what each process was given."""
    return [json.loads(line) for line in out.with_suffix(".order").read_text().splitlines()]


def same_order(one, out):
    """Every process of every attempt got its rows of the batch that a run on one GPU had at the same size and step."""
    wanted = {(line["size"], line["step"]): line["indices"] for line in order(one)}
    lines = order(out)
    assert {(line["size"], line["step"]) for line in lines} == set(wanted)
    for line in lines:
        whole = wanted[line["size"], line["step"]]
        share = len(whole) // line["of"]
        assert line["indices"] == whole[line["rank"] * share :][:share], line
    return lines


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run.json"
    done = start(out, device=DEVICE)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "placed"])
def test_a_process_that_dies_is_started_again_and_the_run_goes_on(alone, parallel, tmp_path):
    """Losses and weights within 2e-3 of one GPU's that nothing happened to (float32), the same images at each step."""
    out, died = tmp_path / "run.json", tmp_path / "died"
    settings = SETTINGS | {"parallel": parallel, "folder": tmp_path / "run", "only_once": died}
    done = start(out, 2, restarts=1, **settings, hazards={"stage 2": ("kill", 2)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert died.exists()
    close(loaded(alone), loaded(out))
    seen = [line["step"] for line in same_order(alone, out) if line["rank"] == 0 and line["size"] == 28]
    assert seen.count(3) == 2  # of stages 1 and 2, each once: nothing was started from the beginning


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_the_gpu_that_is_left(alone, parallel, tmp_path):
    out, died = tmp_path / "run.json", tmp_path / "died"
    settings = SETTINGS | {"parallel": parallel, "folder": tmp_path / "run"}
    stopped = start(out, 2, **settings, only_once=died, hazards={"stage 2": ("kill", 2)})
    assert stopped.returncode != 0
    assert "SIGKILL" in stopped.stderr or "-9" in stopped.stderr
    assert (tmp_path / "run/snapshots/1/00000002").is_dir()
    done = start(out, 1, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    close(loaded(alone), loaded(out))
    lines = same_order(alone, out)
    assert [line["step"] for line in lines if line["of"] == 1 and line["size"] == 28] == [2, 3]


@pytest.mark.parametrize(
    "compute",
    [
        {"capture": True},
        {"capture": True, "parallel": "placed"},
        {"capture": True, "parallel": "fsdp"},
        {"capture": True, "parallel": "fsdp", "blocks_per_unit": 2, "reshard_after_forward": True},
        {"parallel": "fsdp", "blocks_per_unit": 2},
    ],
)
def test_two_gpus_learn_what_one_does(tmp_path, compute):
    """Captured or not, in two parts a step without captions; ten steps are long enough for a few replays."""
    settings = {"device": DEVICE, "steps": 10, "accumulate": 2}
    for name, processes, more in (("one", 1, {}), ("two", 2, compute)):
        done = start(tmp_path / f"{name}.json", processes, **settings, **more)
        assert done.returncode == 0, done.stderr[-3000:]
    close(loaded(tmp_path / "one.json"), loaded(tmp_path / "two.json"))


@pytest.mark.parametrize("parallel", ["ddp", "placed", "fsdp"])
def test_two_gpus_replay_steps_of_mixed_shapes(tmp_path, parallel):
    """Each of four shapes is launched once, captured at its second turn and replayed from then on."""
    settings = {"device": DEVICE, "steps": 16, "accumulate": 2, "mixed": True}
    for name, processes, more in (("one", 1, {}), ("two", 2, {"capture": DEVICE == "cuda", "parallel": parallel})):
        done = start(tmp_path / f"{name}.json", processes, **settings, **more)
        assert done.returncode == 0, done.stderr[-3000:]
    close(loaded(tmp_path / "one.json"), loaded(tmp_path / "two.json"))
