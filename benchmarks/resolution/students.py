"""The students that are compared, by name: how each is made of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cgspn import convert
from cgspn.layers import PropagationConfig, value_config
from cgspn.models.encoder import Encoder
from cgspn.teachers import attention_student


@dataclass(frozen=True)
class Student:
    """Arguments of `cgspn.convert`; or the ViT student, whose attention starts afresh."""

    convert: dict[str, Any] = field(default_factory=dict)
    attention: bool = False

    def of(self, teacher: Encoder, seed: int) -> Encoder:
        """The student before training."""
        torch.manual_seed(1000 + seed)  # not the seed of any teacher
        return attention_student(teacher) if self.attention else convert(teacher, **{"compression": 6, **self.convert})


def values(expansion: float, **changes: Any) -> dict[str, PropagationConfig]:
    """C-GSPN with values of their own, the state a plain sum, and changes to it."""
    return {"propagation": replace(value_config(expansion), **{"normalise_state": False, **changes})}


LATENT, MEAN = PropagationConfig(), PropagationConfig(normalise_state=True)
POSITIONS: dict[str, Any] = {"keep_positions": True}
NORMALISED: dict[str, Any] = {"normalise_state": True}

# what depends on the size, one at a time
SIZE: dict[str, Student] = {
    "ViT": Student(attention=True),
    "latent": Student(),
    "latent, positions": Student(POSITIONS),
    "latent, normalised": Student({"propagation": MEAN}),
    "latent, positions, normalised": Student({"propagation": MEAN, **POSITIONS}),
    "values 6": Student(values(6)),
    "values 6, positions": Student({**values(6), **POSITIONS}),
    "values 6, normalised": Student(values(6, **NORMALISED)),
    "values 6, positions, normalised": Student({**values(6, **NORMALISED), **POSITIONS}),
    "values 6, positions, no convolution": Student({**values(6, local_kernel=0), **POSITIONS}),
    "values 6, positions, no forget gate": Student({**values(6, forget_gate=False), **POSITIONS}),
    "values 6, positions, normalised, no forget gate": Student(
        {**values(6, forget_gate=False, **NORMALISED), **POSITIONS}
    ),
    "values 6, positions, normalised, no merge norm": Student(
        {**values(6, merge_norm=False, **NORMALISED), **POSITIONS}
    ),
}
# where the capacity is
CAPACITY: dict[str, Student] = {
    "values 3 of s = 3, positions, normalised": Student({**values(3, **NORMALISED), **POSITIONS, "compression": 3}),
    "values 6 in fours, positions, normalised": Student({**values(6, channels_per_group=4, **NORMALISED), **POSITIONS}),
    "values 12, positions, normalised": Student({**values(12, **NORMALISED), **POSITIONS}),
}


# The layers that C-GSPN follows worst, worst first: errors of stage 1, values 6, mixed sizes (results/resolution).
HARD = (9, 8, 5, 10, 4, 6, 7, 3, 11, 2, 0, 1)


def hardest(count: int) -> tuple[int, ...]:
    """The `count` layers that C-GSPN follows worst."""
    return tuple(sorted(HARD[:count]))


BEST: dict[str, Any] = {**POSITIONS, **values(6, **NORMALISED)}
WINDOWS: dict[str, Any] = {"window": 8}
# from attention to C-GSPN, all with the teacher's positions; attention and windows inherit the teacher's weights
FRONTIER: dict[str, Student] = {
    "one latent": Student(POSITIONS),
    "values 3": Student({**POSITIONS, **values(3, **NORMALISED)}),
    "values 6": Student(BEST),
    "values 12": Student({**POSITIONS, **values(12, **NORMALISED)}),
    "values 24": Student({**POSITIONS, **values(24, **NORMALISED)}),
    **{f"attention in {k}": Student({**BEST, "keep_attention": hardest(k)}) for k in (1, 2, 3, 4, 6)},
    "attention in 3, values 12": Student({**POSITIONS, **values(12, **NORMALISED), "keep_attention": hardest(3)}),
    "attention in 3, spread": Student({**BEST, "keep_attention": 3}),
    "windows in 12": Student({**WINDOWS, "window_attention": 12}),
    "windows in 9, whole in 3": Student({**WINDOWS, "keep_attention": hardest(3), "window_attention": 9}),
    "windows in 9, C-GSPN in 3": Student(
        {**BEST, **WINDOWS, "window_attention": tuple(i for i in range(12) if i not in hardest(3))}
    ),
    "windows in 6, C-GSPN in 6": Student({**BEST, **WINDOWS, "window_attention": (3, 4, 6, 7, 8, 10)}),
    "windows in 6, whole in 3, C-GSPN in 3": Student(
        {**BEST, **WINDOWS, "keep_attention": hardest(3), "window_attention": (3, 4, 6, 7, 10, 11)}
    ),
}


STUDENTS = SIZE | CAPACITY | {f"frontier: {name}": student for name, student in FRONTIER.items()}
