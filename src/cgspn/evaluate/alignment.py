"""Similarity of a student's and its teacher's features, per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .checks import check_finite


@dataclass(frozen=True)
class BlockAlignment:
    """Similarity of two sets of features; see the functions with the same names.

    Attributes:
        cosine: -1 to 1; 1 if all directions are equal.
        relative_mse: 0 for equal features, 1 for a student that returns zeros.
        cka: 0 to 1; 1 for features that are equal up to rotation, scale and shift.
    """

    cosine: float
    relative_mse: float
    cka: float


def _pair(student: Tensor, teacher: Tensor, same_width: bool) -> tuple[Tensor, Tensor]:
    """Check both tensors and return them as float64 [tokens, C]."""
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1] or 0 in student.shape + teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same [..., C], not empty"
        )
    if same_width and student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"student has C = {student.shape[-1]}; expected that of teacher, {teacher.shape[-1]}")
    check_finite("student", student)
    check_finite("teacher", teacher)
    return student.flatten(0, -2).double(), teacher.to(student.device).flatten(0, -2).double()


def cosine(student: Tensor, teacher: Tensor) -> float:
    """Compute the cosine similarity between student and teacher tokens, averaged over all tokens.

    Args:
        student: [..., C], such as [B, N, C] or [B, h, w, C].
        teacher: the same shape.

    Raises:
        ValueError: shapes differ or are empty, or values are not finite.
    """
    s, t = _pair(student, teacher, same_width=True)
    return float(cosine_similarity(s, t, dim=-1).mean())


def relative_mse(student: Tensor, teacher: Tensor) -> float:
    """Compute ||student - teacher||^2 / ||teacher||^2 over all tokens and channels, as in the loss of stage 1.

    Args:
        student: [..., C].
        teacher: the same shape, not all zero.

    Raises:
        ValueError: shapes differ or are empty, values are not finite, or the teacher is all zeros.
    """
    s, t = _pair(student, teacher, same_width=True)
    energy = float(t.square().sum())
    if energy == 0:
        raise ValueError("teacher is zero everywhere; a relative MSE needs something to relate to")
    return float((s - t).square().sum()) / energy


def linear_cka(student: Tensor, teacher: Tensor) -> float:
    """Compute linear centred kernel alignment (CKA) over all tokens; the numbers of channels may differ.

    ||S^T T||_F^2 / (||S^T S||_F ||T^T T||_F), with S and T centred over tokens. The measure is biased upwards if there
    are not several times as many tokens as channels. Constant features give 0.

    Args:
        student: [..., C].
        teacher: [..., C'], the same leading sizes.

    Raises:
        ValueError: leading sizes differ, tensors are empty, or values are not finite.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, section 3.
    """
    s, t = _pair(student, teacher, same_width=False)
    s, t = s - s.mean(0), t - t.mean(0)
    cross = float((s.T @ t).square().sum())
    norm = float(torch.linalg.matrix_norm(s.T @ s) * torch.linalg.matrix_norm(t.T @ t))
    return cross / norm if norm > 0 else 0.0


def align(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[BlockAlignment]:
    """Compute the three similarity measures for each block.

    Args:
        students: features [..., C] of each block.
        teachers: the same number and shapes.

    Raises:
        ValueError: the numbers of blocks differ, or a measure fails; the message names the block.
    """
    if len(students) != len(teachers):
        raise ValueError(f"students holds {len(students)} blocks, teachers {len(teachers)}; expected the same number")
    out = []
    for i, (s, t) in enumerate(zip(students, teachers)):
        try:
            out.append(BlockAlignment(cosine(s, t), relative_mse(s, t), linear_cka(s, t)))
        except ValueError as error:
            raise ValueError(f"block {i}: {error}") from error
    return out
