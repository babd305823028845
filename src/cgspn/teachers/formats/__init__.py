"""Families of foreign checkpoints, with one table each. A checkpoint's family is recognised by its keys."""

import re

from ...models.checkpoint import CheckpointError
from ...models.encoder import Encoder
from ...models.weights import listed
from ..options import Options
from ..source import Source
from .choice import find_tower
from .dinov3 import DINOV3
from .family import Family, build
from .names import unsupported_reason
from .openclip import OPENCLIP
from .radio import RADIO
from .timm import TIMM
from .transformers import CLIP, DINOV2, SIGLIP

# CLIP comes first because SigLIP's anchors also occur in CLIP
FAMILIES: tuple[Family, ...] = (TIMM, OPENCLIP, RADIO, CLIP, SIGLIP, DINOV2, DINOV3)


def read_encoder(source: Source, options: Options) -> Encoder:
    """Read the encoder of a foreign checkpoint, in eval mode. Raises CheckpointError naming the most similar family."""
    for name in _stated_names(source):
        if reason := unsupported_reason(name):
            raise CheckpointError(f"{source.name} is a {name}: {reason}, which this library does not support")
    tower = find_tower(FAMILIES, source, options)
    if tower is not None:
        return build(tower, options)
    keys = [re.sub(r"\.\d+\.", ".{i}.", key) for key in source.weights]
    nearest = max(FAMILIES, key=lambda family: _likeness(family, keys))
    known = ", ".join(family.name for family in FAMILIES)
    if not _likeness(nearest, keys):
        raise CheckpointError(
            f"{source.name} is not a known kind of checkpoint ({known}, this library's own): "
            f"its {len(keys)} keys begin with {listed(source.weights)}"
        )
    missing = [a for a in nearest.anchors if not any(key.endswith(tuple(a.split("|"))) for key in source.weights)]
    unknown = [key for key, shape in zip(source.weights, keys) if not _known(nearest, shape)]
    raise CheckpointError(
        f"{source.name} is nearest to {nearest.name}, but has no {listed(missing or list(nearest.anchors))}"
        + (f"; and it has, unexpectedly, {listed(unknown)}" if unknown else "")
        + f" ({len(keys)} keys; known kinds: {known}, this library's own)"
    )


def _stated_names(source: Source) -> list[str]:
    """The architecture names in the configs next to the weights."""
    config = source.configs.get("config.json", {})
    inner = [config.get(key) for key in ("vision_config", "backbone_config")]
    clip = source.configs.get("open_clip_config.json", {}).get("model_cfg", {}).get("vision_cfg", {})
    names = [config.get("architecture"), config.get("model_type"), clip.get("timm_model_name")]
    names += [part.get(key) for part in inner if isinstance(part, dict) for key in ("architecture", "model_type")]
    return [name for name in names if isinstance(name, str)]


def _known(family: Family, key: str) -> bool:
    patterns = (name.lstrip("?/") for rule in family.rules for entry in rule.theirs for name in entry.split("|"))
    return any(key == pattern or key.endswith("." + pattern) for pattern in patterns)


def _likeness(family: Family, keys: list[str]) -> int:
    """The number of distinct keys that a family's table has too, except for norms, which occur in every model."""
    return sum(_known(family, key) for key in set(keys) if not key.startswith("norm"))
