"""Teacher to student: the same encoder with propagation in place of attention, everything else inherited."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..layers import PropagationConfig
from ..models.config import EncoderConfig
from ..models.encoder import Encoder
from ..models.registry import spread


@dataclass(frozen=True)
class Inherited:
    """Which of a student's parameters start from its teacher: names, and the count of values on either side."""

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]


def student_config(
    teacher: EncoderConfig,
    *,
    compression: float = 18,
    keep_attention: int | Sequence[int] = 0,
    propagation: PropagationConfig | None = None,
) -> EncoderConfig:
    """The config of the student that `convert` makes. Arguments and errors as there."""
    depth = teacher.depth
    kept = spread(keep_attention, depth) if isinstance(keep_attention, int) else tuple(keep_attention)
    wrong = [i for i in kept if not 0 <= i < depth]
    if wrong:
        raise ValueError(f"keep_attention holds {wrong}; accepted: layer indices 0 to {depth - 1}")
    propagation = replace(propagation or PropagationConfig(), compression=compression)
    propagation.latent_width(teacher.width)
    return replace(
        teacher,
        name=f"cgspn_{teacher.name.removeprefix('vit_')}",
        mixers=tuple("attention" if i in kept else "propagation" for i in range(depth)),
        propagation=propagation,
        positions=False,
        class_token=False,
        registers=0,
        pooling="map" if teacher.pooling == "cls" else teacher.pooling,
    )


def convert(
    encoder: Encoder,
    *,
    compression: float = 18,
    keep_attention: int | Sequence[int] = 0,
    propagation: PropagationConfig | None = None,
) -> Encoder:
    """A C-GSPN student of `encoder`: attention sub-layers become propagation, the rest starts from the teacher's.

    Inherited: patch embedding, norms, LayerScale, MLPs, pooling head, and attention where it is kept. Fresh: the
    propagation mixers, and a pooling head if the teacher pools by a class token, which a pure grid does not have.
    The teacher's learned positions are dropped; their mean goes into the bias of the patch embedding, so that the
    first block sees tokens centred as before.

    Args:
        encoder: the attention teacher; it is not changed.
        compression: s; the scan runs on floor(C / s) channels.
        keep_attention: how many attention layers stay, spread evenly, or their indices.
        propagation: other settings of the propagation sub-layer; its `compression` is overridden.

    Raises ValueError for a compression that leaves no channel or a layer that does not exist.
    Source: design, section 4 ("weights that have a twin in the teacher start from the teacher's").
    """
    config = student_config(
        encoder.config, compression=compression, keep_attention=keep_attention, propagation=propagation
    )
    if encoder.positions is not None:
        config = replace(config, patch_bias=True)
    student = Encoder(config).to(next(encoder.parameters()).device)
    inherit(encoder, student)
    return student


@torch.no_grad()
def inherit(teacher: Encoder, student: Encoder) -> Inherited:
    """Copy every weight of the student that has a twin of the same name and shape in the teacher; returns which.

    Kept mixers count as twins only where both are attention. Raises nothing.
    """
    theirs, mine = teacher.state_dict(), student.state_dict()
    twins = [name for name, value in mine.items() if name in theirs and theirs[name].shape == value.shape]
    for name in twins:  # in place: a copy of the teacher in between would double what a large one takes
        mine[name].copy_(theirs[name])
    if teacher.positions is not None and student.positions is None:
        bias = student.patch_embed.projection.bias
        if bias is not None:
            own = teacher.patch_embed.projection.bias
            bias.copy_(teacher.positions.table.mean(0) + (0 if own is None else own))
    return Inherited(tuple(twins), tuple(name for name in mine if name not in twins))


def attention_student(teacher: Encoder) -> Encoder:
    """The ViT-to-ViT baseline: everything as in the teacher but the attention mixers, which start afresh.

    Raises nothing. Source: design, section 5 ("ViT = attention re-initialised").
    """
    student = copy.deepcopy(teacher)
    for fresh, block in zip(Encoder(teacher.config).each_block(), student.each_block(), strict=True):
        block.mixer = fresh.mixer.to(next(teacher.parameters()).device)
    return student
