"""Semantic segmentation by a linear probe on frozen tokens (see probe.py), evaluated at the size of the masks.

A `Reader` may read data from disk, so that a dataset need not fit into memory.

Shapes: N images, h x w token grid, C channels, H x W masks, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .checks import check_finite
from .probe import CHUNK, PATCHES, PENALTIES, Moments, Probe, patch_histograms

Reader = Callable[[Sequence[int]], Iterator[tuple[Tensor, Tensor]]]
"""From numbers of images to batches of tokens float [N, h, w, C] and masks, integers [N, H, W], on one device; sizes
may differ from batch to batch, and images that cannot be read may be missing."""


@dataclass(frozen=True)
class Segmentation:
    """The result of `segment`.

    Attributes:
        mean_iou: mean IoU of the classes that occur, 0 to 1.
        class_iou: IoU of each class, 0 to 1; None for a class that is neither present nor predicted.
        pixel_accuracy: fraction of correct pixels, 0 to 1.
        penalty: chosen regularisation strength.
    """

    mean_iou: float
    class_iou: tuple[float | None, ...]
    pixel_accuracy: float
    penalty: float


class PixelScore:
    """Intersection over union and accuracy of pixels, summed over batches by torchmetrics' JaccardIndex."""

    def __init__(
        self,
        classes: int,
        ignore_index: int | None = None,
        device: torch.device | str = "cpu",
        scored: Sequence[int] = (),
    ) -> None:
        """classes: K. ignore_index: target label of ignored pixels. scored: classes in the mean.

        Raises ValueError for a scored class out of range.
        """
        from torchmetrics.classification import MulticlassJaccardIndex

        self.metric = MulticlassJaccardIndex(classes, average="none", ignore_index=ignore_index, validate_args=False)
        self.metric.to(device)
        self.classes, self.ignore_index, self.scored = classes, ignore_index, _scored(scored, classes)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add pixels. prediction: integers of any shape, 0 to K - 1; target: the same, or ignore_index.

        Raises ValueError if shapes differ or a target is out of range.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}; expected that of target, {tuple(target.shape)}"
            )
        check_classes("target", target, self.classes, self.ignore_index)
        if self.ignore_index is None or bool((target != self.ignore_index).any()):
            self.metric.update(prediction.to(self.metric.device), target.to(self.metric.device).long())

    def compute(self) -> tuple[float, tuple[float | None, ...], float]:
        """Return the mean IoU of the scored classes, the IoU of each class, and the pixel accuracy.

        A class that occurs neither in the target nor in the prediction has no IoU (None) and is excluded from the mean.

        Raises ValueError if no pixel was counted, or no scored class occurs.
        """
        counts = self.metric.confmat
        if int(counts.sum()) == 0:
            raise ValueError("no pixel to measure: all pixels are ignored")
        occurs = (counts.sum(0) + counts.sum(1)) > 0
        each = tuple(float(v) if o else None for v, o in zip(self.metric.compute(), occurs))
        present = [value for value in (each[k] for k in self.scored) if value is not None]
        if not present:
            raise ValueError(f"none of the scored classes {list(self.scored)} occurs; nothing to measure")
        return sum(present) / len(present), each, float(counts.diagonal().sum() / counts.sum())


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
    """Raise ValueError if a mask holds a value outside 0..classes-1 other than `ignore_index`."""
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected at least 2")
    valid = (masks >= 0) & (masks < classes)
    if ignore_index is not None:
        valid |= masks == ignore_index
    if not bool(valid.all()):
        raise ValueError(
            f"{name} holds class {int(masks[~valid][0])}; accepted: 0 to {classes - 1}, ignore_index = {ignore_index}"
        )


def fit_streamed(
    read: Reader,
    count: int,
    classes: int,
    *,
    ignore_index: int | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    folds: int = 10,
    scored: Sequence[int] = (),
) -> Probe:
    """Fit the probe by ridge regression in float64 on the device of the tokens.

    The penalty is the one with the best mean IoU of patches in cross-validation over images: probes fitted on the
    other folds classify a fixed sample of the patches of each fold (about `PATCHES` in all). The mean is over the
    scored classes, whether or not a probe predicts them, and the larger penalty wins a tie. The probe is then fitted
    on all images. Folds are a fixed random choice, and each image is read once. Folds without valid pixels are left
    out; if fewer than two are left, the largest penalty is used.

    Args:
        read: the images.
        count: N.
        classes: K, at least 2.
        ignore_index: label of pixels to ignore, such as 255.
        penalties: penalties to choose from, each above 0.
        folds: number of folds, at least 2; N if there are fewer images.
        scored: classes whose mean IoU decides; all if empty.

    Raises:
        ValueError: arguments out of range, tokens that are not finite, only ignored pixels, or a single image with
            several penalties.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties is {penalties}; expected one or more numbers above 0")
    if folds < 2:
        raise ValueError(f"folds is {folds}; expected at least 2")
    counted = _scored(scored, classes)
    if len(penalties) > 1 and count < 2:
        raise ValueError(f"the probe has {count} image to be fitted on; expected at least 2, or a single penalty")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    sample = max(1, PATCHES // count)
    parts = [_fold(read, order[first::folds], classes, ignore_index, sample) for first in range(min(folds, count))]
    valid = [part for part in parts if part is not None]
    if not valid:
        raise ValueError(f"masks hold only ignore_index = {ignore_index}; nothing to fit")
    moments = [part[0] for part in valid]
    confusion = moments[0].xx.new_zeros(len(penalties), classes, classes)
    if len(penalties) > 1 and len(valid) > 1:
        for number, (_, tokens, pixels) in enumerate(valid):
            for counts, probe in zip(confusion, reduce(add, moments[:number] + moments[number + 1 :]).solve(penalties)):
                counts += one_hot(probe.logits(tokens).argmax(-1), classes).to(pixels).T @ pixels
    both = confusion.diagonal(dim1=1, dim2=2)
    iou = both / (confusion.sum(1) + confusion.sum(2) - both).clamp(min=1e-9)
    best = max(zip(iou[:, list(counted)].mean(1).tolist(), penalties))[1]
    return reduce(add, moments).solve((best,))[0]


def _fold(
    read: Reader, numbers: Sequence[int], classes: int, ignore_index: int | None, sample: int
) -> tuple[Moments, Tensor, Tensor] | None:
    """Sums over the patches of some images; the tokens [n, C] of a sample of each image; their class pixels [n, K].

    None if no pixel is valid. Pixels are fractions of a patch, float64. The sample depends on the grid alone.
    """
    moments, kept, pixels = None, [], []
    for tokens, masks in read(numbers):
        check_finite("tokens", tokens)
        h, w, channels = tokens.shape[1:]
        fractions, counted = patch_histograms(masks, (h, w), classes, ignore_index)
        moments = moments or Moments(channels, classes, tokens.device)
        moments.add(tokens, fractions, counted)
        places = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))[:sample].to(tokens.device)
        t, f, n = (each.flatten(1, 2)[:, places].flatten(0, 1) for each in (tokens, fractions, counted[..., None]))
        kept.append(t)
        pixels.append((f * n).double())
    return (moments, torch.cat(kept), torch.cat(pixels)) if moments and float(moments.total) > 0 else None


def _scored(scored: Sequence[int], classes: int) -> Sequence[int]:
    if wrong := [k for k in scored if not 0 <= k < classes]:
        raise ValueError(f"scored holds {wrong}; accepted: classes 0 to {classes - 1}")
    return scored or range(classes)


def score_streamed(
    probe: Probe, read: Reader, count: int, classes: int, *, ignore_index: int | None = None, scored: Sequence[int] = ()
) -> Segmentation:
    """Evaluate a probe on the N = count images of a reader. scored: classes in the mean IoU; all if empty.

    Raises ValueError if all pixels are ignored.
    """
    score = PixelScore(classes, ignore_index, probe.weight.device, scored)
    for tokens, masks in read(range(count)):
        score.update(probe.predict(tokens, (masks.shape[1], masks.shape[2])), masks)
    mean, each, accuracy = score.compute()
    return Segmentation(mean, each, accuracy, probe.penalty)


def in_memory(tokens: Tensor, masks: Tensor) -> Reader:
    """A reader of tokens [N, h, w, C] and masks [N, H, W] in memory. Masks are moved to the device of the tokens."""

    def read(numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.tensor(numbers).split(CHUNK):
            yield tokens[part].detach(), masks[part].to(tokens.device)

    return read


def fit_probe(
    tokens: Tensor,
    masks: Tensor,
    classes: int,
    *,
    ignore_index: int | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    folds: int = 10,
) -> Probe:
    """Run `fit_streamed` on tensors in memory.

    Args:
        tokens: float [N, h, w, C].
        masks: integers [N, H, W], 0 to classes - 1, or ignore_index.
        classes, ignore_index, penalties, folds: as in `fit_streamed`.

    Raises:
        TypeError: masks are not integers.
        ValueError: shapes do not match, a class is out of range, or as in `fit_streamed`.
    """
    _check(tokens, masks, classes, ignore_index, ("tokens", "masks"))
    reader = in_memory(tokens, masks)
    return fit_streamed(reader, len(tokens), classes, ignore_index=ignore_index, penalties=penalties, folds=folds)


def segment(
    train_tokens: Tensor,
    train_masks: Tensor,
    test_tokens: Tensor,
    test_masks: Tensor,
    classes: int,
    *,
    ignore_index: int | None = None,
) -> Segmentation:
    """Fit a probe on one set (see `fit_streamed`) and evaluate it on another.

    Args:
        train_tokens: float [N, h, w, C].
        train_masks: integers [N, H, W].
        test_tokens: float [M, h', w', C]; the grid may differ.
        test_masks: integers [M, H', W'].
        classes: K.
        ignore_index: label of pixels to ignore.

    Raises:
        TypeError, ValueError: as in `fit_probe`.
    """
    _check(test_tokens, test_masks, classes, ignore_index, ("test_tokens", "test_masks"))
    if test_tokens.shape[-1] != train_tokens.shape[-1]:
        raise ValueError(f"test_tokens has C = {test_tokens.shape[-1]}; expected {train_tokens.shape[-1]}")
    probe = fit_probe(train_tokens, train_masks, classes, ignore_index=ignore_index)
    return score_streamed(
        probe, in_memory(test_tokens, test_masks), len(test_tokens), classes, ignore_index=ignore_index
    )
