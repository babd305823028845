"""This library's own checkpoints, as strict and as forgiving as foreign ones."""

from __future__ import annotations

from typing import Any

from ..models.config import MODEL_TYPE, encoder_config_from_dict, to_dict
from ..models.dual import DualEncoder, dual_of
from ..models.encoder import Encoder
from ..models.reading import CheckpointError, shown
from ..models.timm_config import config_of
from ..models.weights import below, check_depth, load
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
    if any(key in source.weights for key in _ANCHORS):
        if "architecture" in config:  # as timm's save_for_hf writes it
            return True
        raise CheckpointError(
            f"{source.name} holds weights of this library's own, but no config.json of it is beside them; "
            "expected the folder that save_pretrained wrote, or its model.safetensors"
        )
    return False


def load_own(source: Source, options: Options, text: bool = True) -> Encoder | DualEncoder:
    """The model of a checkpoint of this library, in eval mode.

    text: False for the image encoder alone. Raises CheckpointError for a config or weights that cannot be used.
    """
    config, where = source.configs["config.json"], f"{source.name}: config.json"
    if "architecture" in config and "model" not in config:
        config = {"model": "encoder", "encoder": _from_timm(config, where)}
    kind = config["model"]
    if kind not in KINDS:
        raise CheckpointError(f"{source.name} holds a {shown(kind)} model; expected {' or '.join(map(repr, KINDS))}")
    if options.submodel is not None:
        raise CheckpointError(f"submodel is {options.submodel!r}, but {source.name} holds one model alone")
    encoder = encoder_config_from_dict(config.get("encoder"), f"{where}: encoder")
    try:
        encoder = options.apply(encoder)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    check_depth(encoder.depth, source.weights, source.name)
    if kind == "dual" and text:
        return dual_of(config, encoder, source.weights, source.name, options.dtype)
    prefix = "image." if kind != "encoder" else ""
    if kind == "encoder" and all(key.startswith(_PREFIX) for key in source.weights):
        prefix = _PREFIX
    image = load(lambda: Encoder(encoder), below(source.weights, prefix), source.name, options.dtype)
    if kind == "encoder" or not text:
        return image
    assert source.folder is not None
    rest = {key: value for key, value in source.weights.items() if not key.startswith(prefix)}
    return pretrained_dual_of(source.folder, image, rest)


def _from_timm(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The encoder's config out of what timm's save_for_hf wrote. Raises CheckpointError for one that it is not in."""
    args, name = config.get("model_args") or {}, config["architecture"]
    try:
        return to_dict(config_of(str(name), {"num_classes": config.get("num_classes", 0), **args}))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: architecture {shown(name)} cannot be built: {error}") from error
