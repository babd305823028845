"""Everything measured about an image-text model on an image set in memory: the rows of the demo's table."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import EvalTransform, ImageSet, one_pass
from ..models.dual import DualEncoder
from .measure import class_retrieval
from .predict import embed_texts
from .segmentation import segment
from .table import Metric
from .zeroshot import class_embeddings, top1

METRICS = (
    Metric("zeroshot", "zero-shot top-1", 100, "%", averaged=True),
    Metric("image_to_text", "image → text R@1", 100, "%", averaged=True),
    Metric("text_to_image", "text → image R@1", 100, "%", averaged=True),
    Metric("miou", "segment mIoU", 100, "%", averaged=True),
)


@torch.inference_mode()
def embed_images(model: DualEncoder, images: ImageSet, transform: EvalTransform) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] of unit length and grid tokens [N, h, w, C] of a whole image set, float32 on the CPU."""
    device = model.logit_scale.device
    embeddings, tokens = [], []
    for batch in one_pass(images, 250, transform=transform):
        output = model.image(batch.images.to(device))
        embeddings.append(torch.nn.functional.normalize(model.image_projection(output.pooled), dim=-1).float().cpu())
        tokens.append(output.tokens.float().cpu())
    return torch.cat(embeddings), torch.cat(tokens)


def evaluate_zeroshot(model: DualEncoder, images: ImageSet, transform: EvalTransform) -> float:
    """Zero-shot top-1 accuracy, 0 to 1, of a model on an image set whose classes have names."""
    embeddings, _ = embed_images(model, images, transform)
    return top1(embeddings, _classes(model, images), images.labels)


def evaluate_dual(model: DualEncoder, test: ImageSet, probe: ImageSet, transform: EvalTransform) -> dict[str, float]:
    """The metrics of METRICS, each 0 to 1.

    Args:
        model: image and text encoder, in eval mode.
        test: images that nothing was trained on.
        probe: images on which the linear segmentation probe is fitted.
        transform: how images become what the encoder takes; it must keep the frame of the image (no crop of a
            rectangular image), since masks are compared pixel by pixel.
    """
    embeddings, tokens = embed_images(model, test, transform)
    _, probe_tokens = embed_images(model, probe, transform)
    parts = segment(probe_tokens, probe.masks(), tokens, test.masks(), classes=len(test.class_names) + 1)
    return {
        "zeroshot": top1(embeddings, _classes(model, test), test.labels),
        **class_retrieval(model, embeddings, test.labels, test.class_names),
        "miou": parts.mean_iou,
    }


def _classes(model: DualEncoder, images: ImageSet) -> Tensor:
    return class_embeddings(lambda texts: embed_texts(model, texts), images.class_names)
