"""Image-text models, which embed images and texts in one space."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from .checkpoint import CheckpointError, save_model
from .config import WIDEST, EncoderConfig, TextConfig, to_dict
from .encoder import Encoder
from .reading import build, checked
from .text import TextTower
from .weights import Weights, check_depth, load, saved_state

Loss = Literal["clip", "sigmoid"]
"""CLIP judges an image's texts against each other (softmax), SigLIP each pair of image and text alone (sigmoid)."""


class DualEncoder(nn.Module):
    """An image `Encoder` and a `TextTower`, each with a projection to `embed_dim`, and the scale and bias of the loss.

    logit_scale is the logarithm of the scale. A "clip" loss does not use logit_bias.
    """

    def __init__(self, image: Encoder, text: TextTower, embed_dim: int, loss: Loss = "clip") -> None:
        """embed_dim: width of the shared space. loss: the training loss, which defines the meaning of the logits."""
        super().__init__()
        self.loss: Loss = loss
        self.image, self.text = image, text
        self.image_projection = nn.Linear(image.config.pooled_width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.config.width, embed_dim, bias=False)
        # SigLIP's initial scale and bias
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    @property
    def tokenizer(self) -> Callable[..., Tensor]:
        """Convert one or more texts to token ids, int64 [N, context_length], which `encode_text` also accepts."""
        return self.text.tokenize

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a text; longer texts are truncated."""
        return self.text.context_length

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Normalised images [B, channels, H, W] -> embeddings [B, embed_dim], with unit norm if `normalize`."""
        embeddings: Tensor = self.image_projection(self.image(image).pooled)
        return unit(embeddings, dim=-1) if normalize else embeddings

    def encode_text(self, text: Sequence[str] | Tensor, normalize: bool = True) -> Tensor:
        """Texts or token ids [N, T] -> embeddings [N, embed_dim], with unit norm if `normalize`.

        Raises ValueError for an empty text.
        """
        ids = text if isinstance(text, Tensor) else self.tokenizer(text)
        embeddings: Tensor = self.text_projection(self.text(ids.to(self.logit_scale.device)))
        return unit(embeddings, dim=-1) if normalize else embeddings

    def forward(
        self, image: Tensor | None = None, text: Sequence[str] | Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return normalised embeddings of images and texts, the logit scale, and for a sigmoid loss the bias, as in
        open_clip.

        image: [B, channels, H, W]; text: texts or token ids. For an omitted input, the embedding is None.
        """
        images = None if image is None else self.encode_image(image)
        texts = None if text is None else self.encode_text(text)
        scaled = (images, texts, self.logit_scale.exp())
        return (*scaled, self.logit_bias) if self.loss == "sigmoid" else scaled

    def with_image(self, image: Encoder) -> DualEncoder:
        """Return a copy with another image encoder of the same width, which is not copied. Raises ValueError if the
        widths differ."""
        width, own_width = image.config.pooled_width, self.image.config.pooled_width
        if width != own_width:
            raise ValueError(f"image has width {width}; expected {own_width}")
        return copy.deepcopy(self, {id(self.image): image})

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors to `folder`, each atomically. Raises OSError, and the errors of
        `saved_state`.

        dtype: dtype of the stored weights.
        """
        image, text = self.image.config, self.text.config
        state = saved_state(self, lambda: build_dual(image, text, self.image_projection.out_features), dtype)
        config = {
            "model": "dual",
            "encoder": to_dict(image),
            "text": to_dict(text),
            "embed_dim": self.image_projection.out_features,
            "loss": self.loss,
        }
        save_model(folder, config, state)


def build_dual(encoder: EncoderConfig, text: TextConfig, embed_dim: int, loss: Loss = "clip") -> DualEncoder:
    """Create a DualEncoder with random weights. Raises ValueError if the configs do not match."""
    return DualEncoder(Encoder(encoder), TextTower(text), embed_dim, loss)


def dual_of(
    config: Mapping[str, Any], encoder: EncoderConfig, weights: Weights, where: str, dtype: torch.dtype = torch.float32
) -> DualEncoder:
    """Build a DualEncoder from a saved config and weights, in eval mode. Raises CheckpointError naming `where`."""
    text = build(TextConfig, config.get("text"), f"{where}: text")
    embed_dim = checked(config.get("embed_dim"), int, f"{where}: embed_dim")
    if not 1 <= embed_dim <= WIDEST:
        raise CheckpointError(f"{where}: embed_dim is {embed_dim}; accepted: 1 to {WIDEST}")
    loss = checked(config.get("loss", "clip"), Loss, f"{where}: loss")
    check_depth(encoder.depth + text.depth, weights, where)
    return load(lambda: build_dual(encoder, text, embed_dim, loss), weights, where, dtype)


def image_encoder(model: Encoder | DualEncoder) -> Encoder:
    """Return the image encoder of an image-text model, or the encoder itself."""
    return model.image if isinstance(model, DualEncoder) else model


def with_image(model: Encoder | DualEncoder, image: Encoder) -> Encoder | DualEncoder:
    """The model with another image encoder (for an encoder, that one). Raises ValueError if widths differ."""
    return model.with_image(image) if isinstance(model, DualEncoder) else image
