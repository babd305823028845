"""Loading of checkpoints in any supported format, which is detected."""

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
    """Load the encoder or the image-text model of a checkpoint, in eval mode.

    Args:
        source: a weight file (.safetensors, or .pt, .pth or .bin with only tensors), a folder of this library,
            transformers, OpenCLIP or timm, a hub id (`org/name`, `hf-hub:org/name`, `org/name@revision`), or "embedded"
            for the teacher included in the package.
        dtype: dtype of the weights.
        heads: number of attention heads, if neither a config nor the file name states it.
        submodel: key prefix of the model to load, such as "student", if the file of a training run holds several
            models. None loads the teacher or the moving average, which the authors evaluate.
        overrides: fields of `EncoderConfig` that the checkpoint does not state, such as `activation="quick_gelu"`.

    For CLIP and SigLIP folders of transformers, the text tower is loaded too if transformers and the tokenizer files
    are available; otherwise a warning says what is missing. Raises CheckpointError with what was expected and what was
    found.
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
    """Load the image encoder of a checkpoint, in eval mode.

    The pooled output depends on the model family: the image embedding for CLIP and SigLIP, the class token for DINOv2,
    the summary tokens for RADIO. Arguments and errors are those of `load_model`; a text tower is not loaded.
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
        raise CheckpointError(f"{source}: its configs and weights do not match ({kind}: {error})") from error
    if not text or not any(_TEXT.search(key) for key in found.weights):
        return encoder
    reason = missing_for_text(found)
    if reason:
        warnings.warn(f"{source} comes without its text tower: {reason}", stacklevel=3)
        return encoder
    return with_text(encoder, found)


def load_embedded_teacher() -> DualEncoder:
    """Load the small attention image-text model included in the package, in eval mode.

    It was trained from scratch on the embedded images; pretrain.json beside its weights has the command, seed and
    losses.
    Raises CheckpointError if the installation is damaged.
    """
    model = load_model(EMBEDDED)
    assert isinstance(model, DualEncoder)
    return model
