"""Everything measured about an image-text model on a labelled image set: the rows of the summary tables."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import EvalTransform, ImageSet, one_pass
from ..models.dual import DualEncoder
from .retrieval import retrieve
from .segmentation import segment
from .table import Metric
from .zeroshot import class_embeddings, top1

ZEROSHOT = (
    Metric("zeroshot", "zero-shot top-1", 100, "%", averaged=True),
    Metric("image_to_text", "image → text R@1", 100, "%", averaged=True),
    Metric("text_to_image", "text → image R@1", 100, "%", averaged=True),
)
GALLERY = 100  # images among which a caption is looked for: few captions over thousands of images say little
METRICS = (
    *ZEROSHOT,
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


def evaluate_classes(model: DualEncoder, images: ImageSet, transform: EvalTransform) -> dict[str, float]:
    """The metrics of ZEROSHOT, each 0 to 1, of images whose classes have names.

    Retrieval uses each image's caption; images whose captions are the same count as the same. Captions look for
    theirs among about GALLERY images drawn at random, and their recall is the mean over all such galleries.
    """
    return _classify(model, embed_images(model, images, transform)[0], images)


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
    return {**_classify(model, embeddings, test), "miou": parts.mean_iou}


def _classify(model: DualEncoder, embeddings: Tensor, images: ImageSet) -> dict[str, float]:
    captions = images.captions()
    distinct = list(dict.fromkeys(captions))
    with torch.inference_mode():
        texts = model.encode_text(distinct).float().cpu()
    # a caption belongs to a class, and any image of that class is what it describes
    text_class = torch.stack([images.labels[captions.index(caption)] for caption in distinct])
    # at random, since sets come sorted by class or with their classes in turns
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    galleries = []
    for chosen in order.chunk(max(1, len(images) // GALLERY)):
        labels = images.labels[chosen]
        present = torch.isin(text_class, labels)
        galleries.append(retrieve(embeddings[chosen], texts[present], labels, text_class[present]).text_to_image[1])
    return {
        "zeroshot": top1(embeddings, _classes(model, images), images.labels),
        "image_to_text": retrieve(embeddings, texts, images.labels, text_class).image_to_text[1],
        "text_to_image": sum(galleries) / len(galleries),
    }


def _classes(model: DualEncoder, images: ImageSet) -> Tensor:
    return class_embeddings(lambda texts: model.encode_text(texts).float().cpu(), images.class_names)
