"""Families of foreign checkpoints, one table each, and how a checkpoint's family is recognised: by its keys."""

from __future__ import annotations

import re
from typing import Any

import torch

from ...models.checkpoint import CheckpointError
from ...models.encoder import Encoder
from ..source import Source
from .choice import find_tower
from .family import Family, build, listed
from .openclip import OPENCLIP
from .timm import TIMM
from .transformers import CLIP, DINOV2, SIGLIP

FAMILIES: tuple[Family, ...] = (TIMM, OPENCLIP, CLIP, SIGLIP, DINOV2)  # SigLIP's anchors are CLIP's too: CLIP first


def read_encoder(
    source: Source, dtype: torch.dtype, heads: int | None, submodel: str | None, overrides: dict[str, Any]
) -> Encoder:
    """The image encoder of a foreign checkpoint, in eval mode. submodel: as in `find_tower`.

    Raises CheckpointError for an unknown, ambiguous or incomplete one, naming the nearest family and the keys that
    differ.
    """
    tower = find_tower(FAMILIES, source, heads, submodel)
    if tower is not None:
        return build(tower, dtype, overrides)
    keys = [re.sub(r"\.\d+\.", ".{i}.", key) for key in source.weights]
    nearest = max(FAMILIES, key=lambda family: _likeness(family, keys))
    known = ", ".join(family.name for family in FAMILIES)
    if not _likeness(nearest, keys):
        raise CheckpointError(
            f"{source.name} is none of the known kinds of checkpoint ({known}, this library's own): "
            f"its {len(keys)} keys begin with {listed(sorted(source.weights))}"
        )
    missing = [a for a in nearest.anchors if not any(key.endswith(tuple(a.split("|"))) for key in source.weights)]
    unknown = [key for key, shape in zip(source.weights, keys) if not _known(nearest, shape)]
    raise CheckpointError(
        f"{source.name} is nearest to {nearest.name}, but has no {listed(missing or list(nearest.anchors))}"
        + (f"; and it has, unexpectedly, {listed(unknown)}" if unknown else "")
        + f" ({len(keys)} keys; known kinds: {known}, this library's own)"
    )


def _known(family: Family, key: str) -> bool:
    patterns = (name.lstrip("?/") for rule in family.rules for entry in rule.theirs for name in entry.split("|"))
    return any(key == pattern or key.endswith("." + pattern) for pattern in patterns)


def _likeness(family: Family, keys: list[str]) -> int:
    """How many keys its table knows; two of a kind of block are one, and norms alone are in every model."""
    return sum(_known(family, key) for key in set(keys) if not key.startswith("norm"))
