"""Checks of foreign configs: the accepted type of every key that is read."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.config import DEEPEST, WIDEST
from ..models.reading import LONGEST, CheckpointError, shown


def _whole(value: Any, most: int = 1 << 24) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) < 1e300 and math.isfinite(value)


def _few(value: Any, each: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 16 and all(map(each, value))


def _pixels(value: Any) -> bool:
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return len(sides) <= 16 and all(side is None or _whole(side, WIDEST) for side in sides)


Kind = tuple[str, Callable[[Any], bool]]
_COUNT: Kind = ("a whole number", _whole)
_BLOCKS: Kind = (f"1 to {DEEPEST}, or a list of such", lambda v: _whole(v, DEEPEST) or _few(v, _whole))
_PIXELS: Kind = (f"pixels up to {WIDEST}, or a list or an object of such", _pixels)
_NUMBER: Kind = ("a finite number", _number)
_NUMBERS: Kind = ("a finite number, or a list of such", lambda v: _number(v) or _few(v, _number))
_OBJECT: Kind = ("an object", lambda v: isinstance(v, dict))
_TEXT: Kind = ("a text", lambda v: isinstance(v, str) and len(v) <= LONGEST)
_FLAG: Kind = ("true or false", lambda v: isinstance(v, bool))
_CODE: Kind = ("a text or a whole number", lambda v: _TEXT[1](v) or _whole(v))

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "num_heads"), _COUNT),
    **dict.fromkeys(("head_width", "projection_dim", "embed_dim", "max_position_embeddings", "vocab_size"), _COUNT),
    **dict.fromkeys(("num_hidden_layers", "layers", "depth"), _BLOCKS),
    **dict.fromkeys(("image_size", "img_size", "input_size", "size", "crop_size", "patch_size"), _PIXELS),
    **dict.fromkeys(("layer_norm_eps", "eps", "rescale_factor", "crop_pct"), _NUMBER),
    **dict.fromkeys(("image_mean", "image_std", "mean", "std"), _NUMBERS),
    **dict.fromkeys(("vision_config", "text_config", "backbone_config", "model_cfg", "vision_cfg"), _OBJECT),
    **dict.fromkeys(("preprocess_cfg", "pretrained_cfg", "model_args", "image_processor"), _OBJECT),
    **dict.fromkeys(("act_kwargs", "norm_kwargs"), _OBJECT),
    **dict.fromkeys(("architecture", "model_type", "hidden_act", "timm_model_name", "pool_type"), _TEXT),
    **dict.fromkeys(("interpolation", "resize_mode", "crop_mode"), _TEXT),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop", "quick_gelu"), _FLAG),
    "resample": _CODE,
}


def checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A foreign config without keys that are null. Raises CheckpointError naming an invalid key."""
    found: dict[str, Any] = {}
    todo = [(config, found, str(path))]
    while todo:
        given, kept, where = todo.pop()
        for key, value in given.items():
            if value is None:
                continue
            words, right = KINDS.get(key, ("", lambda _: True))
            if not right(value):
                raise CheckpointError(f"{where}: {key} is {shown(value)}; accepted: {words}")
            kept[key] = value
            if isinstance(value, dict) and key != "config":  # in an encoder's own config null is a value
                kept[key] = {}
                todo.append((value, kept[key], f"{where}: {key}"))
    return found
