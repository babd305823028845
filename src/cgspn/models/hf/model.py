"""Encoders as models of transformers: features, classification, backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, initialization
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from ...layers import Grid
from ..encoder import Encoder, to_map
from .config import CgspnConfig

PREFIX = "encoder."


class CgspnPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the models share: an `Encoder` under `encoder`, whose weights are saved under its own names."""

    config_class = CgspnConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: CgspnConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        super().__init__(config)
        self.encoder = Encoder(config.encoder_config)
        self.gradient_checkpointing = False

    def _init_weights(self, module: nn.Module) -> None:
        """A classifier that a checkpoint lacks; the encoder has initialised everything else itself."""
        if module is self.encoder.head and isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=0.02)
            initialization.zeros_(module.bias)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As transformers' own, without the prefix of weight names, so that `cgspn.load_encoder` reads the folder."""
        state = self.state_dict() if state_dict is None else state_dict
        plain = {key.removeprefix(PREFIX): value for key, value in state.items()}
        super().save_pretrained(save_directory, *args, state_dict=plain, **kwargs)

    def run(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, keep: bool
    ) -> tuple[Tensor, Grid, tuple[Tensor, ...] | None]:
        """Images [B, channels, H, W] -> normalised tokens [B, prefix + h*w, C], their grid, and with `keep` all states.

        pixel_mask: [B, H, W], zero where a pixel is padding to the right or below.
        """
        patch = self.config.patch_size
        mask = None if pixel_mask is None else pixel_mask[:, ::patch, ::patch].bool()
        tokens, grid = self.encoder.embed(pixel_values, mask)
        states = [tokens]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.encoder.each_block():
            if recompute:  # by the function that transformers sets: it may also offload
                tokens = self._gradient_checkpointing_func(block, tokens, grid)
            else:
                tokens = self.encoder.run_block(block, tokens, grid)
            if keep:
                states.append(tokens)
        return self.encoder.norm(tokens), grid, tuple(states) if keep else None

    def _wants_states(self, output_hidden_states: bool | None) -> bool:
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)


class CgspnModel(CgspnPreTrainedModel):
    """An encoder's features: last_hidden_state [B, prefix + h*w, C] normalised, pooler_output [B, pooled width]."""

    def __init__(self, config: CgspnConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        super().__init__(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Features of normalised images of any height and width that are multiples of the patch size.

        Args:
            pixel_values: [B, channels, H, W].
            pixel_mask: [B, H, W], zero where a pixel is padding to the right or below, as the image processor gives it.
            output_hidden_states: also return the tokens before the blocks and after each, before the last LayerNorm.
            output_attentions: of no effect; a scan has no attention map, and attentions are None.

        Raises ValueError for sizes that patches do not tile.
        """
        tokens, grid, states = self.run(pixel_values, pixel_mask, self._wants_states(output_hidden_states))
        pooled = self.encoder.forward_head(tokens, pre_logits=True, mask=grid.mask)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=states)


class CgspnForImageClassification(CgspnPreTrainedModel):
    """An encoder with a classifier of config.num_labels after its pooling: logits [B, num_labels]."""

    def __init__(self, config: CgspnConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        config.encoder["num_classes"] = config.num_labels
        super().__init__(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        """Logits, and with labels [B] (or [B, num_labels] for several a picture) the loss. Else as `CgspnModel`."""
        tokens, grid, states = self.run(pixel_values, pixel_mask, self._wants_states(output_hidden_states))
        logits = self.encoder.forward_head(tokens, mask=grid.mask)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)


class CgspnBackbone(BackboneMixin, CgspnPreTrainedModel):  # type: ignore[misc]
    """Feature maps [B, C, ceil(H / patch), ceil(W / patch)] of config.out_features, for heads of transformers.

    Images of any size: those that patches do not tile are padded with zeros below and to the right.
    """

    has_attentions = False

    def __init__(self, config: CgspnConfig) -> None:
        """Raises ValueError for a config whose parts do not fit one another."""
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BackboneOutput:
        """The maps of the stages asked for. pixel_values: [B, channels, H, W], normalised."""
        patch, (height, width) = self.config.patch_size, pixel_values.shape[-2:]
        _, grid, states = self.run(pad(pixel_values, (0, -width % patch, 0, -height % patch)), None, keep=True)
        assert states is not None
        norm = self.encoder.norm if self.config.apply_layernorm else nn.Identity()
        chosen = [state for name, state in zip(self.stage_names, states, strict=True) if name in self.out_features]
        return BackboneOutput(
            feature_maps=tuple(to_map(norm(state), grid).permute(0, 3, 1, 2) for state in chosen),
            hidden_states=states if self._wants_states(output_hidden_states) else None,
        )
