"""`load_encoder`: one entry for every checkpoint; the format is recognised, not asked for."""

import re
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..models.dual import DualEncoder, image_encoder
from ..models.encoder import Encoder
from ..models.reading import CheckpointError
from .formats import read_encoder
from .options import Options
from .own import is_own, load_own
from .source import locate, open_source
from .text import missing_for_text, with_text

EMBEDDED = "embedded"
_TEXT = re.compile(r"(^|\.)(text_model\.|text\.|token_embedding\.weight$)")  # keys of text towers


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int | None = None,
    submodel: str | None = None,
    **overrides: Any,
) -> Encoder | DualEncoder:
    """The encoder of a checkpoint, or the whole image-text model if it is one, in eval mode.

    Args:
        source: a weight file (.safetensors; .pt, .pth, .bin with tensors alone), a folder (this library's,
            transformers', OpenCLIP's, timm's), a hub id (`org/name`, `hf-hub:org/name`, `org/name@revision`), or
            "embedded" for the teacher that comes with the package.
        dtype: of the weights.
        heads: of attention, where neither a config beside a foreign file nor its name states them.
        submodel: the beginning of the keys of one model, such as "student", where a file of a training run holds
            several; None for the teacher or the moving average, which their authors evaluate.
        overrides: fields of `EncoderConfig` that a foreign file does not show, such as `activation="quick_gelu"`.

    Of transformers' CLIP and SigLIP the text tower comes along if transformers and the tokenizer's files are there;
    a warning says so if not. Raises CheckpointError, saying what was expected and what was found.
    """
    return _load(source, Options(dtype, heads, submodel, overrides), text=True)


def load_encoder(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int | None = None,
    submodel: str | None = None,
    **overrides: Any,
) -> Encoder:
    """The image encoder of a checkpoint, in eval mode; of an image-text model, its image side.

    Its pooled output is the family's own: the image embedding of CLIP and SigLIP, the class token of DINOv2, the
    summary tokens of RADIO. Arguments and errors as in `load_model`; no text tower is read.
    """
    return image_encoder(_load(source, Options(dtype, heads, submodel, overrides), text=False))


def _load(source: str | Path, options: Options, text: bool) -> Encoder | DualEncoder:
    options.check()
    if str(source) == EMBEDDED:
        with resources.as_file(resources.files("cgspn.teachers") / "fashion_mnist_vit") as folder:
            return load_own(open_source(folder, EMBEDDED), options, text)
    found = open_source(locate(source), str(source))
    if is_own(found):
        return load_own(found, options, text)
    try:
        encoder = read_encoder(found, options)
    except (LookupError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        kind = type(error).__name__
        raise CheckpointError(f"{source}: its configs and weights do not go together ({kind}: {error})") from error
    if not text or not any(_TEXT.search(key) for key in found.weights):
        return encoder
    reason = missing_for_text(found)
    if reason:
        warnings.warn(f"{source} comes without its text tower: {reason}", stacklevel=3)
        return encoder
    return with_text(encoder, found)


def load_embedded_teacher() -> DualEncoder:
    """The small attention image-text model that comes with the package, in eval mode.

    Trained from scratch on the embedded images; pretrain.json beside its weights holds the command, seed and losses.
    Raises CheckpointError if the installation is damaged.
    """
    model = load_model(EMBEDDED)
    assert isinstance(model, DualEncoder)
    return model
