"""The description of a checkpoint family: a table that maps its keys to those of `Encoder`, and its config."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.checkpoint import CheckpointError
from ...models.config import EncoderConfig, MixerName
from ...models.encoder import Encoder
from ...models.weights import Stored, Weights, cast_like, listed
from ..options import Options
from ..source import Source
from .names import heads_of

Take = Callable[..., Tensor]
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant"}
_SIZES |= {1536: "giant", 1664: "gigantic"}


@dataclass(frozen=True)
class Rule:
    """ours: a key of `Encoder`, with "{i}" for the block. theirs: the foreign keys from which it is computed, in order.

    In a foreign key, "a|b" means whichever exists, a leading "?" marks a key that may be missing, and a leading "/" a
    key outside the image tower. take(config, *tensors) combines the tensors; None concatenates rows.
    """

    ours: str
    theirs: tuple[str, ...]
    take: Take | None = None


@dataclass(frozen=True)
class Tower:
    """The image tower of a source: its tensors by their keys below `prefix`, and the user's options."""

    source: Source
    family: Family
    prefix: str
    weights: Weights
    options: Options

    def warn_of(self, field: str, text: str) -> None:
        """Warn about a guessed field of the config, unless the user gave it."""
        if field not in self.options.overrides:
            warnings.warn(f"{self.source.name}: {text}; to change this, pass {field}=", stacklevel=7)

    def has(self, key: str) -> bool:
        """Whether the tower has this key."""
        return key in self.weights

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError, naming the key, if it is missing."""
        if key not in self.weights:
            raise CheckpointError(f"{self.source.name} has no {self.prefix}{key}; it is truncated")
        return self.weights[key].shape

    def find(self, key: str) -> tuple[str, Stored] | None:
        """The full key and the tensor of one entry of `Rule.theirs`."""
        for name in key.removeprefix("?").split("|"):
            starts = self.around() if name.startswith("/") else (self.prefix,)
            for full in (start + name.removeprefix("/") for start in starts):
                if full in self.source.weights:
                    return full, self.source.weights[full]
        return None

    def around(self) -> tuple[str, ...]:
        """The key prefixes of the modules that contain the tower, from the innermost to the whole file."""
        parts = self.prefix.removesuffix(".").split(".")
        return tuple("".join(f"{part}." for part in parts[:n]) for n in range(len(parts) - 1, -1, -1))

    def patches(self, key: str) -> tuple[int, int, int]:
        """Embedding width, input channels and patch size of a patch-embedding convolution. Raises ValueError if
        patches are not square.
        """
        shape = self.shape(key)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"{self.prefix}{key} has shape {shape}; expected [width, channels, patch, patch]")
        return shape[0], shape[1], shape[2]

    def mixers(self) -> tuple[MixerName, ...]:
        """Attention for every block; the number of blocks follows from the keys."""
        mixer: MixerName = "attention"
        blocks = next(rule.theirs[0] for rule in self.family.rules if rule.ours.startswith("blocks."))
        pattern = re.escape(blocks.partition("{i}")[0]) + r"(\d+)\."
        return (mixer,) * (max((int(m[1]) for key in self.weights if (m := re.match(pattern, key))), default=-1) + 1)

    def side(self, rows: int) -> int:
        """The side of a square position grid. Raises CheckpointError if the number of rows is not a square."""
        side = math.isqrt(rows)
        if side * side != rows:
            raise CheckpointError(f"{self.source.name} has {rows} positions, which do not form a square grid")
        return side


@dataclass(frozen=True)
class Family:
    """name: for messages. anchors: keys that identify a tower of this family; "a|b" means either.

    rules: the table. config: maps a tower to its EncoderConfig. ignored: keys of the tower that are not used.
    """

    name: str
    anchors: tuple[str, ...]
    rules: tuple[Rule, ...]
    config: Callable[[Tower], EncoderConfig]
    ignored: tuple[str, ...] = ()

    def prefixes(self, keys: Collection[str]) -> list[str]:
        """The key prefixes of the towers of this family in a file."""
        first = self.anchors[0]
        found = [key.removesuffix(first) for key in keys if key == first or key.endswith("." + first)]
        named = [anchor.split("|") for anchor in self.anchors]
        return [prefix for prefix in found if all(any(prefix + name in keys for name in names) for names in named)]


def build(tower: Tower, options: Options) -> Encoder:
    """Build the encoder in eval mode, tensor by tensor. Raises CheckpointError naming mismatched keys."""
    family = tower.family
    try:
        config = options.apply(family.config(tower))
        with torch.device("meta"):  # saves time and memory for random weights
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
            missing += [name[1:] if name.startswith("/") else tower.prefix + name for name in absent]
            continue
        entries = [entry for entry in found.values() if entry is not None]
        used.update(full for full, _ in entries)
        try:
            tensors = [entry.read() for _, entry in entries]
            value = rule.take(config, *tensors) if rule.take else torch.cat(tensors) if tensors[1:] else tensors[0]
            tensors.clear()
            if _trim(value.shape) != _trim(target.shape):
                raise ValueError(f"{tuple(value.shape)} where {tuple(target.shape)} is expected")
            where = f"{tower.source.name}: {', '.join(full for full, _ in entries)}"
            state[ours] = cast_like(value, target, options.dtype, where).reshape(target.shape).contiguous()
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
            f"but does not match: {'; '.join(problems[:6])}"
        )
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


def _trim(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def grid_positions(config: EncoderConfig, table: Tensor) -> Tensor:
    """The grid's rows of a position table, [..., prefix + h*w, C] -> [h*w, C]."""
    return table.reshape(-1, table.shape[-1])[-_grid_rows(config) :]


def prefix_tokens(config: EncoderConfig, *tensors: Tensor) -> Tensor:
    """Class and register tokens [prefix, C], plus their positions from the last tensor if it has them."""
    width = config.width
    if not config.positions:
        return torch.cat([tensor.reshape(-1, width) for tensor in tensors])
    tokens = torch.cat([tensor.reshape(-1, width).float() for tensor in tensors[:-1]])
    table = tensors[-1].reshape(-1, width).float()
    own = len(table) - _grid_rows(config)
    tokens[:own] += table[:own]
    return tokens


def transposed(config: EncoderConfig, matrix: Tensor) -> Tensor:
    """Transpose [in, out] to [out, in], for projections stored as plain parameters."""
    return matrix.T


def linear_patches(config: EncoderConfig, weight: Tensor) -> Tensor:
    """Reshape a linear patch embedding over (row, column, channel) to a convolution; convolutions are unchanged."""
    if weight.ndim == 4:
        return weight
    p = config.patch_size
    return weight.view(-1, p, p, config.channels).permute(0, 3, 1, 2)


def _grid_rows(config: EncoderConfig) -> int:
    rows, columns = config.position_grid
    return rows * columns


def both(ours: str, *theirs: str, take: Take | None = None) -> tuple[Rule, ...]:
    """The rules for a weight and its bias. A foreign name gets ".weight" and ".bias" appended, or in place of "{p}"."""

    def keys(key: str, p: str) -> str:
        return "|".join(name.replace("{p}", p) if "{p}" in name else f"{name}.{p}" for name in key.split("|"))

    return tuple(Rule(f"{ours}.{p}", tuple(keys(key, p) for key in theirs), take) for p in ("weight", "bias"))


def alike(ours: str, theirs: str, *parts: str) -> tuple[Rule, ...]:
    """The rules of `both` for layers with the same names below `ours` and `theirs`."""
    return tuple(rule for part in parts for rule in both(f"{ours}.{part}", f"{theirs}.{part}"))


def built(
    tower: Tower,
    kind: str,
    patches: tuple[int, int, int],
    rows: int,
    native: Any,
    stated: Mapping[str, Any],
    **own: Any,
) -> EncoderConfig:
    """Create a config from the fields of every family and the family's `own`. kind: for the name.

    patches: width, channels and patch size. rows: length of the position table, which determines the grid. native: the
    stated size in pixels, if any; the grid may then not be square, and pixels may be left over. stated: values of a
    config. Raises ValueError if they differ from the tensors, because the file is incomplete or of another model.
    """
    width, channels, patch = patches
    size = tuple(native) if isinstance(native, (list, tuple)) else (native, native)
    if grid_rows(native, patch) != rows:
        size = (tower.side(rows) * patch,) * 2
    fields: dict[str, Any] = {"name": title(kind, width, patch, size[0]), **own}
    fields |= {"image_size": size, "patch_size": patch, "crop_remainder": any(n % patch for n in size)}
    config = EncoderConfig(channels=channels, width=width, mixers=tower.mixers(), **fields)
    for key, field in _STATED.items():
        told, shown = stated.get(key), getattr(config, field)
        if isinstance(told, int) and told != shown:
            raise ValueError(f"its config states {key} = {told}, and its tensors show {shown}")
    return config


def grid_rows(native: Any, patch: int) -> int | None:
    """The number of patches in an image of the stated size, a number or (height, width); None if no size is stated."""
    pair = native if isinstance(native, (list, tuple)) and len(native) == 2 else (native, native)
    return math.prod(n // patch for n in pair) if all(isinstance(n, int) for n in pair) else None


_STATED = {"hidden_size": "width", "embed_dim": "width", "width": "width", "intermediate_size": "mlp_hidden"}
_STATED |= dict.fromkeys(("num_hidden_layers", "depth", "layers"), "depth")
_STATED |= {"num_channels": "channels", "in_chans": "channels", "patch_size": "patch_size"}
_STATED |= {"class_token": "class_token", "num_register_tokens": "registers", "reg_tokens": "registers"}


def head_count(
    tower: Tower, width: int, stated: Any = None, name: str = "", *, sixteen: bool = False, by_width: bool = True
) -> int:
    """The number of heads: from the user, a config, a name, or published models, since no tensor shows it.

    by_width: whether all published models of this width and kind agree. Raises ValueError if it cannot be determined.
    """
    known = tower.options.heads or (stated if isinstance(stated, int) else None)
    if known is None and (name or by_width):
        known = heads_of(name, width, sixteen=sixteen)
    if known is None:
        raise ValueError(f"width is {width}, and no config states the number of heads; pass it with heads=...")
    return known


def title(kind: str, width: int, patch: int, image: int) -> str:
    """A name in timm's style: vit_large_patch14_clip_224."""
    return f"vit_{_SIZES.get(width, f'w{width}')}_patch{patch}_{kind}_{image}"
