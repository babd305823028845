"""The conversion of timm's model arguments to an `EncoderConfig`. It does not need timm."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .config import EncoderConfig, encoder_config_from_dict
from .registry import model_config
from .timm_api import POOLS

ANY = "cgspn_encoder"  # timm name of models without a registered config, such as converted students
POOLINGS = {"": "mean", **{theirs: ours for ours, theirs in POOLS.items()}}
REGULARISERS = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "pos_drop_rate")


class UnknownOption(TypeError, ValueError):
    """An unknown keyword. It is both a TypeError, as for any function, and a ValueError, as for other settings here."""


def config_of(name: str, options: Mapping[str, Any]) -> EncoderConfig:
    """The config for timm's model arguments.

    Args:
        name: one of `cgspn.list_models()`, or `ANY`.
        options: timm's (img_size, in_chans, num_classes, global_pool, embed_dim), fields of EncoderConfig, and
            `config`, a whole config that replaces that of the name.

    timm's embed_dim is the width of the tokens; the MLP width scales with it. Raises UnknownOption, which is a
    TypeError, for an unknown keyword, and ValueError for an invalid value.
    """
    options = dict(options)
    for option in REGULARISERS:
        if options.pop(option, 0):
            raise ValueError(f"{option} is not 0; accepted: 0, these encoders have no such dropout")
    options.pop("dynamic_img_size", None)  # always on
    whole = options.pop("config", None)
    if whole is None:
        config = model_config("cgspn_small_patch14_378" if name == ANY else name)
    else:
        config = whole if isinstance(whole, EncoderConfig) else encoder_config_from_dict(whole)
    own: dict[str, Any] = {}
    channels = options.pop("in_chans", config.channels)
    if channels != config.channels:
        own |= {"channels": channels, "image_mean": (0.5,) * channels, "image_std": (0.5,) * channels}
    if "img_size" in options:
        size = options.pop("img_size")
        own["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if "global_pool" in options:
        pool = options.pop("global_pool")
        if pool not in POOLINGS:
            raise ValueError(f"global_pool is {pool!r}; accepted: {', '.join(map(repr, POOLINGS))}")
        own["pooling"] = POOLINGS[pool]
    if "embed_dim" in options:
        width = options.pop("embed_dim")
        own |= {"width": width, "mlp_hidden": round(config.mlp_hidden * width / config.width)}
    known = {field.name for field in fields(EncoderConfig)} - {"embed_dim"}
    unknown = sorted(set(options) - known)
    if unknown:
        accepted = ", ".join(sorted({"config", "embed_dim", "in_chans", "img_size", "global_pool"} | known))
        raise UnknownOption(f"{name} has no {', '.join(unknown)}; accepted: {accepted}")
    return replace(config, **own, **options)
