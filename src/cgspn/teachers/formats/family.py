"""A family of checkpoints as a table: which of its keys make each of ours, and what its shapes say about the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...models.checkpoint import CheckpointError
from ...models.config import EncoderConfig, MixerName
from ...models.encoder import Encoder
from ..files import Stored, Weights
from ..source import Source

Take = Callable[..., Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant"}
_SIZES |= {1536: "giant", 1664: "gigantic"}
_SIXTEEN = (1152, 1280, 1408, 1664)  # widths whose heads are not 64 wide


@dataclass(frozen=True)
class Rule:
    """ours: a key of `Encoder`, "{i}" for the block. theirs: the keys that make it, in order.

    In a key of theirs, "a|b" is whichever is there, a leading "?" marks one that may be missing, and a leading "/" a
    key outside the image tower. take(config, *tensors) makes one tensor of them; None concatenates rows.
    """

    ours: str
    theirs: tuple[str, ...]
    take: Take | None = None


@dataclass(frozen=True)
class Tower:
    """The image tower of a source: its tensors by their keys below `prefix`, and its heads if the user gave them."""

    source: Source
    prefix: str
    weights: Weights
    heads: int | None = None

    def has(self, key: str) -> bool:
        """Whether the tower has this key."""
        return key in self.weights

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape. Raises CheckpointError, naming the key, if it is missing."""
        if key not in self.weights:
            raise CheckpointError(f"{self.source.name} has no {self.prefix}{key}; it is truncated")
        return self.weights[key].shape

    def find(self, key: str) -> tuple[str, Stored] | None:
        """The full key and the tensor of one entry of `Rule.theirs`."""
        for name in key.removeprefix("?").split("|"):
            full = name[1:] if name.startswith("/") else self.prefix + name
            if full in self.source.weights:
                return full, self.source.weights[full]
        return None

    def depth(self, pattern: str) -> int:
        """The number of blocks, from the highest index that `pattern` finds."""
        found = [int(m[1]) for key in self.weights if (m := re.match(pattern, key))]
        return max(found, default=-1) + 1

    def side(self, rows: int) -> int:
        """The side of a square grid of positions. Raises CheckpointError if the rows make no square."""
        side = round(rows**0.5)
        if side * side != rows:
            raise CheckpointError(f"{self.source.name} has {rows} positions, which make no square grid")
        return side


@dataclass(frozen=True)
class Family:
    """name: as users know it. anchors: keys that a tower of this family has, and no other does; "a|b" is either.

    rules: the table. config: from a tower to its EncoderConfig. ignored: keys of the tower that are no part of it.
    """

    name: str
    anchors: tuple[str, ...]
    rules: tuple[Rule, ...]
    config: Callable[[Tower], EncoderConfig]
    ignored: tuple[str, ...] = ()

    def find(self, source: Source, heads: int | None = None) -> Tower | None:
        """The tower of this family in a source, if it has one."""
        first = self.anchors[0]
        for key in source.weights:
            prefix = key.removesuffix(first)
            if prefix != key and not self.absent(source.weights, prefix):
                tower = {k.removeprefix(prefix): v for k, v in source.weights.items() if k.startswith(prefix)}
                return Tower(source, prefix, tower, heads)
        return None

    def absent(self, keys: Collection[str], prefix: str = "") -> list[str]:
        """The anchors below `prefix` that are not among the keys."""
        return [a for a in self.anchors if not any(prefix + name in keys for name in a.split("|"))]


def build(family: Family, tower: Tower, dtype: torch.dtype, overrides: dict[str, Any]) -> Encoder:
    """The encoder of a tower, in eval mode; each tensor is read, changed and let go before the next.

    Raises CheckpointError naming keys that are missing, left over, or of a shape that does not fit.
    """
    try:
        config = replace(family.config(tower), **overrides)
        with torch.device("meta"):  # no time or memory for random weights
            encoder = Encoder(config)
    except (ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{tower.source.name}, recognised as {family.name}: {error}") from error
    rules = {rule.ours: rule for rule in family.rules}
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    problems: list[str] = []
    missing: list[str] = []
    for ours, target in encoder.state_dict().items():
        block = re.match(r"blocks\.(\d+)\.", ours)
        rule = rules.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", ours))
        if rule is None:
            problems.append(f"no tensor for {ours}")
            continue
        names = [name.replace("{i}", block[1] if block else "") for name in rule.theirs]
        found = {name: tower.find(name) for name in names}
        absent = [name for name, entry in found.items() if entry is None and not name.startswith("?")]
        if absent:
            missing += [tower.prefix + name if not name.startswith("/") else name[1:] for name in absent]
            continue
        entries = [entry for entry in found.values() if entry is not None]
        used.update(full for full, _ in entries)
        try:
            tensors = [entry.read() for _, entry in entries]
            value = rule.take(config, *tensors) if rule.take else torch.cat(tensors) if tensors[1:] else tensors[0]
            tensors.clear()
            if _trim(value.shape) != _trim(target.shape):
                raise ValueError(f"{tuple(value.shape)} where {tuple(target.shape)} is expected")
            state[ours] = value.to(dtype).reshape(target.shape).contiguous()
        except (ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            problems.append(f"{', '.join(full for full, _ in entries)}: {error}")
    ignored = re.compile("|".join(family.ignored) or "(?!)")
    left = [key for key in tower.weights if tower.prefix + key not in used and not ignored.match(key)]
    if missing:
        problems.insert(0, f"missing {listed(missing)}")
    if left:
        problems.append(f"unexpected {listed([tower.prefix + key for key in left])}")
    if problems:
        raise CheckpointError(
            f"{tower.source.name} looks like {family.name} (depth {config.depth}, width {config.width}) "
            f"but does not fit: {'; '.join(problems[:6])}"
        )
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def _trim(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def listed(keys: list[str], most: int = 6) -> str:
    """Keys for a message, the first few and a count of the others."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(key.replace("|", " or ") for key in keys[:most]) + more


def grid_positions(config: EncoderConfig, table: Tensor) -> Tensor:
    """The grid's rows of a table of positions, [..., prefix + h*w, C] -> [h*w, C]."""
    return table.reshape(-1, table.shape[-1])[-_grid_rows(config) :]


def prefix_tokens(config: EncoderConfig, *tensors: Tensor) -> Tensor:
    """Class and register tokens, the last tensor's positions of them added: -> [prefix, C]."""
    width = config.width
    tokens = torch.cat([tensor.reshape(-1, width).float() for tensor in tensors[:-1]])
    table = tensors[-1].reshape(-1, width).float()
    own = len(table) - _grid_rows(config)
    tokens[:own] += table[:own]
    return tokens


def transposed(config: EncoderConfig, matrix: Tensor) -> Tensor:
    """[in, out] -> [out, in], for projections that are stored as plain parameters."""
    return matrix.T


def linear_patches(config: EncoderConfig, weight: Tensor) -> Tensor:
    """A linear patch embedding over (row, column, channel) as a convolution; one that is a convolution stays."""
    if weight.ndim == 4:
        return weight
    p = config.patch_size
    return weight.view(-1, p, p, config.channels).permute(0, 3, 1, 2)


def _grid_rows(config: EncoderConfig) -> int:
    return (config.image_size[0] // config.patch_size) * (config.image_size[1] // config.patch_size)


def both(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The rules for a weight and its bias; "{p}" in theirs stands for either."""
    with_p = theirs if "{p}" in theirs else theirs + ".{p}"
    return (
        Rule(f"{ours}.weight", (with_p.replace("{p}", "weight"),)),
        Rule(f"{ours}.bias", (with_p.replace("{p}", "bias"),)),
    )


def sizes(tower: Tower, patch: int, side: int, native: Any) -> dict[str, Any]:
    """image_size, patch_size and crop_remainder; the table of positions decides, a config may say a few pixels more."""
    pair = tuple(native) if isinstance(native, (list, tuple)) else (native, native)
    if not all(isinstance(n, int) and n // patch == side for n in pair):
        pair = (side * patch, side * patch)
    return {"image_size": pair, "patch_size": patch, "crop_remainder": any(n % patch for n in pair)}


def head_count(tower: Tower, width: int, stated: Any = None, sixteen: bool = False) -> int:
    """The number of heads, which no tensor shows: the user's, a config's, else what models of this width have.

    Raises ValueError for a width of which no model is known.
    """
    if tower.heads is not None:
        return tower.heads
    if isinstance(stated, int):
        return stated
    if width in _SIXTEEN or (sixteen and width == 1536):
        return 16
    if width % 64:
        raise ValueError(
            f"width is {width}, and no config states the number of heads; give it: load_encoder(source, heads=...)"
        )
    return width // 64


def attention_blocks(depth: int) -> tuple[MixerName, ...]:
    """The mixers of a teacher."""
    mixer: MixerName = "attention"
    return (mixer,) * depth


def title(kind: str, width: int, patch: int, image: int) -> str:
    """A name like those of timm: vit_large_patch14_clip_224."""
    return f"vit_{_SIZES.get(width, f'w{width}')}_patch{patch}_{kind}_{image}"


def normalisation(
    source: Source, mean: tuple[float, ...], std: tuple[float, ...], *, squeeze: bool = False
) -> dict[str, Any]:
    """image_mean, image_std, image_crop and image_resample: from the config beside the weights, else the family's.

    squeeze: whether the family squeezes pictures into its native size instead of cutting out their middle.
    """
    found = source.configs.get("preprocessor_config.json", {})
    clip = source.configs.get("open_clip_config.json", {}).get("preprocess_cfg", {})
    timm = source.configs.get("config.json", {}).get("pretrained_cfg", {})
    chosen_mean = found.get("image_mean") or clip.get("mean") or timm.get("mean") or mean
    chosen_std = found.get("image_std") or clip.get("std") or timm.get("std") or std
    mode = clip.get("resize_mode") or timm.get("crop_mode")
    if mode is not None:
        squeeze = mode == "squash"
    elif "do_center_crop" in found:
        squeeze = not found["do_center_crop"]
    resample = clip.get("interpolation") or timm.get("interpolation") or found.get("resample")
    return {
        "image_mean": tuple(chosen_mean),
        "image_std": tuple(chosen_std),
        "image_crop": not squeeze,
        "image_resample": "bilinear" if resample in ("bilinear", 2) else "bicubic",  # 2: as Pillow numbers them
    }
