"""FLOPs counted from one and two blocks against those of a whole step that runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cgspn.distill import LossConfig
from cgspn.distill.flops import forward_flops, peak_of
from cgspn.distill.tasks import DistillTask, SublayerTask
from cgspn.distill.throughput import Step, Throughput
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, model_config
from cgspn.teachers import convert

SMALL = {"width": 48, "mlp_hidden": 96, "attention": AttentionConfig(heads=2)}


def batch_of(size):
    from cgspn.data import Batch

    return Batch(0, torch.zeros(1, dtype=torch.long), torch.randn(1, 3, *size), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "high resolution"])
def test_the_count_is_that_of_a_step(kind):
    size = (28, 56)
    teacher = Encoder(model_config("vit_mini_patch4_28", mixers=("attention",) * 5, **SMALL)).requires_grad_(False)
    student = convert(teacher, compression=4, keep_attention=2)
    if kind == "stage 1":
        task = SublayerTask(teacher, student, learn_positions=False)
    elif kind == "stage 2":
        task = DistillTask(teacher, student, LossConfig(), learn_positions=False)
    else:
        previous = convert(teacher, compression=4, keep_attention=2).requires_grad_(False)
        task = DistillTask(previous, student, LossConfig(adapters=False), teacher_size=(28, 28))
    # of attention on a processor, the counter of torch knows this kernel alone
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.losses(batch_of(size))["total"].backward()
    assert task.flops(size) == counter.get_total_flops()


def test_a_vit_by_hand():
    n, w, hidden = 49, 48, 96
    block = n * 2 * w * (4 * w + 2 * hidden) + 4 * n * n * w
    stem = n * 2 * 4 * 4 * 3 * w
    config = model_config("vit_mini_patch4_28", mixers=("attention",) * 3, pooling="mean", **SMALL)
    assert forward_flops(config, (28, 28)) == stem + 3 * block


def test_utilisation_is_flops_over_peak():
    steps = [Step(20, (1, 1), 20, 80, 0, 0.5), Step(10, (2, 2), 40, 160, 0, 0.5)]
    rates = Throughput(peak=480.0).rates(steps)
    assert rates == {"images_per_second": 30, "data_wait_share": 0, "tokens_per_second": 60, "mfu": 0.5}
    assert "mfu" not in Throughput().rates(steps)
    assert "mfu" not in Throughput(peak=480.0).rates([*steps, steps[0]._replace(flops=None)])
    assert peak_of(torch.device("cpu"), "bfloat16") is None
