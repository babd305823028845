"""PCA visualisation: the three principal components of the features as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

VIVID = 1.5  # scale of components with unit variance, before the sigmoid
SIDE = 512  # longer side in pixels of a visualisation


@dataclass(frozen=True)
class ColourBasis:
    """The mapping from one model's features to colours: subtract `mean` [C], then project on `axes` [C, 3].

    explained: fraction of the variance in the three components. agreement: correlation of each component with the one
    it was aligned to; None if not aligned.
    """

    mean: Tensor
    axes: Tensor
    explained: float
    agreement: tuple[float, float, float] | None = None

    def components(self, features: Tensor) -> Tensor:
        """Features [..., C] -> components [..., 3], float32, each with about unit variance."""
        return (features.float() - self.mean) @ self.axes

    def colours(self, features: Tensor) -> Tensor:
        """Features [..., C] -> colours [..., 3] in 0..1: a sigmoid, so that outliers do not make the rest grey."""
        return (VIVID * self.components(features)).sigmoid()

    def picture(self, features: Tensor, side: int = SIDE) -> Tensor:
        """Features [h, w, C] -> colours [H, W, 3] smoothly upsampled, with a longer side of about `side`."""
        components = self.components(features).permute(2, 0, 1)[None]
        factor = max(1, round(side / max(features.shape[:2])))
        size = (factor * features.shape[0], factor * features.shape[1])
        smooth = interpolate(components, size, mode="bicubic", align_corners=False)
        return (VIVID * smooth[0].permute(1, 2, 0)).sigmoid()


def fit_colours(maps: Sequence[Tensor], *, like: tuple[ColourBasis, Sequence[Tensor]] | None = None) -> ColourBasis:
    """Fit the colour basis of one model on all its maps in a report.

    The sign of PCA components is arbitrary, and so is the order of components with similar variance. Similar models
    could thus get different colours. With `like`, the three components are rotated (and reflected) to correlate best
    with those of another model on the same images. The subspace does not change.

    maps: features [..., C], at least one. like: another model's basis and its features [..., C'] of the same images,
    with the same leading sizes. Raises ValueError for no features, features that are not finite, or other sizes.

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
        # The tail of each component's distribution is bright.
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
