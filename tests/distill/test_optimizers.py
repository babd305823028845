"""The batched Muon against PyTorch's own."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cgspn
from cgspn.distill import OptimConfig, muon
from cgspn.distill.muon import BatchedMuon, orthogonal
from cgspn.distill.optimizers import Optimizers, build_optimizer
from cgspn.distill.tasks import Task

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (5, 7), (16, 16), (1, 9), (24, 8)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator).to(DEVICE) * 10.0 ** (k - 4) for k, shape in enumerate(SHAPES)]


def pytorch(groups, **settings):
    return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw", **settings)


def stepped(kind, steps=4, **settings):
    """Weights and momenta after some steps; one matrix has no gradient in the first."""
    weights = matrices()
    groups = [{"params": weights[:5], "lr": 0.02, "weight_decay": 0.1}, {"params": weights[5:], "lr": 0.005}]
    optimizer = kind(groups, **settings)
    for step in range(steps):
        for k, (weight, gradient) in enumerate(zip(weights, gradients(step), strict=True)):
            weight.grad = None if step == 0 and k == 3 else gradient
        optimizer.step()
    return weights, [optimizer.state[w]["momentum_buffer"] for w in weights]


@pytest.mark.parametrize("together", [1 << 26, 200])  # all of a shape at once, and a matrix or two
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "momentum": 0.8}])
def test_steps_are_those_of_pytorch(settings, together, monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", together)
    before = matrices()
    for ours, theirs, start in zip(*(stepped(kind, **settings)[0] for kind in (BatchedMuon, pytorch)), before):
        moved = float((theirs - start).detach().norm())
        # bfloat16 products, whose sums another kernel takes in another order
        assert float((ours - theirs).detach().norm()) < (2e-2 if GPU else 1e-3) * moved
        assert moved > 0


def test_momenta_are_those_of_pytorch():
    for ours, theirs in zip(*(stepped(kind)[1] for kind in (BatchedMuon, pytorch)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (32, 32)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    found = orthogonal(
        [torch.randn(shape, device=DEVICE) * k for k in (1e-3, 1, 1e3)], (3.4445, -4.7750, 2.0315), 5, 1e-7
    )
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    values = torch.linalg.svdvals(found.float())
    assert 0.4 < float(values.min()) < float(values.max()) < 1.4
    zero = orthogonal([torch.zeros(shape, device=DEVICE)], (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert not zero.any()


def test_the_patch_embedding_has_a_rate_of_its_own():
    class Student(Task):
        def __init__(self):
            super().__init__()
            self.student = cgspn.create_model("cgspn_mini_patch4_28", mixers=("propagation",))

        def inherits(self, name):
            return "mixer" not in name

    task = Student()
    weight = task.student.patch_embed.projection.weight

    def rates(config):
        optimizer = build_optimizer(task, replace(config, learning_rate=0.1, inherited_rate=0.5))
        found = {p: group["peak"] for group in optimizer.param_groups for p in group["params"]}
        assert found.keys() == set(task.parameters())
        assert {rate for p, rate in found.items() if p is not weight} == {0.1, 0.05}
        return found[weight]

    for kind in ("adamw", "muon"):
        assert rates(OptimConfig(optimizer=kind)) == 0.05
        assert rates(OptimConfig(optimizer=kind, embedding_rate=0.2)) == pytest.approx(0.01)
        assert rates(OptimConfig(optimizer=kind, embedding_rate=0)) == 0


def test_a_snapshot_of_the_state_goes_on_as_if_nothing_had_happened():
    weights, _ = stepped(BatchedMuon, steps=2)
    copies = [nn.Parameter(w.detach().clone()) for w in weights]
    whole = Optimizers(BatchedMuon(weights, lr=0.02))
    resumed = Optimizers(BatchedMuon(copies, lr=0.02))
    for step in range(3):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        if step == 2:
            resumed.make_state()
            with torch.no_grad():
                for copy, weight in zip(copies, weights, strict=True):
                    copy.copy_(weight)
            named = list(resumed.each_state())
            assert [name for _, name, _ in named] == ["momentum_buffer"] * len(SHAPES)
            for (_, _, mine), (_, _, theirs) in zip(named, list(whole.each_state()), strict=True):
                mine.copy_(theirs)
            resumed.param_groups[0]["lr"] = 0.02
            for copy, gradient in zip(copies, gradients(step), strict=True):
                copy.grad = gradient
            resumed.step()
        whole.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


def test_sharded_matrices_take_the_step_of_pytorch(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.Linear(6, 5, bias=False)
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for module in (plain, sharded):
            optimizer = Optimizers(BatchedMuon(module.parameters(), lr=0.02))
            for step in range(2):
                module(torch.randn(7, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(sharded.weight.full_tensor(), plain.weight, rtol=1e-3, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_and_probes_do_not_decay(optimizer):
    encoder = cgspn.create_model("vit_mini_patch4_28", mixers=("attention",))

    class Own(Task):
        def __init__(self):
            super().__init__()
            self.student = encoder

    built = build_optimizer(Own(), OptimConfig(optimizer=optimizer, weight_decay=0.1))
    decays = {p: group["weight_decay"] for group in built.param_groups for p in group["params"]}
    named = dict(encoder.named_parameters())
    assert encoder.no_weight_decay()
    assert {decays[named[name]] for name in encoder.no_weight_decay()} == {0.0}
    assert decays[named["blocks.0.mlp.fc1.weight"]] == 0.1
    assert decays[named["blocks.0.mlp.fc1.bias"]] == 0.0
