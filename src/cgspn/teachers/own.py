"""Loading of this library's own checkpoints."""

from typing import Any

from ..models.config import MODEL_TYPE, encoder_config_from_dict, to_dict
from ..models.dual import DualEncoder, dual_of
from ..models.encoder import Encoder
from ..models.reading import CheckpointError, shown
from ..models.timm_config import config_of
from ..models.weights import Weights, below, check_depth, load
from .formats.choice import choose
from .options import Options
from .source import Source
from .text import pretrained_dual_of

KINDS = ("encoder", "dual", "pretrained_dual")
_ANCHOR = "patch_embed.projection.weight"


def is_own(source: Source) -> bool:
    """Whether a source is a checkpoint of this library. Raises CheckpointError for such weights without a config."""
    config = source.configs.get("config.json", {})
    if "model" in config and config.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return True
    if _prefixes(source.weights):
        if "architecture" in config:  # written by timm's save_for_hf
            return True
        raise CheckpointError(
            f"{source.name} holds weights of this library's own, but no config.json of it is beside them; "
            "expected the folder that save_pretrained wrote, or its model.safetensors"
        )
    return False


def load_own(source: Source, options: Options, text: bool = True) -> Encoder | DualEncoder:
    """Load a checkpoint of this library in eval mode, with the text tower if `text`. Raises CheckpointError."""
    config, where = source.configs["config.json"], f"{source.name}: config.json"
    if "architecture" in config and "model" not in config:
        config = {"model": "encoder", "encoder": _from_timm(config, where)}
    kind = config["model"]
    if kind not in KINDS:
        raise CheckpointError(f"{source.name} holds a {shown(kind)} model; expected {' or '.join(map(repr, KINDS))}")
    found = _prefixes(source.weights)
    if options.submodel is not None and len(found) < 2:
        raise CheckpointError(f"submodel is {options.submodel!r}, but {source.name} holds only one model")
    encoder = encoder_config_from_dict(config.get("encoder"), f"{where}: encoder")
    try:
        encoder = options.apply(encoder)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    check_depth(encoder.depth, source.weights, source.name)
    prefix = choose(source.name, found, options.submodel) if found else ""
    weights = below(source.weights, prefix if kind == "encoder" else prefix.removesuffix("image."))
    if kind == "dual" and text:
        return dual_of(config, encoder, weights, source.name, options.dtype)
    own = below(weights, "image.") if kind != "encoder" else weights
    image = load(lambda: Encoder(encoder), own, source.name, options.dtype)
    if kind == "encoder" or not text:
        return image
    assert source.folder is not None
    rest = {key: value for key, value in weights.items() if not key.startswith("image.")}
    return pretrained_dual_of(source.folder, image, rest)


def _prefixes(weights: Weights) -> list[str]:
    """The key prefixes of encoders of this library, including wrappers of training."""
    found = [key.removesuffix(_ANCHOR) for key in weights if f".{key}".endswith(f".{_ANCHOR}")]
    return [prefix for prefix in found if f"{prefix}blocks.0.norm1.weight" in weights]


def _from_timm(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The encoder's config in a config.json of timm's save_for_hf. Raises CheckpointError if it has none."""
    args, name = config.get("model_args") or {}, config["architecture"]
    try:
        return to_dict(config_of(str(name), {"num_classes": config.get("num_classes", 0), **args}))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: architecture {shown(name)} cannot be built: {error}") from error
