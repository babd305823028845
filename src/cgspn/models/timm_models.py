"""The registered models under `timm.create_model`. Importing this module registers them; it needs timm.

    import timm
    import cgspn.models.timm_models  # adds cgspn_*, gspn_*, hybrid_* and vit_*_patch14_378 to timm

    model = timm.create_model("cgspn_small_patch14_378", num_classes=10)
    logits = model(images)  # any height and width that are multiples of 14
    maps = timm.create_model("cgspn_small_patch14_378", features_only=True, out_indices=(3, 7, 11))(images)

An encoder that exists already, such as a distilled student, becomes a model of timm by `from_encoder`:

    student = cgspn.models.timm_models.from_encoder(cgspn.load_encoder("runs/student"), num_classes=10)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import timm
    from timm.models import build_model_with_cfg, register_model
except ImportError as error:
    raise ImportError(f"cgspn.models.timm_models needs timm; run: pip install 'cgspn[timm]' ({error})") from error

from .config import EncoderConfig
from .encoder import Encoder
from .registry import list_models, model_config
from .timm_api import data_config

__all__ = ["TimmEncoder", "default_cfgs", "from_encoder"]
POOLINGS = {"map": "map", "avg": "mean", "token": "cls"}
REGULARISERS = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "pos_drop_rate")


class TimmEncoder(Encoder):
    """An `Encoder` that returns what a ViT of timm returns: logits [B, num_classes], or pooled without classes.

    All else is the encoder's; the weights have the same names, so each reads what the other saved.
    """

    # plain attributes, because timm writes its own record of the model there
    pretrained_cfg: Any = None
    default_cfg: Any = None

    def __init__(self, config: EncoderConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        super().__init__(config)
        self.pretrained_cfg = self.default_cfg = data_config(config)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Images [B, channels, H, W] -> logits [B, num_classes], or pooled [B, config.pooled_width] without classes."""
        return self.forward_head(self.forward_features(images, mask), mask=mask)

    def forward_intermediates(  # type: ignore[override]
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """`Encoder.forward_intermediates` with timm's order of arguments, and timm's default: (final tokens, maps)."""
        return super().forward_intermediates(
            images,
            indices,
            norm,
            return_prefix_tokens=return_prefix_tokens,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            mask=mask,
        )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """As the encoder's; timm's data config follows. Raises ValueError as there."""
        super().set_input_size(img_size, patch_size)
        _record_input(self, self.config)


def from_encoder(encoder: Encoder, num_classes: int | None = None) -> TimmEncoder:
    """An encoder's weights, shared and not copied, in a model of timm; in the mode the encoder is in.

    num_classes: of a fresh classifier; None keeps the encoder's own, if it has one. Raises ValueError if negative.
    """
    with torch.device("meta"):
        model = TimmEncoder(encoder.config)
    model.load_state_dict(encoder.state_dict(keep_vars=True), assign=True)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return model.train(encoder.training)


def _config(name: str, options: dict[str, Any]) -> EncoderConfig:
    """The config behind a name with timm's options for it. Raises ValueError for those that no encoder has."""
    for option in REGULARISERS:
        if options.pop(option, 0):
            raise ValueError(f"{option} is not 0; accepted: 0, these encoders have no dropout")
    options.pop("dynamic_img_size", None)  # always on
    own: dict[str, Any] = {}
    if "in_chans" in options:
        own["channels"] = channels = options.pop("in_chans")
        if channels != 3:
            own |= {"image_mean": (0.5,) * channels, "image_std": (0.5,) * channels}
    if "img_size" in options:
        size = options.pop("img_size")
        own["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if "global_pool" in options:
        pool = options.pop("global_pool")
        if pool not in POOLINGS:
            raise ValueError(f"global_pool is {pool!r}; accepted: {', '.join(map(repr, POOLINGS))}")
        own["pooling"] = POOLINGS[pool]
    known = {field.name for field in fields(EncoderConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        accepted = ", ".join(sorted({"in_chans", "img_size", "global_pool"} | known))
        raise ValueError(f"{name} has no {', '.join(unknown)}; accepted: {accepted}")
    return model_config(name, **own, **options)


def _entry(name: str) -> Callable[..., Any]:
    """The function that timm calls for `name`."""

    def build(**options: Any) -> TimmEncoder:
        return TimmEncoder(_config(name, options))

    def entry(pretrained: bool = False, **options: Any) -> Any:
        getter = {"out_indices": 3, "feature_cls": "getter"}
        model = build_model_with_cfg(build, name, pretrained, feature_cfg=getter, **options)
        _record_input(model, (model if isinstance(model, TimmEncoder) else model.model).config)
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"`{name}` of this library, as timm builds models. Raises ValueError for options it lacks."
    return entry


def _record_input(model: Any, config: EncoderConfig) -> None:
    """Let timm's data config follow the encoder: what timm recorded is the input of the name, not of this model."""
    now = {"input_size": (config.channels, *config.image_size), "mean": config.image_mean, "std": config.image_std}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **now}


def _register() -> dict[str, Any]:
    """Register all names that timm does not use itself; returns their default configs, where timm looks for them."""
    names = [name for name in list_models() if not timm.is_model(name)]
    default_cfgs.update({name: data_config(model_config(name)) for name in names})
    for name in names:
        register_model(_entry(name))
    return default_cfgs


default_cfgs: dict[str, Any] = {}
_register()
