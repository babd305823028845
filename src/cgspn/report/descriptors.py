"""Features small enough to travel inside a page, and still good for cosines between any two patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

KEPT = 0.999  # share of the squared length that descriptors keep, if DIMENSIONS are enough for it
DIMENSIONS = 64
CHECKED = 64  # patches whose cosines with all others are compared with the exact ones


@dataclass(frozen=True)
class Descriptors:
    """Unit vectors of the patches, projected on their strongest directions and rounded to whole steps.

    Attributes:
        codes: int8 [h, w, D].
        steps: float32 [D]: the size of a step of each direction.
        kept: share of the squared length that the projection keeps, mean over the patches, 0 to 1.
        error: largest difference between a cosine as the page computes it and the exact one, over the rows checked.
    """

    codes: Tensor
    steps: Tensor
    kept: float
    error: float


def describe(features: Tensor) -> Descriptors:
    """Descriptors of one feature map.

    The directions are those of the uncentred unit vectors, so that what is lost of a cosine is the product of what is
    lost of the two vectors. Each direction has a step of its own: the mean fills the range of its direction, and
    would leave the others a few steps only.

    Args:
        features: [h, w, C], finite.
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
    approximate = _unpacked(codes, steps.float())
    error = float((approximate[rows] @ approximate.T - units[rows] @ units.T).abs().max())
    return Descriptors(codes, steps.float(), kept, error)


def cosines(descriptors: Descriptors, position: tuple[int, int]) -> Tensor:
    """Cosine of one patch with every other as the page computes it: float64 [h, w]."""
    h, w = descriptors.codes.shape[:2]
    rows = _unpacked(descriptors.codes, descriptors.steps)
    return (rows @ rows[position[0] * w + position[1]]).view(h, w)


def _unpacked(codes: Tensor, steps: Tensor) -> Tensor:
    return normalize(codes.flatten(0, 1).double() * steps.double(), dim=1)
