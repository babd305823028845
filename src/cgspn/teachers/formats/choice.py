"""Which image tower of a file is meant, where training has left more than one model in it."""

import re
from collections.abc import Iterable, Sequence

from ...models.checkpoint import CheckpointError
from ..options import Options
from ..source import Source
from .family import Family, Tower

# What the authors of such files evaluate: the teacher (DINO, iBOT, DINOv2), the moving average (timm, DeiT), I-JEPA's.
_USUAL = re.compile(r"(^|[._])(teacher|ema|target_encoder)([._]|$)")
_ONLINE = re.compile(r"(^|[._])online")  # of BYOL, whose authors evaluate this one and not its target


def find_tower(families: Sequence[Family], source: Source, options: Options) -> Tower | None:
    """The image tower of a source with its family; None if it has none of these families.

    options.submodel is the beginning of the tower's keys, such as "student"; None for the only tower, or for the one
    that is usually evaluated. Raises CheckpointError, naming the models, if there are several and none is the usual
    one, or if none has the keys that `submodel` names.
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
    """The one of these beginnings of keys that is meant. Arguments and errors as of `find_tower`."""
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
        raise CheckpointError(
            f"{name} holds {len(chosen)} models, {_names(chosen)}; choose one, submodel={chosen[0].rstrip('.')!r}"
        )
    return chosen[0]


def _names(prefixes: Iterable[str]) -> str:
    names = [repr(prefix.rstrip(".")) for prefix in prefixes]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
