"""Launches where PyTorch has not yet made the device's context current; each in a process of its own."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

INPUTS = """
import os, threading, torch
from cgspn.ops import propagate_2d, propagate_2d_projected
def inputs(device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = [(1, 6, 5, 16), (1, 6, 5, 4, 3, 16), (1, 6, 5, 4, 16), (1, 6, 5, 4, 16)]
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]
"""
CASES = {
    "the first backward of a process": """
t = inputs("cuda")
y = propagate_2d(*t, backend="cuda")
y.backward(torch.ones(1, 6, 5, 16, device="cuda", dtype=torch.bfloat16))
assert all(x.grad.isfinite().all() for x in t)
""",
    "the first backward of a fused block": """
from cgspn.layers import Block, Grid, PropagationMixer
block = Block(1152, PropagationMixer(1152), 64, "gelu_tanh", 1e-6, None).to("cuda", torch.bfloat16)
x = torch.zeros(1, 30, 1152, device="cuda", dtype=torch.bfloat16, requires_grad=True)
block(x, Grid(5, 6)).backward(torch.ones(1, 30, 1152, device="cuda", dtype=torch.bfloat16))
assert x.grad.isfinite().all()
""",
    "a worker thread that calls first": """
t = inputs("cuda")
want = propagate_2d(*t, backend="torch")
found = []
def work():
    with torch.no_grad():
        found.append(propagate_2d(*t, backend="cuda"))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert len(found) == 1 and torch.allclose(found[0].float(), want.float(), atol=0.1)
""",
    "a fork": """
t = inputs("cuda")
propagate_2d(*t)
read, write = os.pipe()
if os.fork() == 0:
    try:
        propagate_2d(*t)
        said = "ran"
    except RuntimeError as error:
        said = str(error)
    os.write(write, said.encode())
    os._exit(0)
said = os.read(read, 4096).decode()
assert "fork" in said, said
""",
    "another device": """
if torch.cuda.device_count() > 1:
    t = inputs("cuda:1")
    y = propagate_2d(*t, backend="cuda")
    y.backward(torch.ones(1, 6, 5, 16, device="cuda:1", dtype=torch.bfloat16))
    assert all(x.grad.isfinite().all() for x in t)
    assert torch.cuda.current_device() == 0
    assert propagate_2d(*inputs("cuda:0"), backend="cuda").isfinite().all()
""",
}


@pytest.mark.parametrize("name", CASES)
def test_in_a_fresh_process(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", INPUTS + CASES[name]], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
