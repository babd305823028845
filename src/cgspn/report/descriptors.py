"""Compressed features in a page, from which it computes cosines between patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

KEPT = 0.999  # fraction of the squared norm that descriptors keep, if DIMENSIONS suffice
DIMENSIONS = 64
CHECKED = 64  # patches whose cosines are compared with the exact ones


@dataclass(frozen=True)
class Descriptors:
    """Unit vectors of the patches, projected on their principal directions and quantised.

    codes: int8 [h, w, D]. steps: float32 [D], the quantisation step of each direction. kept: fraction of the squared
    norm that the projection keeps, averaged over the patches. error: largest difference between the page's cosines and
    the exact ones, over the checked rows.
    """

    codes: Tensor
    steps: Tensor
    kept: float
    error: float


def describe(features: Tensor) -> Descriptors:
    """Descriptors of one feature map [h, w, C] of finite values.

    The unit vectors are not centred, so that the error of a cosine is the product of the errors of the two vectors.
    Each direction has its own step, because the mean has a much larger range than the other directions.
    """
    units = normalize(features.detach().double().flatten(0, 1), dim=1)
    values, vectors = torch.linalg.eigh(units.T @ units)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    lacking = values.cumsum(0) < KEPT * values.sum()
    best = vectors[:, : min(DIMENSIONS, int(lacking.sum()) + 1)]
    projected = units @ best
    steps = (projected.abs().amax(0) / 127).clamp(min=1e-12)
    codes = (projected / steps).round().to(torch.int8).unflatten(0, features.shape[:2])
    kept = float(projected.square().sum() / units.square().sum().clamp(min=1e-12))
    rows = torch.arange(0, len(units), -(-len(units) // CHECKED))
    approximate = unpacked(codes, steps.float())
    error = float((approximate[rows] @ approximate.T - units[rows] @ units.T).abs().max())
    return Descriptors(codes, steps.float(), kept, error)


def unpacked(codes: Tensor, steps: Tensor) -> Tensor:
    """The unit vectors that a page computes with, float64 [h * w, D]."""
    return normalize(codes.flatten(0, 1).double() * steps.double(), dim=1)
