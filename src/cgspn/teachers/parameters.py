"""A table of inherited and new parameters after a conversion."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..models.encoder import Encoder

PARTS: dict[str, str] = {
    "patch embedding": r"patch_embed\.",
    "positions": r"positions\.",
    "class and registers": r"prefix$",
    "attention": r"blocks\.\d+\.mixer\.",  # global or window attention
    "propagation": r"blocks\.\d+\.mixer\.",
    "MLP": r"blocks\.\d+\.mlp\.",
    "norms and scales": r"blocks\.\d+\.(norm|scale)[12]\.|pre_norm\.|norm\.",
    "pooling": r"pool\.|pool_norm\.",
    "projection": r"project\.|head\.",
}


@dataclass(frozen=True)
class Part:
    """A row: a part's number of parameters in teacher and student, and how many the student inherits."""

    part: str
    teacher: int
    student: int
    inherited: int
    fresh: int


def parameter_table(teacher: Encoder, student: Encoder, inherited: Iterable[str]) -> list[Part]:
    """A `Part` for each of `PARTS` that one of the models has, and their sum, "all". inherited: tensor names."""
    before, after = _sizes(teacher), _sizes(student)
    kept = set(inherited)
    rows = []
    for part in PARTS:
        old, new = (sum(n for p, n in sizes.values() if p == part) for sizes in (before, after))
        taken = sum(n for name, (p, n) in after.items() if p == part and name in kept)
        if old or new:
            rows.append(Part(part, old, new, taken, new - taken))
    return [*rows, Part("all", *(sum(getattr(row, field.name) for row in rows) for field in fields(Part)[1:]))]


def _sizes(encoder: Encoder) -> dict[str, tuple[str, int]]:
    return {name: (_part(encoder, name), value.numel()) for name, value in encoder.named_parameters()}


def _part(encoder: Encoder, name: str) -> str:
    layer = re.match(r"blocks\.(\d+)\.mixer\.", name)
    if layer:
        return encoder.config.mixers[int(layer[1])].removeprefix("window_")
    return next(part for part, pattern in PARTS.items() if re.match(pattern, name))
