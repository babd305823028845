"""Conversion of a teacher to a student with propagation or window attention. All other weights are inherited."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from ..layers import PropagationConfig, value_config
from ..models.config import MixerName
from ..models.dual import DualEncoder, image_encoder
from ..models.encoder import Encoder, build_mixer
from ..models.registry import spread
from ..models.weights import listed, without_wrappers


@dataclass(frozen=True)
class Inherited:
    """The names of a student's tensors that are inherited, and of those that are newly initialised."""

    inherited: tuple[str, ...]
    fresh: tuple[str, ...]


Layers = int | Sequence[int]  # a count, or indices from 0


def student_mixers(depth: int, keep_attention: Layers = 0, window_attention: Layers = 0) -> tuple[MixerName, ...]:
    """The mixers of a student with `depth` blocks. Layers given by index are placed first, and counts are spread over
    the rest.

    Raises ValueError for an invalid or repeated index, or for more layers than the student has.
    """
    mixers: list[MixerName] = ["propagation"] * depth
    wanted: dict[str, tuple[MixerName, Layers]] = {
        "keep_attention": ("attention", keep_attention),
        "window_attention": ("window_attention", window_attention),
    }
    for name, (mixer, layers) in sorted(wanted.items(), key=lambda item: isinstance(item[1][1], int)):
        free = [i for i in range(depth) if mixers[i] == "propagation"]
        if isinstance(layers, int):
            if not 0 <= layers <= len(free):
                raise ValueError(f"{name} is {layers}; accepted: 0 to {len(free)}, or a list of layer indices")
            chosen = [free[i] for i in spread(layers, len(free))]
        else:
            if wrong := [i for i in layers if not (isinstance(i, Integral) and 0 <= i < depth)]:
                raise ValueError(f"{name} holds {wrong}; accepted: layer indices 0 to {depth - 1}")
            if twice := sorted(set(layers) - set(free)):
                raise ValueError(f"keep_attention and window_attention both hold {twice}; accepted: each layer once")
            chosen = [int(i) for i in layers]
        for i in chosen:
            mixers[i] = mixer
    return tuple(mixers)


def convert(
    encoder: Encoder | DualEncoder,
    *,
    compression: float = 18,
    value_expansion: float | None = None,
    keep_attention: Layers = 0,
    window_attention: Layers = 0,
    window: int | tuple[int, int] = 8,
    keep_positions: bool = False,
    propagation: PropagationConfig | None = None,
    share: bool = False,
    report: Callable[[Inherited], object] | None = None,
) -> Encoder:
    """Convert an attention encoder into a C-GSPN student, which inherits all other weights.

    Inherited weights: patch embedding, norms, LayerScale, MLPs, pooling head, projection, and the attention layers that
    are kept, global or windowed. New weights: the propagation mixers, and a MAP head if the teacher pools by its class
    token. Class and register tokens are removed, and distillation compares grid tokens only. Position embeddings are
    removed too if any layer propagates, unless `keep_positions` is set; their mean is added to the bias of the patch
    embedding so that the mean of the tokens does not change.

    Args:
        encoder: the attention teacher, or an image-text model that contains it; it is not modified.
        compression: s in the paper; the latent has floor(C / s) channels.
        value_expansion: number of scanned channels over all directions, as a multiple of the latent width
            (`layers.value_config`); None scans the latent itself.
        keep_attention: number of attention layers to keep, spread evenly (3 of 27 are layers 8, 17 and 26; the paper
            says how many, but not which), or their indices from 0.
        window_attention: number of layers that become window attention, spread evenly over the remaining layers, or
            their indices.
        window: rows and columns of tokens in a window, or one number for both.
        keep_positions: keep the teacher's position embeddings, resized to the grid of each image. Without them, the
            first sub-layer has to infer positions from the scan, which fails on grids of other sizes than in training.
        propagation: other settings of the propagation sub-layer; its `compression` is overridden.
        share: share tensors with the teacher instead of copying them, to save memory. Use it only if the student is
            saved and not trained, because training it would change the teacher.
        report: called with the names of the inherited tensors and of the new ones.

    Raises ValueError for a compression that leaves no channel, a layer index that is out of range or repeated, an empty
    window, values without propagation, or an encoder with a wrapper that changes the names of its weights.
    See docs/tutorial.md, "Convert".
    """
    teacher = image_encoder(encoder)
    mixers = student_mixers(teacher.config.depth, keep_attention, window_attention)
    if value_expansion is not None and propagation is not None:
        raise ValueError(f"value_expansion is {value_expansion} and propagation is given; accepted: one of them")
    if value_expansion is not None and not 0 < value_expansion < math.inf:
        raise ValueError(f"value_expansion is {value_expansion:g}; accepted: a number above 0, or None")
    propagation = replace(propagation or value_config(value_expansion), compression=compression)
    propagation.latent_width(teacher.config.width)
    config, positions = teacher.config, keep_positions or "propagation" not in mixers
    config = replace(
        config,
        name=f"{'cgspn' if 'propagation' in mixers else 'window'}_{config.name.removeprefix('vit_')}",
        mixers=mixers,
        propagation=propagation,
        window=window,
        positions=config.positions and positions,
        patch_bias=config.patch_bias or (config.positions and not positions),
        trained_sizes=(),
        class_token=False,
        registers=0,
        pooling="map" if config.pooling == "cls" else config.pooling,
        summary_tokens=(0,),
        embed_dim=None if config.pooled_width == config.width else config.pooled_width,
    )
    device = next(teacher.parameters()).device
    with torch.device("meta"):  # inherited tensors need no initialisation
        student = Encoder(config)
    for layer, block in enumerate(student.each_block()):
        if mixers[layer] == "propagation":
            block.mixer = build_mixer(config, layer).to(device)
    head = Encoder(replace(config, mixers=())).to(device)
    if config.pooling != teacher.config.pooling:
        student.pool = head.pool
    if config.embed_dim != teacher.config.embed_dim:
        student.project = head.project
    inherited = inherit(teacher, student, share=share)
    lost = [name for name, value in student.state_dict().items() if value.is_meta and device.type != "meta"]
    if lost:
        raise ValueError(f"encoder has no {listed(lost)}, or a wrapper hides them; remove it before the conversion")
    if report is not None:
        report(inherited)
    return student


@torch.no_grad()
def inherit(teacher: Encoder, student: Encoder, *, share: bool = False) -> Inherited:
    """Copy every weight of the same name and shape to the student. Returns their names. share: as in `convert`."""
    theirs, mine = without_wrappers(teacher.state_dict(), "encoder"), student.state_dict()
    twins = [name for name, value in mine.items() if name in theirs and theirs[name].shape == value.shape]
    bias = "patch_embed.projection.bias"
    if teacher.positions is not None and student.positions is None and bias in mine:
        mean = teacher.positions.table.mean(0)
        theirs = {**theirs, bias: mean + theirs[bias] if bias in theirs else mean}
        twins = list(dict.fromkeys([*twins, bias]))
    taken = {name: theirs[name].to(mine[name].dtype, copy=not share) for name in twins}
    student.load_state_dict(taken, strict=False, assign=True)
    return Inherited(tuple(twins), tuple(name for name in mine if name not in taken))


def attention_student(teacher: Encoder) -> Encoder:
    """Create the ViT student used as a baseline: a copy of the teacher with randomly initialised attention.

    See results/quality, row "ViT".
    """
    student = copy.deepcopy(teacher)
    for layer, block in enumerate(student.each_block()):
        block.mixer = build_mixer(teacher.config, layer).to(next(teacher.parameters()).device)
    return student
