"""Semantic segmentation by a linear probe: one linear map from frozen patch tokens to classes, solved in closed form.

The probe is a ridge regression from each token to the shares of the classes in its patch. Its logits are upsampled
bilinearly to the size of the masks, and the largest wins. No step size, no epochs, no seeds: two encoders compared by
it differ by their tokens alone.

Shapes: N images, h x w token grid, C channels, H x W masks, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot

from .checks import check_finite

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of regularisation tried, relative to the mean variance of the tokens (which is 1 after scaling)."""

CHUNK = 128  # images at a time: bounds the memory of one-hot masks and upsampled logits


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear map from tokens to class logits.

    Attributes:
        weight: float64 [C, K].
        bias: float64 [K].
        penalty: the regularisation it was fitted with.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens [N, h, w, C] to logits [N, h, w, K], in the dtype and on the device of the tokens."""
        return tokens @ self.weight.to(tokens) + self.bias.to(tokens)

    def predict(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [N, h, w, C] to classes int64 [N, H, W], (H, W) = size: logits upsampled bilinearly, largest wins."""
        out = []
        for part in _chunks(tokens):
            logits = self.logits(part.float()).permute(0, 3, 1, 2)
            out.append(interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1))
        return torch.cat(out)


@dataclass(frozen=True)
class Segmentation:
    """The result of `segment`.

    Attributes:
        mean_iou: mean of the classes that occur, 0 to 1.
        class_iou: of each class, 0 to 1; None for a class neither present nor predicted.
        pixel_accuracy: share of pixels that are right, 0 to 1.
        penalty: the regularisation chosen.
    """

    mean_iou: float
    class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    penalty: float


def _chunks(t: Tensor) -> tuple[Tensor, ...]:
    return torch.split(t, CHUNK)


def _check(tokens: Tensor, masks: Tensor, classes: int, ignore_index: int | None, names: tuple[str, str]) -> None:
    if tokens.ndim != 4 or 0 in tokens.shape or not tokens.is_floating_point():
        raise ValueError(
            f"{names[0]} has shape {tuple(tokens.shape)} and {tokens.dtype}; expected non-empty float [N, h, w, C]"
        )
    if masks.ndim != 3 or 0 in masks.shape or len(masks) != len(tokens):
        raise ValueError(f"{names[1]} has shape {tuple(masks.shape)}; expected [N, H, W] with N = {len(tokens)}")
    if masks.is_floating_point() or masks.dtype == torch.bool:
        raise TypeError(f"{names[1]} has dtype {masks.dtype}; accepted: integers")
    check_finite(names[0], tokens)
    check_classes(names[1], masks, classes, ignore_index)


def check_classes(name: str, masks: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise ValueError if a mask holds a class from outside 0..classes-1 that is not `ignore_index`."""
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected at least 2")
    valid = (masks >= 0) & (masks < classes)
    if ignore_index is not None:
        valid |= masks == ignore_index
    if not bool(valid.all()):
        raise ValueError(
            f"{name} holds class {int(masks[~valid][0])}; accepted: 0 to {classes - 1}, ignore_index = {ignore_index}"
        )


def patch_histograms(
    masks: Tensor, grid: tuple[int, int], classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """The share of each class in each patch, and how much of the patch counts.

    Patch (i, j) covers rows floor(i H / h) to ceil((i + 1) H / h), columns likewise, so sizes need not divide.

    Args:
        masks: integers [N, H, W], 0 to classes - 1, or ignore_index.
        grid: (h, w).
        classes: K.
        ignore_index: label of pixels that do not count.

    Returns:
        shares float32 [N, h, w, K] that sum to 1 (to 0 where nothing counts), and the counted fraction [N, h, w].
    """
    shares, counted = [], []
    for part in _chunks(masks.long()):
        keep = torch.ones_like(part, dtype=torch.bool) if ignore_index is None else part != ignore_index
        hot = one_hot(part.where(keep, 0), classes).permute(0, 3, 1, 2).float() * keep[:, None]
        pooled = adaptive_avg_pool2d(hot, grid).permute(0, 2, 3, 1)
        fraction = pooled.sum(-1)
        shares.append(pooled / fraction.clamp(min=1e-12)[..., None])
        counted.append(fraction)
    return torch.cat(shares), torch.cat(counted)


class _Moments:
    """Sums over patches, weighted by what counts, from which a ridge of any strength is solved."""

    def __init__(self, tokens: Tensor, shares: Tensor, counted: Tensor) -> None:
        channels, classes = tokens.shape[-1], shares.shape[-1]
        self.total = counted.double().sum()
        self.x = tokens.new_zeros(channels, dtype=torch.float64)
        self.y = tokens.new_zeros(classes, dtype=torch.float64)
        self.xx = tokens.new_zeros(channels, channels, dtype=torch.float64)
        self.xy = tokens.new_zeros(channels, classes, dtype=torch.float64)
        for t, s, c in zip(_chunks(tokens), _chunks(shares), _chunks(counted)):
            x, y, n = t.flatten(0, 2).double(), s.flatten(0, 2).double(), c.flatten().double()[:, None]
            self.x += (n * x).sum(0)
            self.y += (n * y).sum(0)
            self.xx += (n * x).T @ x
            self.xy += (n * x).T @ y

    def __add__(self, other: _Moments) -> _Moments:
        out = object.__new__(_Moments)
        for name in ("total", "x", "y", "xx", "xy"):
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out

    def solve(self, penalties: tuple[float, ...]) -> list[Probe]:
        """One probe for each penalty, from one eigendecomposition."""
        mean_x, mean_y = self.x / self.total, self.y / self.total
        covariance = self.xx / self.total - mean_x.outer(mean_x)
        cross = self.xy / self.total - mean_x.outer(mean_y)
        # Channels scaled to variance 1, so that the penalty means the same for every encoder and channel.
        std = covariance.diagonal().clamp(min=0).sqrt()
        scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        projected = vectors.T @ (scale[:, None] * cross)
        probes = []
        for penalty in penalties:
            weight = scale[:, None] * (vectors @ (projected / (values.clamp(min=0) + penalty)[:, None]))
            probes.append(Probe(weight, mean_y - mean_x @ weight, penalty))
        return probes


def fit_probe(
    tokens: Tensor,
    masks: Tensor,
    classes: int,
    *,
    ignore_index: int | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    held_out: float = 0.2,
) -> Probe:
    """Fit the probe by ridge regression in float64 on the device of the tokens.

    The penalty is the one with the best mIoU on a held-out part of the images (a fixed random choice; the larger
    penalty wins a tie), and the probe is then fitted on all images with it. A single penalty holds nothing out.

    Args:
        tokens: float [N, h, w, C].
        masks: integers [N, H, W], 0 to classes - 1, or ignore_index.
        classes: K, at least 2.
        ignore_index: label of pixels that do not count, such as 255.
        penalties: strengths to choose from, each above 0.
        held_out: share of images for the choice, 0 to 1; at least one image is held out and one is not.

    Raises:
        TypeError: masks that are no integers.
        ValueError: shapes that do not fit, tokens that are not finite, a class out of range, nothing but ignored
            pixels, no penalty above 0, or one image only while there is a choice to make.

    Source: regularised least squares; Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 3.4.1.
    """
    _check(tokens, masks, classes, ignore_index, ("tokens", "masks"))
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties is {penalties}; expected one or more numbers above 0")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; accepted: between 0 and 1")
    tokens, masks = tokens.detach(), masks.to(tokens.device)
    shares, counted = patch_histograms(masks, (tokens.shape[1], tokens.shape[2]), classes, ignore_index)
    if float(counted.sum()) == 0:
        raise ValueError(f"masks hold nothing but ignore_index = {ignore_index}; nothing to fit")
    if len(penalties) == 1:
        return _Moments(tokens, shares, counted).solve(penalties)[0]

    n = len(tokens)
    if n < 2:
        raise ValueError("tokens holds 1 image; expected at least 2, or a single penalty")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(tokens.device)
    cut = min(max(round(n * held_out), 1), n - 1)
    out, kept = order[:cut], order[cut:]
    fitted = _Moments(tokens[kept], shares[kept], counted[kept])
    if float(fitted.total) == 0:
        raise ValueError(f"masks hold nothing but ignore_index = {ignore_index} outside the held-out images")
    size = (masks.shape[1], masks.shape[2])
    scores = {}
    for probe in fitted.solve(penalties):
        counts = confusion(probe.predict(tokens[out], size), masks[out], classes, ignore_index)
        scores[probe.penalty] = mean_iou(counts)[0] if int(counts.sum()) else 0.0
    best = max(penalties, key=lambda p: (scores[p], p))
    return (fitted + _Moments(tokens[out], shares[out], counted[out])).solve((best,))[0]


def confusion(prediction: Tensor, target: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Counts int64 [K, K]: entry (t, p) is how many pixels of class t were taken for p.

    Args:
        prediction: integers of any shape, 0 to classes - 1.
        target: integers of the same shape, 0 to classes - 1, or ignore_index.
        classes: K.
        ignore_index: target label of pixels that do not count.

    Raises:
        ValueError: shapes that differ, or classes out of range.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; expected that of target, {tuple(target.shape)}"
        )
    check_classes("target", target, classes, ignore_index)
    check_classes("prediction", prediction, classes, None)
    prediction, target = prediction.flatten().long(), target.flatten().long()
    if ignore_index is not None:
        keep = target != ignore_index
        prediction, target = prediction[keep], target[keep]
    return torch.bincount(target * classes + prediction, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> tuple[float, tuple[float | None, ...]]:
    """Intersection over union from the counts of `confusion`: the mean, and each class.

    A class that occurs neither in the target nor in the prediction has no IoU (None) and is left out of the mean.

    Raises:
        ValueError: counts that are all zero.
    """
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - hits
    if float(union.sum()) == 0:
        raise ValueError("counts are all zero; no pixel to measure")
    each = tuple(float(h / u) if u > 0 else None for h, u in zip(hits, union))
    present = [value for value in each if value is not None]
    return sum(present) / len(present), each


def segment(
    train_tokens: Tensor,
    train_masks: Tensor,
    test_tokens: Tensor,
    test_masks: Tensor,
    classes: int,
    *,
    ignore_index: int | None = None,
) -> Segmentation:
    """Fit a probe on one set (see `fit_probe`) and measure it on another.

    Args:
        train_tokens: float [N, h, w, C].
        train_masks: integers [N, H, W].
        test_tokens: float [M, h', w', C]; another grid is fine.
        test_masks: integers [M, H', W'].
        classes: K.
        ignore_index: label of pixels that do not count.

    Raises:
        TypeError, ValueError: as `fit_probe`.
    """
    _check(test_tokens, test_masks, classes, ignore_index, ("test_tokens", "test_masks"))
    if test_tokens.shape[-1] != train_tokens.shape[-1]:
        raise ValueError(f"test_tokens has C = {test_tokens.shape[-1]}; expected {train_tokens.shape[-1]}")
    probe = fit_probe(train_tokens, train_masks, classes, ignore_index=ignore_index)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    size = (test_masks.shape[1], test_masks.shape[2])
    for tokens, masks in zip(_chunks(test_tokens), _chunks(test_masks)):
        counts += confusion(probe.predict(tokens, size).cpu(), masks.cpu(), classes, ignore_index)
    mean, each = mean_iou(counts)
    return Segmentation(mean, each, float(counts.diagonal().sum() / counts.sum()), probe.penalty)
