"""A linear probe from frozen patch tokens to classes, solved in closed form.

The probe is a ridge regression from each token to the class fractions in its patch. It is fitted from sums over
patches, so a dataset of any size can be streamed. It has no learning rate, epochs or seed, so a comparison of two
encoders depends only on their tokens.

Shapes: N images, h x w token grid, C channels, H x W masks, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

PENALTIES = tuple(10.0 ** (e / 2) for e in range(-12, 1))
"""Strengths of regularisation tried, 1e-6 to 1, relative to the mean variance of the tokens (1 after scaling)."""

CHUNK = 128  # images per step
PATCHES = 1 << 16  # about as many are kept, from all images, to choose the penalty by
PIXELS = 1 << 25  # most logits at once; with many classes one image at full size would take gigabytes


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear map from tokens to class logits.

    Attributes:
        weight: float64 [C, K].
        bias: float64 [K].
        penalty: regularisation strength of the fit.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [N, h, w, C] -> logits [N, h, w, K], with the dtype and device of the tokens."""
        return tokens @ self.weight.to(tokens) + self.bias.to(tokens)

    def predict(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [N, h, w, C] -> classes int64 [N, H, W], (H, W) = size: the argmax of bilinearly upsampled logits."""
        return torch.cat(
            [_upsampled_argmax(self.logits(part.float()).permute(0, 3, 1, 2), size) for part in tokens.split(CHUNK)]
        )


def _upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The argmax of upsampled logits [N, K, h, w] at each pixel, int64 [N, H, W], in groups of classes."""
    best, found = None, None
    step = max(1, PIXELS // (len(logits) * size[0] * size[1]))
    for first in range(0, logits.shape[1], step):
        part = logits[:, first : first + step]
        value, index = interpolate(part, size, mode="bilinear", align_corners=False).max(1)
        index += first
        if best is None or found is None:
            best, found = value, index
        else:
            better = value > best
            best, found = torch.where(better, value, best), torch.where(better, index, found)
    assert found is not None
    return found


def patch_histograms(
    masks: Tensor, grid: tuple[int, int], classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the fraction of each class in each patch, and the fraction of pixels that are not ignored.

    Patch (i, j) covers rows floor(i H / h) to ceil((i + 1) H / h), and columns accordingly, so H need not be a multiple
    of h.

    Args:
        masks: integers [N, H, W], 0 to classes - 1, or ignore_index.
        grid: (h, w).
        classes: K.
        ignore_index: label of pixels to ignore.

    Returns:
        Fractions float32 [N, h, w, K] that sum to 1 (or to 0 if all pixels are ignored), and the fraction [N, h, w] of
        pixels that are not ignored.
    """
    h, w = grid
    rows, row_patch = _covered(masks.shape[1], h, masks.device)
    columns, column_patch = _covered(masks.shape[2], w, masks.device)
    patch = row_patch[:, None] * w + column_patch
    shares, counted = [], []
    for part in masks.split(CHUNK):
        n = len(part)
        pixels = part[:, rows[:, None], columns].long()
        keep = torch.ones_like(pixels, dtype=torch.bool) if ignore_index is None else pixels != ignore_index
        # ignored pixels get an extra class
        where = (torch.arange(n, device=masks.device)[:, None, None] * h * w + patch) * (classes + 1)
        counts = torch.bincount((where + pixels.where(keep, classes)).flatten(), minlength=n * h * w * (classes + 1))
        counts = counts.view(n, h, w, classes + 1)
        valid = counts[..., :classes].float()
        total = valid.sum(-1)
        shares.append(valid / total.clamp(min=1)[..., None])
        counted.append(total / counts.sum(-1))
    return torch.cat(shares), torch.cat(counted)


def _covered(size: int, patches: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lines that each patch covers, concatenated over patches, and the patch of each line."""
    number = torch.arange(patches, device=device)
    begin, end = number * size // patches, -(-(number + 1) * size // patches)
    owner = number.repeat_interleave(end - begin)
    first = (end - begin).cumsum(0) - (end - begin)
    return torch.arange(len(owner), device=device) - first[owner] + begin[owner], owner


class Moments:
    """Sums over patches, weighted by their valid pixels, from which a ridge regression of any penalty can be solved."""

    def __init__(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None:
        """Zero sums in float64 on `device`."""
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.x = torch.zeros(channels, dtype=torch.float64, device=device)
        self.y = torch.zeros(classes, dtype=torch.float64, device=device)
        self.xx = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.xy = torch.zeros(channels, classes, dtype=torch.float64, device=device)

    def add(self, tokens: Tensor, fractions: Tensor, counted: Tensor) -> None:
        """Add tokens float [N, h, w, C] and their patches, the result of `patch_histograms`."""
        for parts in zip(*(each.split(CHUNK) for each in (tokens, fractions, counted))):
            x, y, n = (part.flatten(0, 2).to(self.x) for part in parts)
            weighted = n[:, None] * x
            self.total += n.sum()
            self.x += weighted.sum(0)
            self.y += n @ y
            self.xx += weighted.T @ x
            self.xy += weighted.T @ y

    def __add__(self, other: Moments) -> Moments:
        """The sums over both datasets."""
        out = Moments(len(self.x), len(self.y), self.x.device)
        for name in ("total", "x", "y", "xx", "xy"):
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out

    def solve(self, penalties: Sequence[float]) -> list[Probe]:
        """One probe for each penalty, from one eigendecomposition.

        Source: regularised least squares; Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning",
        3.4.1.
        """
        mean_x, mean_y = self.x / self.total, self.y / self.total
        covariance = self.xx / self.total - mean_x.outer(mean_x)
        cross = self.xy / self.total - mean_x.outer(mean_y)
        # Scale channels to variance 1, so that the penalty does not depend on the encoder or channel.
        std = covariance.diagonal().clamp(min=0).sqrt()
        scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        projected = vectors.T @ (scale[:, None] * cross)
        probes = []
        for penalty in penalties:
            weight = scale[:, None] * (vectors @ (projected / (values.clamp(min=0) + penalty)[:, None]))
            probes.append(Probe(weight, mean_y - mean_x @ weight, penalty))
        return probes
