"""Classification with frozen features: a linear classifier in closed form, and nearest neighbours.

Neither has a learning rate, epochs or seed, so a comparison depends only on the features. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..data.labelled import LabelledPictures, labels_of
from ..data.prepare import prepare_for
from ..data.sizes import Size
from ..data.skipped import Skipped
from ..models.encoder import Encoder
from .checks import check_ids, check_matrix
from .measure import MAX_SKIPPED, Watch, encode_pictures
from .predict import on_device, stacked

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Strengths of regularisation tried, relative to the variance of the features (which is 1 after scaling)."""


@dataclass(frozen=True)
class Recognition:
    """Accuracies on test images, 0 to 1, of a linear classifier and of nearest neighbours."""

    linear: float
    nearest: float


def recognition(
    encoder: Encoder,
    train: LabelledPictures,
    test: LabelledPictures,
    *,
    size: Size = None,
    pooled: bool = False,
    batch_size: int = 64,
    watch: Watch | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> Recognition:
    """Fit a linear and a nearest-neighbour classifier on the features of training images and evaluate them on test
    images.

    Args:
        encoder: in eval mode, on any device.
        train, test: labelled images of the same classes.
        size: image size in pixels, a side or (height, width); None for the encoder's native size.
        pooled: use the encoder's pooled vector (the class feature) in addition to the mean of the grid tokens.
        batch_size: images per batch.
        watch: progress callback, called once for each image of both sets.
        max_skipped: largest tolerated fraction of unreadable images in each set.

    Raises ValueError for a size that patches do not tile, or if too many images cannot be read.
    """
    parts: list[Tensor] = []
    for pictures in (train, test):
        features, kept, _ = picture_features(
            encoder, pictures, size=size, pooled=pooled, batch_size=batch_size, watch=watch, max_skipped=max_skipped
        )
        parts += [features, labels_of(pictures, kept)]
    known, labels, asked, truth = parts
    return Recognition(linear_accuracy(known, labels, asked, truth), nearest_accuracy(known, labels, asked, truth))


def picture_features(
    encoder: Encoder,
    pictures: LabelledPictures,
    *,
    size: Size = None,
    pooled: bool = False,
    batch_size: int = 64,
    watch: Watch | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> tuple[Tensor, list[int], Skipped]:
    """The mean grid token of each image, float32 [n, C] on the CPU, with indices and report as in `encode_pictures`.

    With `pooled`, the pooled vector is appended, both with unit norm. Arguments and errors are those of `recognition`.
    """

    def features(images: Iterator[Tensor]) -> Iterator[Tensor]:
        for pixels in stacked(images, batch_size):
            with torch.inference_mode():
                out = encoder(on_device(encoder, pixels))
                mean = out.tokens.float().mean((1, 2))
                whole = [normalize(mean, dim=-1), normalize(out.pooled.float(), dim=-1)] if pooled else [mean]
                yield torch.cat(whole, 1).cpu()

    prepare = prepare_for(encoder.config, size)
    return encode_pictures(features, prepare, pictures.pictures, pictures.name, watch, max_skipped)


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, penalties: Sequence[float] = PENALTIES
) -> float:
    """Fit a ridge regression from features to classes and return its accuracy on test features, 0 to 1.

    The penalty is the one with the best leave-one-out accuracy on the training features, which has a closed form. In a
    tie, the larger penalty is used.

    Args:
        train: [N, C]. train_labels: integers [N], from 0.
        test: [M, C]. test_labels: integers [M]; a class without training features is never predicted.
        penalties: penalties to choose from, each above 0.

    Raises:
        TypeError: labels are not integers.
        ValueError: shapes do not match, features are not finite, labels are negative, or penalties are wrong.

    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 3.4.1 and 7.10.
    """
    _check(train, train_labels, test, test_labels)
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties is {tuple(penalties)}; expected one or more numbers above 0")
    x, labels = train.double(), train_labels.to(train.device)
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)  # channels that vary only by rounding are ignored
    y = one_hot(labels.long()).double()
    centre = y.mean(0)
    u, s, v = torch.linalg.svd((x - mean) * scale, full_matrices=False)
    projected = u.T @ (y - centre)
    best, weight = -1.0, torch.zeros_like(y[:0])
    for penalty in sorted(penalties):
        shrink = s.square() / (s.square() + len(x) * penalty)
        lever = 1 / len(x) + (u.square() * shrink).sum(1)
        fitted = centre + u @ (shrink[:, None] * projected)
        left_out = y - (y - fitted) / (1 - lever).clamp(min=1e-9)[:, None]
        share = float((left_out.argmax(1) == labels).double().mean())
        if share >= best:
            best, weight = share, v.T @ ((shrink / s.clamp(min=1e-12))[:, None] * projected)
    logits = ((test.double() - mean) * scale) @ weight + centre
    return float((logits.argmax(1) == test_labels.to(logits.device)).double().mean())


def nearest_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    neighbours: int = 10,
    temperature: float = 0.07,
) -> float:
    """Classify test features by a vote of the nearest training features and return the accuracy, 0 to 1.

    Args:
        train, train_labels, test, test_labels: as in `linear_accuracy`.
        neighbours: number of nearest neighbours by cosine; all training features if there are fewer.
        temperature: the weight of a vote is exp(cosine / temperature).

    Raises TypeError and ValueError like `linear_accuracy`, and ValueError for neighbours or a temperature out of range.
    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4.
    """
    _check(train, train_labels, test, test_labels)
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours is {neighbours}, temperature {temperature}; expected 1 or more, and above 0")
    known, asked = normalize(train.double(), dim=-1), normalize(test.double(), dim=-1)
    cosine, near = (asked @ known.T).topk(min(neighbours, len(known)), 1)
    labels = train_labels.to(near.device).long()
    votes = asked.new_zeros(len(asked), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[near], ((cosine - cosine[:, :1]) / temperature).exp())
    return float((votes.argmax(1) == test_labels.to(votes.device)).double().mean())


def _check(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    for name, features, labels, letter in (("train", train, train_labels, "N"), ("test", test, test_labels, "M")):
        check_matrix(name, features, f"[{letter}, C]")
        check_ids(f"{name}_labels", labels, len(features), f"[{letter}]")
        if int(labels.min()) < 0:
            raise ValueError(f"{name}_labels holds {int(labels.min())}; accepted: 0 or more")
    if test.shape[1] != train.shape[1]:
        raise ValueError(f"test has C = {test.shape[1]}; expected that of train, {train.shape[1]}")
