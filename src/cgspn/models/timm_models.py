"""The registered models under `timm.create_model`. Importing this module registers them; it needs timm.

    import timm
    import cgspn.models.timm_models  # adds cgspn_*, gspn_*, hybrid_* and vit_*_patch14_378 to timm

    model = timm.create_model("cgspn_small_patch14_378", num_classes=10)
    logits = model(images)  # any height and width that are multiples of 14
    maps = timm.create_model("cgspn_small_patch14_378", features_only=True, out_indices=(3, 7, 11))(images)

`from_encoder` turns an existing encoder, such as a distilled student, into a timm model:

    student = cgspn.models.timm_models.from_encoder(cgspn.load_encoder("runs/student"), num_classes=10)

timm (after importing this module, with `local-dir:...` or `hf-hub:...`) and `cgspn.load_encoder` can load the files
that timm's `save_for_hf` and `push_to_hf_hub` write.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

try:
    import timm
    from timm.models import build_model_with_cfg, register_model
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
    raise ImportError(
        f"cgspn.models.timm_models needs timm, and a torchvision built for your torch. It failed with: {error}. "
        "See docs/timm.md, 'Through timm.create_model'"
    ) from error

from ..layers import LearnedPositions
from .config import EncoderConfig, to_dict
from .encoder import Encoder
from .registry import list_models
from .timm_api import data_config
from .timm_blocks import TimmBlock
from .timm_config import ANY, config_of

__all__ = ["TimmEncoder", "checkpoint_filter_fn", "default_cfgs", "from_encoder"]
INPUT = ("input_size", "min_input_size", "pool_size", "mean", "std", "interpolation", "crop_mode")


class TimmEncoder(Encoder):
    """An `Encoder` with the outputs of timm's ViTs: logits [B, num_classes], or pooled without classes.

    Weights have the same names as in `Encoder`, so each can load the other's files. With pooling "" it returns the
    tokens [B, prefix + h*w, C] instead of the pooled vector, after the classifier if there is one.

    Attributes:
        dynamic_img_pad: pad images with zeros to whole patches, to the right and below.
    """

    block_type = TimmBlock
    # plain attributes, because timm writes its own record of the model there
    pretrained_cfg: Any = None
    default_cfg: Any = None

    def __init__(
        self, config: EncoderConfig, *, pooled: bool = True, drop_path_rate: float = 0.0, dynamic_img_pad: bool = False
    ) -> None:
        """Create an encoder for timm.

        Args:
            config: the encoder's config.
            pooled: False for timm's pooling "", which returns tokens instead of the pooled vector.
            drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 in the first block.
            dynamic_img_pad: see above.

        Raises ValueError for a config with inconsistent settings, or a rate outside 0 to 1.
        """
        super().__init__(config)
        self.pooled, self.dynamic_img_pad, self.drop_path_rate = pooled, dynamic_img_pad, drop_path_rate
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; accepted: from 0 to below 1")
        for i, block in enumerate(self.blocks):  # in equal steps, as in timm
            assert isinstance(block, TimmBlock)
            block.drop_path = drop_path_rate * i / max(config.depth - 1, 1)
        name = config.name if config.name in list_models() else ANY
        self.pretrained_cfg = self.default_cfg = {**data_config(config), "architecture": name}

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments that timm saves to rebuild the model: its complete current config."""
        return {"config": to_dict(self.config)} | ({} if self.pooled else {"global_pool": ""})

    @_model_args.setter
    def _model_args(self, value: Mapping[str, Any]) -> None:
        """Ignore what timm stores as creation arguments, because the getter computes them from the config."""

    @property
    def global_pool(self) -> str:
        """The pooling under timm's name: "map", "avg", "token", or "" for none."""
        return super().global_pool if self.pooled else ""

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry per block: the module whose hooks get the map [B, C, h, w], channels, and stride in pixels."""
        return [{**entry, "module": f"{entry['module']}.map"} for entry in super().feature_info]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Images [B, channels, H, W] -> logits [B, num_classes], or pooled [B, config.pooled_width] without classes."""
        return self.forward_head(self.forward_features(images, mask), mask=mask)

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Any:
        """`Encoder.embed`, after padding if `dynamic_img_pad` is set."""
        if self.dynamic_img_pad:
            patch, (height, width) = self.config.patch_size, images.shape[-2:]
            images = pad(images, (0, -width % patch, 0, -height % patch))
        return super().embed(images, mask)

    def run_block(self, block: Any, tokens: Tensor, grid: Any) -> Tensor:
        """`Encoder.run_block`; recomputation skips the same images again."""
        if self.checkpointing and self.training and self.drop_path_rate and torch.is_grad_enabled():
            return checkpoint(block, tokens, grid, use_reentrant=False)
        return super().run_block(block, tokens, grid)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor:
        """`Encoder.forward_head`; with pooling "" it is applied to every token, [B, prefix + h*w, ...]."""
        if self.pooled:
            return super().forward_head(tokens, pre_logits, mask)
        each: Tensor = self.project(self.pool_norm(tokens))
        return each if pre_logits else self.head(each)

    def forward_intermediates(  # type: ignore[override]
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """`Encoder.forward_intermediates` with timm's argument order and default result (final tokens, maps).

        output_dict: return a dict with `image_intermediates`; `image_intermediates_prefix` if prefix tokens are
        requested and exist; and `image_features`, the final tokens, unless `intermediates_only`.
        """
        found = super().forward_intermediates(
            images,
            indices,
            norm,
            return_prefix_tokens=return_prefix_tokens,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            mask=mask,
        )
        if not output_dict:
            return found
        maps, out = found if intermediates_only else found[1], {}
        if return_prefix_tokens and self.num_prefix_tokens:
            maps, out["image_intermediates_prefix"] = (list(part) for part in zip(*maps, strict=True))
        if not intermediates_only:
            out["image_features"] = found[0]
        return {"image_intermediates": maps, **out}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """`Encoder.reset_classifier`, which also accepts the pooling "": tokens instead of the pooled vector."""
        super().reset_classifier(num_classes, "avg" if global_pool == "" else global_pool)
        self.pooled = self.pooled if global_pool is None else global_pool != ""

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """`Encoder.set_input_size`, which also updates timm's records."""
        super().set_input_size(img_size, patch_size)
        record_input(self, self.config)

    def __prepare_scriptable__(self) -> nn.Module:
        """A trace for torch.jit.script instead of the Python code. It accepts all image and batch sizes."""
        weight, patch = self.input_weight, self.config.patch_size
        images = torch.zeros(2, self.in_chans, 3 * patch, 5 * patch, device=weight.device, dtype=weight.dtype)
        return Traced(torch.jit.trace(self, images, check_trace=False))


class Traced(nn.Module):
    """A traced model as a module that torch.jit.script accepts."""

    def __init__(self, program: torch.jit.ScriptModule) -> None:
        """program: maps one tensor to one tensor."""
        super().__init__()
        self.program = program

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, channels, H, W] -> the model's output."""
        return self.program(images)


def from_encoder(encoder: Encoder, num_classes: int | None = None) -> TimmEncoder:
    """Create a timm model that shares an encoder's weights, in the same train or eval mode.

    num_classes: those of a new classifier; None keeps the encoder's own, if any. Raises ValueError if negative.
    """
    with torch.device("meta"):
        model = TimmEncoder(encoder.config)
    model.load_state_dict(encoder.state_dict(keep_vars=True), assign=True)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return model.train(encoder.training)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Encoder) -> dict[str, Tensor]:
    """Convert the weights of a file for `model`: remove wrappers of training, and resize positions to the model's grid.

    Raises ValueError for positions of another grid that may not be square, since a file does not store its shape.
    """
    for wrapping in ("state_dict", "model"):
        state_dict = state_dict.get(wrapping, state_dict)
    for prefix in ("module.", "_orig_mod.", "encoder."):
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    table, positions = state_dict.get("positions.table"), model.positions
    if table is None or positions is None or len(table) == len(positions.table):
        return dict(state_dict)
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise ValueError(f"positions.table has {len(table)} rows; accepted: those of a square grid, or the model's")
    stored = LearnedPositions((side, side), model.config.width, model.config.position_resize)
    stored.table = nn.Parameter(table.float(), requires_grad=False)
    return {**state_dict, "positions.table": stored(*positions.grid).to(table.dtype)}


def _entry(name: str) -> Callable[..., Any]:
    """The function that timm calls for `name`."""

    def build(
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        drop_path_rate: float = 0.0,
        dynamic_img_pad: bool = False,
        **options: Any,
    ) -> TimmEncoder:
        config, pooled = config_of(name, options), options.get("global_pool") != ""
        with nullcontext() if device is None else torch.device(device):
            model = TimmEncoder(config, pooled=pooled, drop_path_rate=drop_path_rate, dynamic_img_pad=dynamic_img_pad)
        return model.to(dtype) if dtype else model

    def entry(pretrained: bool = False, **options: Any) -> Any:
        features = {"out_indices": 3, "feature_cls": "getter", "no_rewrite": True}
        model = build_model_with_cfg(
            build, name, pretrained, feature_cfg=features, pretrained_filter_fn=checkpoint_filter_fn, **options
        )
        record_input(model, next(m for m in model.modules() if isinstance(m, TimmEncoder)).config)
        model.pretrained_cfg |= options.get("pretrained_cfg_overlay") or {}  # the user's values take precedence
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"`{name}` of this library, as timm builds models. Raises UnknownOption for options it lacks."
    return entry


def record_input(model: Any, config: EncoderConfig) -> None:
    """Update timm's data config from the encoder, because timm recorded the defaults of the name."""
    now = {key: value for key, value in data_config(config).items() if key in INPUT}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **now}
    model._traits = {**getattr(model, "_traits", {}), "img_size": config.image_size}


def _register() -> dict[str, Any]:
    """Register all names that timm does not have, and return their default configs, as timm expects."""
    names = [name for name in (*list_models(), ANY) if not timm.is_model(name)]
    default_cfgs.update({name: data_config(config_of(name, {})) for name in names})
    for name in names:
        register_model(_entry(name))
    return default_cfgs


default_cfgs: dict[str, Any] = {}
_register()
