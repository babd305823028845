"""The registry of models, with names like timm's: `vit_so400m_patch14_378`, `cgspn_so400m_patch14_378`."""

import difflib
import fnmatch
from dataclasses import replace
from typing import Any

from ..layers import GSPN, AttentionConfig, PropagationConfig
from .config import EncoderConfig, MixerName
from .encoder import Encoder

# Width, depth, heads, MLP width, and the compression: it gives a latent of 64 channels if the width allows, as in the
# paper; for small widths s = 18 would leave too few (docs/choosing.md, "How large a latent").
SIZES: dict[str, tuple[int, int, int, int, float]] = {
    "mini": (96, 4, 3, 384, 3),  # of the demo, for the embedded images
    "tiny": (192, 12, 3, 768, 6),
    "small": (384, 12, 6, 1536, 6),
    "base": (768, 12, 12, 3072, 12),
    "large": (1024, 24, 16, 4096, 16),
    "so400m": (1152, 27, 16, 4304, 18),
}


def spread(keep: int, depth: int) -> tuple[int, ...]:
    """Indices of `keep` evenly spaced layers of `depth` (3 of 27: 8, 17, 26). Raises ValueError if keep > depth."""
    if not 0 <= keep <= depth:
        raise ValueError(f"keep_attention is {keep}; accepted: 0 to {depth}, or a list of layer indices")
    return tuple((i + 1) * depth // keep - 1 for i in range(keep))


def _mixers(depth: int, attention: tuple[int, ...], others: MixerName = "propagation") -> tuple[MixerName, ...]:
    return tuple("attention" if i in attention else others for i in range(depth))


def _configs() -> dict[str, EncoderConfig]:
    configs: dict[str, EncoderConfig] = {}
    for size, (width, depth, heads, hidden, compression) in SIZES.items():
        patch, side = (4, 28) if size == "mini" else (14, 378)
        base = EncoderConfig(
            image_size=(side, side),
            patch_size=patch,
            width=width,
            mixers=_mixers(depth, tuple(range(depth))),
            mlp_hidden=hidden,
            attention=AttentionConfig(heads=heads),
        )
        ninth = spread(max(1, depth // 9), depth)
        cgspn = replace(base, positions=False, propagation=PropagationConfig(compression=compression))
        family = {
            "vit": base,
            "cgspn": replace(cgspn, mixers=_mixers(depth, ())),
            "gspn": replace(cgspn, mixers=_mixers(depth, ()), propagation=GSPN),
            "hybrid": replace(cgspn, mixers=_mixers(depth, ninth)),
            "window": replace(base, mixers=_mixers(depth, ninth, "window_attention")),
        }
        for kind, config in family.items():
            name = f"{kind}_{size}_patch{patch}_{side}"
            configs[name] = replace(config, name=name)
    return configs


_CONFIGS = _configs()


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names that `create_model` accepts. `vit_*` use attention, `cgspn_*` C-GSPN, `gspn_*` the
    original GSPN, `hybrid_*` C-GSPN with attention in 1/9 of the layers, and `window_*` window attention (8 x 8 tokens)
    with global attention in 1/9 of the layers.

    pattern: filter with `*` and `?` as in file names.
    """
    return sorted(fnmatch.filter(_CONFIGS, pattern))


def model_config(name: str, **overrides: Any) -> EncoderConfig:
    """Return the config of a named model, with overridden fields of EncoderConfig.

    Raises ValueError for an unknown field or an unknown name, with suggestions.
    """
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS, 3, 0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"model is {name!r}, which does not exist{hint} (`cgspn.list_models()` names all)")
    unknown = [key for key in overrides if key not in EncoderConfig.__dataclass_fields__]
    if unknown:
        fields = ", ".join(EncoderConfig.__dataclass_fields__)
        raise ValueError(f"create_model has no {', '.join(unknown)}; accepted: {fields}")
    return replace(_CONFIGS[name], **overrides)


def create_model(name: str, **overrides: Any) -> Encoder:
    """Create an encoder with random weights by its name, one of `list_models()`.

    overrides: fields of `EncoderConfig`, such as `image_size=(518, 518)`. Raises ValueError like `model_config`.
    """
    return Encoder(model_config(name, **overrides))
