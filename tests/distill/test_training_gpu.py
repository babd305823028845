"""Training on a GPU: captured and compiled steps against plain ones."""

from dataclasses import replace

import pytest
import torch

from cgspn.data import load_embedded
from cgspn.distill import ComputeConfig, DistillConfig, OptimConfig, distil
from cgspn.teachers import convert, load_embedded_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def losses(compute, accumulate=1):
    torch.manual_seed(0)
    teacher = load_embedded_teacher().cuda()
    student = convert(teacher.image, compression=4).cuda()
    stage = OptimConfig(steps=12, batch_size=32, learning_rate=1e-3, accumulate=accumulate)
    images = load_embedded("train").subset(torch.arange(512))
    histories = distil(teacher, student, images, DistillConfig(stage1=stage, stage2=stage, compute=compute))
    return torch.tensor([history.curve("total") for history in histories])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_step_is_the_plain_one(precision, accumulate):
    plain = ComputeConfig(precision=precision)
    ours, theirs = losses(replace(plain, capture=True), accumulate), losses(plain, accumulate)
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if precision == "float32" else 2e-2, atol=0)


def test_a_compiled_step_is_the_plain_one():
    torch.testing.assert_close(losses(ComputeConfig(compile=True)), losses(ComputeConfig()), rtol=1e-3, atol=0)
