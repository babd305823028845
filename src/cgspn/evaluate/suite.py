"""The demo's evaluation of an image-text model on images in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..data import ImageSet
from ..data.prepare import open_picture, prepare_for
from ..models.dual import DualEncoder
from .measure import class_retrieval
from .predict import embed_texts, on_device, stacked
from .segmentation import segment
from .table import Metric
from .zeroshot import class_embeddings, top1

METRICS = (
    Metric("zeroshot", "zero-shot top-1", 100, "%", averaged=True),
    Metric("text_to_image", "text → image R@1", 100, "%", averaged=True),
    Metric("miou", "segment mIoU", 100, "%", averaged=True),
)


@torch.inference_mode()
def embed_set(model: DualEncoder, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Unit embeddings [N, D] and grid tokens [N, h, w, C] of a whole image set, float32 on the CPU.

    Images are preprocessed as in `cgspn eval` and `classify`.
    """
    embeddings, tokens, prepare = [], [], prepare_for(model.image.config)
    for batch in stacked((prepare(open_picture(image)) for image in images.images), 250):
        output = model.image(on_device(model.image, batch))
        embeddings.append(normalize(model.image_projection(output.pooled).float(), dim=-1).cpu())
        tokens.append(output.tokens.float().cpu())
    return torch.cat(embeddings), torch.cat(tokens)


def evaluate_zeroshot(model: DualEncoder, images: ImageSet) -> float:
    """Zero-shot top-1 accuracy, 0 to 1, of a model on an image set whose classes have names."""
    return top1(embed_set(model, images)[0], _classes(model, images), images.labels)


def evaluate_dual(model: DualEncoder, test: ImageSet, probe: ImageSet) -> dict[str, float]:
    """The metrics of METRICS, each 0 to 1, of a model in eval mode on square images.

    probe: training images of the linear segmentation probe.
    """
    embeddings, tokens = embed_set(model, test)
    _, probe_tokens = embed_set(model, probe)
    parts = segment(probe_tokens, probe.masks(), tokens, test.masks(), classes=len(test.class_names) + 1)
    return {
        "zeroshot": top1(embeddings, _classes(model, test), test.labels),
        "text_to_image": class_retrieval(model, embeddings, test.labels, test.class_names)["text_to_image"],
        "miou": parts.mean_iou,
    }


def _classes(model: DualEncoder, images: ImageSet) -> Tensor:
    return class_embeddings(lambda texts: embed_texts(model, texts), images.class_names)
