"""This library's own checkpoints, as strict and as forgiving as foreign ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.checkpoint import CheckpointError
from ..models.config import MODEL_TYPE, EncoderConfig, encoder_config_from_dict
from ..models.dual import DualEncoder, dual_of
from ..models.encoder import Encoder
from .options import Options
from .source import Source
from .text import pretrained_dual_of

KINDS = ("encoder", "dual", "pretrained_dual")
_ANCHORS = ("patch_embed.projection.weight", "image.patch_embed.projection.weight")
_PREFIX = "encoder."  # that models of transformers have before an encoder's keys


def is_own(source: Source) -> bool:
    """Whether a source is a checkpoint of this library.

    Raises CheckpointError for weights of this library without the config that belongs to them.
    """
    config = source.configs.get("config.json", {})
    if "model" in config and config.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return True
    if "architecture" not in config and any(key in source.weights for key in _ANCHORS):
        raise CheckpointError(
            f"{source.name} holds weights of this library's own, but no config.json of it is beside them; "
            "expected the folder that save_pretrained wrote, or its model.safetensors"
        )
    return False


def load_own(source: Source, options: Options, text: bool = True) -> Encoder | DualEncoder:
    """The model of a checkpoint of this library, in eval mode.

    text: False for the image encoder alone. Raises CheckpointError for a config or weights that cannot be used.
    """
    config = source.configs["config.json"]
    kind = config["model"]
    if kind not in KINDS:
        raise CheckpointError(f"{source.name} holds a {kind!r} model; expected {' or '.join(map(repr, KINDS))}")
    if options.submodel is not None:
        raise CheckpointError(f"submodel is {options.submodel!r}, but {source.name} holds one model alone")
    try:
        encoder = options.apply(encoder_config_from_dict(config["encoder"]))
        state = {key: _in_dtype(stored.read(), options.dtype) for key, stored in source.weights.items()}
        if kind == "encoder" or not text:
            return _encoder(encoder, state, "image." if kind != "encoder" else "")
        if kind == "dual":
            return dual_of({**config, "encoder": encoder}, state).eval()
        assert source.folder is not None
        return pretrained_dual_of(source.folder, encoder, state)
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{source.name}: its config.json and weights cannot be used: {reason}") from error


def _encoder(config: EncoderConfig, state: Mapping[str, Tensor], prefix: str) -> Encoder:
    if not prefix and all(key.startswith(_PREFIX) for key in state):
        prefix = _PREFIX
    with torch.device("meta"):  # no time or memory for random weights
        encoder = Encoder(config)
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, assign=True)
    return encoder.eval()


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
