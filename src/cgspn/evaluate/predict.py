"""Zero-shot classification and similarity of your own images and texts with an image-text model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.captions import TEMPLATES
from ..data.prepare import Member, Picture, open_picture, prepare_for
from ..data.sizes import Size
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from .zeroshot import class_embeddings

BATCH = 64
TEXTS = 256  # per batch


@dataclass(frozen=True, eq=False)
class Classification:
    """The classification of N images into K classes: the name of the most probable class of each image.

    probabilities: float32 [N, K]. For a model trained with a softmax (CLIP), each row sums to 1; for one trained with a
    sigmoid (SigLIP), each class has an independent probability.
    """

    labels: list[str]
    probabilities: Tensor


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarities between N images and M texts, float32 [N, M] each.

    cosine: -1 to 1. logits: the cosine with the learned scale (and the bias, for a sigmoid loss) of the model.
    probabilities: softmax of the logits over the texts for CLIP, sigmoid for SigLIP.
    """

    cosine: Tensor
    logits: Tensor
    probabilities: Tensor


def classify(
    model: DualEncoder | Encoder,
    images: Picture | Sequence[Picture],
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    size: Size = None,
) -> Classification:
    """Classify images zero-shot, with text embeddings of the class names as the classifier.

    Args:
        model: an image-text model from `load_model`, on any device.
        images: one image or a list. An image is a path, a PIL image, or an array or tensor as for
            `data.prepare.array_picture`.
        class_names: K names.
        templates: prompts with one `{}` for the class name, whose preceding article is adapted, or `{c}`, whose article
            is not.
        size: image size in pixels, a side or (height, width); None for the encoder's native size.

    Raises:
        OSError: an image is missing or damaged.
        ValueError: an encoder without a text tower, no images, no names, a text instead of a list, a template without a
            placeholder, or a size that is not a multiple of the patch size.
    """
    model = require_text(model, "model")
    for argument, given in (("class_names", class_names), ("templates", templates)):
        if isinstance(given, str):  # a string is a sequence too
            raise ValueError(f"{argument} is the text {given!r}; expected a list of texts")
    texts = class_embeddings(lambda prompts: embed_texts(model, prompts), class_names, templates)
    result = _compare(model, _embed(model, images, size), texts)
    return Classification([class_names[k] for k in result.logits.argmax(1).tolist()], result.probabilities)


def similarity(
    model: DualEncoder | Encoder, images: Picture | Sequence[Picture], texts: str | Sequence[str], *, size: Size = None
) -> Similarity:
    """Compute the similarity of each image to each text, for search in both directions.

    texts: M texts, or one; an empty one raises ValueError. Other arguments and errors are those of `classify`.
    """
    model = require_text(model, "model")
    texts = [texts] if isinstance(texts, str) else list(texts)
    return _compare(model, _embed(model, images, size), embed_texts(model, texts))


def require_text(model: DualEncoder | Encoder, name: str) -> DualEncoder:
    """The model, if it has a text tower. Otherwise raises ValueError with `name` in the message."""
    model = getattr(model, "_orig_mod", model)  # the wrapper of torch.compile only has `forward`
    if not isinstance(model, DualEncoder):
        raise ValueError(
            f"{name} is an image encoder without a text tower; expected an image-text model: a CLIP or SigLIP folder "
            "of transformers with its tokenizer, a model distilled from one, or 'embedded' (`cgspn eval segment` takes "
            "image encoders)"
        )
    return model


def embed_images(model: DualEncoder, images: Iterable[Tensor], batch_size: int = BATCH) -> Iterator[Tensor]:
    """Encode an iterable of prepared images [channels, H, W] to batches of unit vectors float32 [B, D] on the CPU.

    All images must have the same size. They are read lazily.
    """
    for pixels in stacked(images, batch_size):
        with torch.inference_mode():
            yield normalize(model.encode_image(on_device(model.image, pixels)).float(), dim=-1).cpu()


def stacked(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Stack images [channels, H, W] of one size to batches [B, channels, H, W]; the last may be smaller."""
    todo = iter(images)
    while batch := list(islice(todo, batch_size)):
        yield torch.stack(batch)


def on_device(encoder: Encoder, images: Tensor) -> Tensor:
    """Images on the device and in the dtype of an encoder's weights."""
    weight = next(encoder.parameters())
    return images.to(weight.device, weight.dtype)


@torch.inference_mode()
def embed_texts(model: DualEncoder, texts: Sequence[str]) -> Tensor:
    """Embed texts as unit vectors float32 [M, D] on the CPU. Raises ValueError for an empty text or none."""
    parts = [texts[i : i + TEXTS] for i in range(0, max(len(texts), 1), TEXTS)]
    return torch.cat([normalize(model.encode_text(part).float(), dim=-1).cpu() for part in parts])


def _embed(model: DualEncoder, images: Picture | Sequence[Picture], size: Size) -> Tensor:
    one = isinstance(images, str | Path | Image.Image | Member) or getattr(images, "ndim", 4) < 4
    pictures: list[Picture] = [images] if one else list(images)  # type: ignore[list-item,arg-type]
    if not pictures:
        raise ValueError("images is empty; expected at least one path or picture")
    prepare = prepare_for(model.image.config, size)
    return torch.cat(list(embed_images(model, (prepare(open_picture(picture)) for picture in pictures))))


def _compare(model: DualEncoder, images: Tensor, texts: Tensor) -> Similarity:
    cosine = images @ texts.T
    logits = cosine * model.logit_scale.detach().float().exp().cpu()
    if model.loss == "clip":
        return Similarity(cosine, logits, logits.softmax(-1))
    logits = logits + model.logit_bias.detach().float().cpu()
    return Similarity(cosine, logits, logits.sigmoid())
