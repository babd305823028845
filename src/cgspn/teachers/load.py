"""`load_encoder`: one entry for every checkpoint; the format is recognised, not asked for."""

from __future__ import annotations

import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import CheckpointError, read_model
from ..models.config import MODEL_TYPE, encoder_config_from_dict
from ..models.dual import DualEncoder, load_dual
from ..models.encoder import Encoder
from ..models.reading import read_json, shown
from ..models.weights import check_depth, fill
from .formats import read_encoder
from .source import locate, open_source
from .text import load_own_pretrained, missing_for_text, with_text

EMBEDDED = "embedded"
OWN = ("encoder", "dual", "pretrained_dual")


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, heads: int | None = None, **overrides: Any
) -> Encoder | DualEncoder:
    """The encoder of a checkpoint, or the whole image-text model if it is one, in eval mode.

    Args:
        source: a weight file (.safetensors; .pt, .pth, .bin with tensors alone), a folder (this library's,
            transformers', OpenCLIP's, timm's), a hub id (`org/name`, `hf-hub:org/name`, `org/name@revision`), or
            "embedded" for the teacher that comes with the package.
        dtype: of the weights of a foreign checkpoint; this library's own come as float32.
        heads: of attention, where no config lies beside a foreign file and its width is not of a known model.
        overrides: fields of `EncoderConfig` that a foreign file does not show, such as `activation="quick_gelu"`.

    Of transformers' CLIP and SigLIP the text tower comes along if transformers and the tokenizer's files are there;
    a warning says so if not. Raises CheckpointError, saying what was expected and what was found.
    """
    return _load(source, dtype, heads, overrides, text=True)


def load_encoder(
    source: str | Path, *, dtype: torch.dtype = torch.float32, heads: int | None = None, **overrides: Any
) -> Encoder:
    """The image encoder of a checkpoint, in eval mode; of an image-text model, its image side.

    Its pooled output is the family's own: the image embedding of CLIP and SigLIP, the class token of DINOv2.
    Arguments and errors as in `load_model`; no text tower is read. Source: design, section 6.
    """
    model = _load(source, dtype, heads, overrides, text=False)
    return model.image if isinstance(model, DualEncoder) else model


def _load(
    source: str | Path, dtype: torch.dtype, heads: int | None, overrides: dict[str, Any], text: bool
) -> Encoder | DualEncoder:
    if str(source) == EMBEDDED:
        return load_embedded_teacher()
    path = locate(source)
    own = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "model" in own and own.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return _load_own(path)
    found = open_source(path, str(source))
    encoder = read_encoder(found, dtype, heads, overrides)
    if not text or not any("text_model." in key for key in found.weights):
        return encoder
    reason = missing_for_text(found)
    if reason:
        warnings.warn(f"{source} comes without its text tower: {reason}", stacklevel=3)
        return encoder
    return with_text(encoder, found)


def _load_own(folder: Path) -> Encoder | DualEncoder:
    config, weights = read_model(folder)
    kind, where = config.get("model"), str(folder / "config.json")
    if kind == "dual":
        return load_dual(folder)
    if kind not in OWN:
        raise CheckpointError(f"{folder} holds a {shown(kind)} model; expected {' or '.join(map(repr, OWN))}")
    image = encoder_config_from_dict(config.get("encoder"), f"{where}: encoder")
    check_depth(image.depth, weights, str(folder))
    try:
        with torch.device("meta"):
            encoder = Encoder(image)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    if kind == "pretrained_dual":
        return load_own_pretrained(folder, encoder, weights)
    fill(encoder, weights, str(folder))
    return encoder.eval()


def load_embedded_teacher() -> DualEncoder:
    """The small attention image-text model that comes with the package, in eval mode.

    Trained from scratch on the embedded images; pretrain.json beside its weights holds the command, seed and losses.
    Raises CheckpointError if the installation is damaged.
    """
    with resources.as_file(resources.files("cgspn.teachers") / "fashion_mnist_vit") as folder:
        return load_dual(folder)
