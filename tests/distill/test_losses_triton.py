"""The loss of a tap in two kernels against its definition in float64: the value and the gradient to the student.

The kernels run on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

import os

import pytest
import torch

from cgspn.distill.losses import relative_mse, tap_loss

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
# the value is a float32 whatever the inputs; a gradient is rounded once, to 24, 11 or 8 bits
DTYPES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def features(*shape, dtype):
    student, teacher = torch.randn(shape) * 7, torch.randn(shape) * 5 + 2
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


def check(student, teacher, energy, kl_weight):
    from cgspn.distill.losses_triton import fused_tap_loss

    mine, exact = student.detach().requires_grad_(), student.detach().double().requires_grad_()
    loss = fused_tap_loss(mine, teacher, energy, kl_weight)
    # float() of the definition would round, so it is written out
    scale = energy.double().sqrt().clamp(min=1e-6)
    s, t = exact / scale, teacher.double() / scale
    wanted = (s - t).square().mean()
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    wanted = wanted + kl_weight * (log_s.exp() * (log_s - log_t)).sum(-1).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    upstream = 100.0  # float16 alone would lose small gradients
    (got,) = torch.autograd.grad(loss, mine, torch.tensor(upstream, device=DEVICE))
    (true,) = torch.autograd.grad(wanted, exact, torch.tensor(upstream, device=DEVICE, dtype=torch.float64))
    assert got.dtype == student.dtype
    assert float((got.double() - true).norm() / true.norm()) < DTYPES[student.dtype]
    # and the plain form agrees, within float32
    plain = tap_loss(student.cpu(), teacher.cpu(), kl_weight, energy.cpu())
    assert loss.item() == pytest.approx(plain.item(), rel=2e-5)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 37, 96), (1, 1, 1), (7, 130), (2, 3, 4, 33), (2, 3, 1152)])
def test_value_and_gradient(shape, dtype, kl_weight):
    torch.manual_seed(0)
    student, teacher = features(*shape, dtype=dtype)
    energies = torch.stack([teacher.float().square().mean()] * 3)
    check(student, teacher, energies[1], kl_weight)  # not at an aligned address


@pytest.mark.parametrize("channels", [1, 16, 63, 64, 65, 192, 384, 768, 1000, 1024, 1152, 1280, 1408, 1536, 4096])
def test_a_row_is_covered_by_powers_of_two(channels):
    from cgspn.distill.losses_triton import split_row

    head, tail = split_row(channels)
    assert all(part & (part - 1) == 0 for part in (head, tail))
    assert channels <= head + tail <= 1 << (channels - 1).bit_length() if channels > 1 else head == 1
    assert tail or head == 1 << (channels - 1).bit_length()


def test_tokens_without_their_prefix_and_channels_apart_are_read_where_they_are():
    torch.manual_seed(0)
    student, teacher = features(3, 19, 24, dtype=torch.float32)
    energy = teacher.square().mean()
    check(student[:, 3:], teacher[:, 3:], energy, 1.0)
    check(student[:, 3:], teacher[:, :-3].contiguous(), energy, 1.0)
    check(student.transpose(1, 2), teacher.transpose(1, 2), energy, 1.0)


def test_extreme_logits_and_teachers_without_energy_stay_finite():
    torch.manual_seed(0)
    student, teacher = features(2, 9, 20, dtype=torch.float32)
    check(student * 100, teacher, teacher.square().mean(), 1.0)
    check(-1000 - student, -1000 - teacher, torch.tensor(1.0, device=DEVICE), 1.0)
    check(1e-8 * student, 0 * teacher, torch.tensor(0.0, device=DEVICE), 1.0)


@pytest.mark.skipif(not GPU, reason="the choice is made on a GPU")
def test_on_a_gpu_they_are_chosen_unless_more_than_their_gradient_is_wanted():
    student, teacher = features(2, 9, 20, dtype=torch.bfloat16)
    student.requires_grad_()
    energy = teacher.float().square().mean()
    for loss in (tap_loss(student, teacher, 1.0, energy), relative_mse(student, teacher)):
        assert type(loss.grad_fn).__name__ == "_TapLossBackward"
    assert type(tap_loss(student, teacher.requires_grad_(), 1.0, energy).grad_fn).__name__ != "_TapLossBackward"
