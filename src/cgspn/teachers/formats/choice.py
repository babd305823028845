"""The choice of an image tower in files of training runs that hold several models."""

import re
from collections.abc import Iterable, Sequence

from ...models.checkpoint import CheckpointError
from ..options import Options
from ..source import Source
from .family import Family, Tower

# The models that the authors evaluate: the teacher (DINO, iBOT, DINOv2), the moving average (timm, DeiT), I-JEPA's
# target.
_USUAL = re.compile(r"(^|[._])(teacher|ema|target_encoder)([._]|$)")
_ONLINE = re.compile(r"(^|[._])online")  # BYOL's authors evaluate the online network, not the target


def find_tower(families: Sequence[Family], source: Source, options: Options) -> Tower | None:
    """Find the image tower of a source and its family; None if it is of no known family.

    options.submodel is the prefix of the tower's keys, such as "student". None takes the only tower, or the one that is
    usually evaluated. Raises CheckpointError, naming the models, if there are several and none is usually evaluated, or
    if none has the prefix `submodel`.
    """
    found: dict[str, Family] = {}
    for family in families:
        for prefix in family.prefixes(source.weights):
            found.setdefault(prefix, family)
    if not found:
        return None
    prefix = choose(source.name, list(found), options.submodel)
    others = tuple(other for other in found if len(other) > len(prefix))
    weights = {
        key.removeprefix(prefix): value
        for key, value in source.weights.items()
        if key.startswith(prefix) and not key.startswith(others)
    }
    return Tower(source, found[prefix], prefix, weights, options)


def choose(name: str, prefixes: list[str], submodel: str | None) -> str:
    """Choose one of these key prefixes. Arguments and errors are those of `find_tower`."""
    chosen = prefixes
    if submodel is not None:
        start = submodel.rstrip(".") + "." if submodel else ""
        chosen = [p for p in prefixes if p == start or (start and f".{p}".find(f".{start}") >= 0)]
        if not chosen:
            raise CheckpointError(f"{name} has no submodel {submodel!r}; accepted: {_names(prefixes)}")
    elif len(prefixes) > 1:
        online = any(map(_ONLINE.search, prefixes))
        chosen = [p for p in prefixes if _USUAL.search(p) and not online] or prefixes
    if len(chosen) > 1:
        one = chosen[0].rstrip(".")
        raise CheckpointError(f"{name} holds {len(chosen)} models, {_names(chosen)}; choose one with submodel={one!r}")
    return chosen[0]


def _names(prefixes: Iterable[str]) -> str:
    names = [repr(prefix.rstrip(".")) for prefix in prefixes]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
