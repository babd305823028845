"""Features as colours: the three strongest directions of a model's features become red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

VIVID = 1.5  # on components of unit variance, before the sigmoid that makes them colours
SIDE = 512  # pixels of the longer side of a picture of features


@dataclass(frozen=True)
class ColourBasis:
    """How one model's features become colours, the same for every map of it.

    Attributes:
        mean: [C], subtracted first.
        axes: [C, 3], from centred features to the three colour components.
        explained: share of the variance that the three components hold, 0 to 1.
        agreement: correlation of each component with the one it was aligned to, None if it was not.
    """

    mean: Tensor
    axes: Tensor
    explained: float
    agreement: tuple[float, float, float] | None = None

    def components(self, features: Tensor) -> Tensor:
        """Features [..., C] -> components [..., 3], float32, each of about unit variance."""
        return (features.float() - self.mean) @ self.axes

    def colours(self, features: Tensor) -> Tensor:
        """Features [..., C] -> colours [..., 3] in 0..1: a sigmoid, so that few outliers do not grey the rest."""
        return (VIVID * self.components(features)).sigmoid()

    def picture(self, features: Tensor, side: int = SIDE) -> Tensor:
        """Features [h, w, C] -> colours [H, W, 3] without edges between patches, the longer side about `side`."""
        components = self.components(features).permute(2, 0, 1)[None]
        factor = max(1, round(side / max(features.shape[:2])))
        size = (factor * features.shape[0], factor * features.shape[1])
        smooth = interpolate(components, size, mode="bicubic", align_corners=False)
        return (VIVID * smooth[0].permute(1, 2, 0)).sigmoid()


def fit_colours(maps: Sequence[Tensor], *, like: tuple[ColourBasis, Sequence[Tensor]] | None = None) -> ColourBasis:
    """The colour basis of one model, fitted on all maps that will be shown of it.

    Components of a PCA have no sign and, where their strengths are close, no order, so two models would differ in
    colour where they agree in substance. With `like`, the three components are turned (and mirrored) together until
    they correlate best with those of another model on the same pictures: the subspace stays the model's own.

    Args:
        maps: features [..., C], at least one.
        like: another model's basis and its features of the same pictures, [..., C'], the same leading sizes.

    Raises:
        ValueError: no features, features that are not finite, or `like` of other sizes.

    Source: orthogonal Procrustes problem, Schoenemann 1966; PCA colours as in DINOv2 (Oquab et al., 2023), figure 1.
    """
    if not maps:
        raise ValueError("maps is empty; expected at least one feature map")
    x = _rows("maps", maps)
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    axes = x.new_zeros(x.shape[1], 3)
    for i in range(min(3, x.shape[1])):
        if values[i] > 1e-9 * max(total, 1e-12):
            axes[:, i] = vectors[:, i] / values[i].sqrt()
    scores = centred @ axes
    agreement = None
    if like is None:
        # The rarer, stronger side of each component is its bright side.
        axes = axes * torch.where(scores.pow(3).mean(0) < 0, -1.0, 1.0)
    else:
        other = _rows("like", like[1])
        if len(other) != len(x):
            raise ValueError(f"like holds {len(other)} positions; expected those of maps, {len(x)}")
        target = like[0].components(other).double()
        u, _, vt = torch.linalg.svd(scores.T @ (target - target.mean(0)))
        axes = axes @ (u @ vt)
        first, second, third = (_correlation((centred @ axes)[:, i], target[:, i]) for i in range(3))
        agreement = (first, second, third)
    explained = float(values[:3].sum()) / total if total > 0 else 0.0
    return ColourBasis(mean.float(), axes.float(), explained, agreement)


def _rows(name: str, maps: Sequence[Tensor]) -> Tensor:
    x = torch.cat([m.detach().flatten(0, -2).double() for m in maps])
    if 0 in x.shape or not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has {tuple(x.shape)} features; expected at least one, all finite")
    return x


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0
