"""Encoders whose blocks or single layers are sharded (FSDP1, FSDP2) give what they gave; in a process of their own."""

import subprocess
import sys

import pytest

pytest.importorskip("torch.distributed.fsdp")

START = """
import sys, torch, torch.distributed as dist
import cgspn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
def encoder():
    torch.manual_seed(0)
    found = cgspn.create_model("cgspn_mini_patch4_28")
    for block in found.blocks:
        torch.nn.init.normal_(block.mixer.up.weight, std=0.2)
    return found
images = torch.randn(2, 3, 28, 28)
plain = encoder()
want = plain(images)
want.pooled.square().sum().backward()
def check(model):
    out = model(images)
    torch.testing.assert_close(out.tokens, want.tokens)
    out.pooled.square().sum().backward()
    return model
"""
CASES = {
    "FSDP2 of blocks": """
model = encoder()
for block in model.blocks:
    fully_shard(block, mesh=mesh)
check(fully_shard(model, mesh=mesh))
assert all(p.grad is not None for p in model.parameters())
""",
    "FSDP2 of every leaf": """
model = encoder()
leaves = [name for name, module in model.named_modules() if not list(module.children())]
for name in [name for name in leaves if list(model.get_submodule(name).parameters())]:
    fully_shard(model.get_submodule(name), mesh=mesh)
check(fully_shard(model, mesh=mesh))
for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
    assert (p.grad.full_tensor() - q.grad).norm() <= 1e-4 * q.grad.norm(), name
""",
    "FSDP1 of blocks": """
model = encoder()
for i, block in enumerate(model.blocks):
    model.blocks[i] = FullyShardedDataParallel(block, device_id=torch.device("cpu"), use_orig_params=True)
check(model)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_sharded(name: str, tmp_path) -> None:
    command = [sys.executable, "-c", START + CASES[name] + "\ndist.destroy_process_group()\n", str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
