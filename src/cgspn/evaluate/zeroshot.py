"""Zero-shot classification with embeddings of class names in prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data.captions import TEMPLATES, fill
from .checks import check_ids, check_matrix


def class_embeddings(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Compute one embedding per class: the normalised embeddings of its name in every template, averaged and normalised
    again.

    encode_text: function from T texts to embeddings [T, D], of any norm; called once, without gradients. class_names: K
    names. templates: texts with one `{}` for the name.

    Returns float32 [K, D], rows with norm 1. Raises ValueError if there are no names or templates, a template has no
    `{}`, or embeddings have a wrong shape or are not finite.

    Source: Radford et al., "Learning Transferable Visual Models from Natural Language Supervision", 3.1.4.
    """
    if not class_names or not templates:
        raise ValueError(f"got {len(class_names)} class_names and {len(templates)} templates; need 1 or more of each")
    texts = [fill(template, name) for name in class_names for template in templates]
    with torch.no_grad():
        embeddings = encode_text(texts).float()
    check_matrix("what encode_text returned", embeddings, "[T, D]")
    if len(embeddings) != len(texts):
        raise ValueError(f"encode_text returned {len(embeddings)} embeddings for {len(texts)} texts")
    unit = normalize(embeddings, dim=-1).view(len(class_names), len(templates), -1)
    return normalize(unit.mean(1), dim=-1)


@dataclass(frozen=True)
class Accuracy:
    """Accuracies, 0 to 1: of the nearest class by cosine (top1), and of the five nearest, 1 for five classes or fewer.

    per_class: top1 of each class, averaged over the classes that have images.
    """

    top1: float
    top5: float
    per_class: float


def accuracy(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> Accuracy:
    """Classify images by the nearest class embedding (cosine), and compute the accuracy with torchmetrics.

    image_embeddings, class_embeddings: [N, D] and [K, D], of any norm. labels: integers [N], 0 to K - 1.

    Raises TypeError for labels that are not integers, and ValueError if shapes do not match, labels are out of range,
    or embeddings are not finite.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    check_matrix("image_embeddings", image_embeddings, "[N, D]")
    check_matrix("class_embeddings", class_embeddings, "[K, D]")
    check_ids("labels", labels, len(image_embeddings), "[N]")
    if class_embeddings.shape[1] != image_embeddings.shape[1]:
        raise ValueError(
            f"class_embeddings has D = {class_embeddings.shape[1]}; "
            f"expected that of image_embeddings, {image_embeddings.shape[1]}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_embeddings):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; accepted: 0 to {len(class_embeddings) - 1}"
        )
    classes = len(class_embeddings)
    # Norms of class embeddings affect the ranking; norms of image embeddings do not.
    scores = image_embeddings.float() @ normalize(class_embeddings.float(), dim=-1).T
    labels = labels.to(scores.device)

    def share(average: Literal["micro", "none"], top_k: int = 1) -> Tensor:
        return multiclass_accuracy(scores, labels, classes, average, top_k, validate_args=False)

    # not "macro", which also counts predicted classes without images
    each = share("none")[torch.bincount(labels, minlength=classes) > 0]
    return Accuracy(float(share("micro")), float(share("micro", min(5, classes))), float(each.mean()))


def top1(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> float:
    """Compute top-1 accuracy by the nearest class embedding, 0 to 1. Arguments and errors are those of `accuracy`."""
    return accuracy(image_embeddings, class_embeddings, labels).top1
