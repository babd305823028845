"""What a stage prepares is given to its task; nothing is left on the models."""

from functools import partial

import pytest
import torch

from cgspn.data import Batch
from cgspn.distill import ComputeConfig, LossConfig, World
from cgspn.distill.runtime import Runtime, running
from cgspn.distill.tasks import DistillTask, SublayerTask
from cgspn.models import create_model
from cgspn.teachers import convert


def pair():
    torch.manual_seed(0)
    teacher = create_model("vit_mini_patch4_28", mixers=("attention",) * 2).eval().requires_grad_(False)
    return teacher, convert(teacher, compression=4)


def batch():
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return Batch(0, torch.arange(2), images, torch.zeros(2, dtype=torch.long))


def attributes_of(module):
    return {name: id(value) for name, value in vars(module).items()}


@pytest.mark.parametrize("kind", [SublayerTask, DistillTask])
def test_functions_of_the_runtime_are_what_runs_and_models_stay_as_they_were(kind):
    teacher, student = pair()
    modules = [*teacher.modules(), *student.modules()]
    before = [attributes_of(module) for module in modules]
    called = []

    def noted(function):
        return lambda *arguments: called.append(function.__name__) or function(*arguments)

    plain = Runtime()
    runtime = Runtime(*map(noted, (plain.tapped, plain.sublayer, plain.tap_loss)))
    more = () if kind is SublayerTask else (LossConfig(),)
    wanted = kind(teacher, student, *more).losses(batch())["total"]
    assert torch.equal(kind(teacher, student, *more, runtime=runtime).losses(batch())["total"], wanted)
    stage1 = {"tapped", "sublayer"}
    assert set(called) == (stage1 if kind is SublayerTask else {"tapped", "adapted_tap_loss"})
    assert [attributes_of(module) for module in modules] == before


def test_a_compiled_run_gives_what_a_plain_one_gives_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what is traced, without a compiler
    teacher, student = pair()
    losses = {}
    for compiled in (False, True):
        make = lambda student, runtime: DistillTask(teacher, student, LossConfig(adapters=False), runtime=runtime)  # noqa: E731
        with running(make, student, ComputeConfig(compile=compiled, checkpointing=True), World()) as task:
            losses[compiled] = task.losses(batch())["total"]
            losses[compiled].backward()
    assert torch.allclose(losses[False], losses[True], rtol=1e-4)
    assert not student.checkpointing
    assert all(block._compiled_call_impl is None for block in (*teacher.each_block(), *student.each_block()))
