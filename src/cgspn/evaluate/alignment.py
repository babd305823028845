"""Similarity of a student's and its teacher's features."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from .checks import check_finite


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check both tensors and return them as float64 [tokens, C]."""
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1] or 0 in student.shape + teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same [..., C], not empty"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student has C = {student.shape[-1]}; expected that of teacher, {teacher.shape[-1]}")
    check_finite("student", student)
    check_finite("teacher", teacher)
    return student.flatten(0, -2).double(), teacher.to(student.device).flatten(0, -2).double()


def cosine(student: Tensor, teacher: Tensor) -> float:
    """Compute the cosine similarity between student and teacher tokens, averaged over all tokens.

    student, teacher: [..., C], such as [B, N, C] or [B, h, w, C]. Raises ValueError if shapes differ or are empty, or
    values are not finite.
    """
    s, t = _pair(student, teacher)
    return float(cosine_similarity(s, t, dim=-1).mean())


def relative_mse(student: Tensor, teacher: Tensor) -> float:
    """Compute ||student - teacher||^2 / ||teacher||^2 over all tokens and channels, as in the loss of stage 1.

    Shapes and errors are those of `cosine`. Also raises ValueError if the teacher is all zeros.
    """
    s, t = _pair(student, teacher)
    energy = float(t.square().sum())
    if energy == 0:
        raise ValueError("teacher is zero everywhere; relative MSE is undefined")
    return float((s - t).square().sum()) / energy
