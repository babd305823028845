"""Loss functions. All return float32 scalars."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, logsigmoid

from ..ops.backends import unsupported_reason
from ..ops.eager import is_eager

CHANNELS_MOST = 2048  # most channels of a row that fits on the chip in the kernels
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def fused_loss(student: Tensor, teacher: Tensor, energy: Tensor | None, kl_weight: float) -> Tensor | None:
    """`tap_loss` with Triton kernels if possible (on a GPU, with gradients only for the student); otherwise None.

    The plain version makes some twenty passes over memory in float32. torch.compile uses the plain version, which
    Inductor fuses.
    """
    can = is_eager(student, teacher) and student.is_cuda and teacher.is_cuda
    can = can and not (teacher.requires_grad or (energy is not None and energy.requires_grad))
    can = can and student.shape == teacher.shape and student.ndim > 1 and 0 < student.shape[-1] <= CHANNELS_MOST
    can = can and {student.dtype, teacher.dtype} <= DTYPES and len(student) > 0
    if not can or unsupported_reason("triton", student) is not None:
        return None
    from .losses_triton import fused_tap_loss

    energy = teacher.float().square().mean() if energy is None else energy.float()
    return fused_tap_loss(student, teacher, energy, kl_weight)


def relative_mse(student: Tensor, teacher: Tensor, energy: Tensor | None = None) -> Tensor:
    """mean((student - teacher)^2) / energy: about 1 for a student that returns zero.

    student, teacher: any shape, the same on both sides. energy: mean square of the teacher's features, a scalar; None
    takes that of `teacher`. The division gives blocks of different scales the same weight. The gradient is that of the
    paper's stage 1 loss ||F_s - F_t||^2 up to a factor per block (docs/paper.md).
    """
    if (loss := fused_loss(student, teacher, energy, 0.0)) is not None:
        return loss
    student, teacher = student.float(), teacher.float()
    energy = teacher.square().mean() if energy is None else energy
    return (student - teacher).square().mean() / energy.clamp(min=1e-12)


def tap_loss(student: Tensor, teacher: Tensor, kl_weight: float, energy: Tensor | None = None) -> Tensor:
    """MSE + kl_weight * KL(P(student) || P(teacher)), P the softmax over channels: the loss of one tap.

    student, teacher [B, N, C]; energy as in `relative_mse`. Both sides are first divided by its root, because the scale
    of features differs between blocks by orders of magnitude.
    Paper: the loss of a tap in stage 2, MSE + KL
    (docs/paper.md).
    """
    if (fused := fused_loss(student, teacher, energy, kl_weight)) is not None:
        return fused
    student, teacher = student.float(), teacher.float()
    scale = (teacher.square().mean() if energy is None else energy).sqrt().clamp(min=1e-6)
    student, teacher = student / scale, teacher / scale
    loss = (student - teacher).square().mean()
    if kl_weight:
        # kl_div(input, target) is KL(target || input)
        p_student, p_teacher = log_softmax(student, -1), log_softmax(teacher, -1)
        kl = kl_div(p_teacher, p_student, reduction="none", log_target=True).sum(-1).mean()
        loss = loss + kl_weight * kl
    return loss


def sigmoid_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's pairwise loss with any number of positives. image and text are unit vectors [B, D].

    same: [B, B] bool, whether image i belongs to text j. Positives and negatives have the same total weight, because
    with few classes a batch has many of both. scale: log of the temperature's inverse; bias: added to the logits.
    Source: SigLIP (Zhai et al. 2023), equation 1, rebalanced.
    """
    logits = image @ text.T * scale.exp() + bias
    positive = -logsigmoid(logits)[same].mean()
    negative = -logsigmoid(-logits)[~same].mean() if not same.all() else logits.new_zeros(())
    return positive + negative


def clip_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy with the target probability spread over all positives.

    Arguments as in `sigmoid_loss`. Source: CLIP (Radford et al. 2021), figure 3.
    """
    logits = image @ text.T * scale.exp()
    target = same.float()

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return -(log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1).mean()

    return torch.stack([cross_entropy(logits, target), cross_entropy(logits.T, target.T)]).mean()
