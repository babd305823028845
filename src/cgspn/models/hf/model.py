"""Encoders as transformers models for features and classification, and as backbone."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, initialization
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from ...layers import AttentionMixer, Block, Grid
from ...layers.window_attention import order, window_of
from ..card import write_card
from ..encoder import Encoder, to_map
from ..timm_api import build_head
from ..weights import without_wrappers
from .config import CgspnConfig

Maps = tuple[Tensor, ...] | None


class CgspnBlock(GradientCheckpointingLayer, Block):  # type: ignore[misc]
    """A block that supports transformers' gradient checkpointing."""


class CgspnEncoder(Encoder):
    """An `Encoder` of such blocks."""

    block_type = CgspnBlock


class CgspnPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base class of the models: an encoder under `encoder`."""

    config_class = CgspnConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("CgspnBlock",)

    def __init__(self, config: CgspnConfig) -> None:
        """Raises ValueError for a config with inconsistent settings."""
        super().__init__(config)
        # `post_init` initialises again, and must draw the same weights as `create_model`
        with torch.random.fork_rng(devices=[]):
            self.encoder = CgspnEncoder(config.encoder_config)
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.encoder.patch_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embedding."""
        self.encoder.patch_embed = value  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise all weights that transformers has not loaded, at the call for the first such module."""
        if all(map(_is_initialised, module.parameters(recurse=False))):
            return
        encoder = self.encoder
        missing = {name: p for name, p in encoder.named_parameters() if not _is_initialised(p)}
        if all(name.startswith("head.") for name in missing):
            fresh = {f"head.{name}": value for name, value in build_head(encoder.config).state_dict().items()}
        else:
            fresh = Encoder(encoder.config).state_dict()
        for name, parameter in missing.items():
            initialization.copy_(parameter, fresh[name])
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Like transformers', plus a model card if there is none. `cgspn.load_encoder` can read the folder.

        Names of weights are those without torch.compile, for which transformers would find no weights.
        """
        state = without_wrappers(self.state_dict() if state_dict is None else state_dict, "this model")
        super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)
        if is_main_process:
            write_card(save_directory, self.encoder.config, self.num_parameters())

    def run(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Grid, Maps, Maps]:
        """Run images [B, channels, H, W] through the blocks. Options that are None take the config's values.

        Returns the normalised tokens [B, prefix + h*w, C], their grid, the hidden states (before the first block and
        after each) and the attention maps [B, heads, N, N]; hidden states and maps are None unless requested.

        pixel_mask: [B, H, W], zero where a pixel is padding to the right or below.
        """
        if torch.compiler.is_exporting():
            translate_scans()
        config, patch, encoder = self.config, self.config.patch_size, self.encoder
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_maps = config.output_attentions if output_attentions is None else output_attentions
        mask = None if pixel_mask is None else pixel_mask[:, ::patch, ::patch].bool()
        # like transformers' models, whose processors return float32 even for half-precision weights; bytes are refused
        dtype = encoder.input_weight.dtype
        images = pixel_values.to(dtype) if pixel_values.is_floating_point() else pixel_values
        tokens, grid = encoder.embed(images, mask)
        states, maps = [tokens], []
        # blocks checkpoint only in training mode; this loop also covers a frozen encoder with gradients
        recompute = self.gradient_checkpointing and not self.training and torch.is_grad_enabled()
        for block in encoder.each_block():
            if want_maps and isinstance(block.mixer, AttentionMixer):
                tokens, grid = order(tokens, grid, None)
                branch, attention = block.mixer.with_map(block.norm1(tokens), grid)
                tokens = block.mlp_half(tokens + block.scale1(branch))
                maps.append(attention)
            else:
                tokens, grid = order(tokens, grid, window_of(block))
                # transformers' function, which may also offload
                tokens = self._gradient_checkpointing_func(block, tokens, grid) if recompute else block(tokens, grid)
            if want_states:
                states.append(order(tokens, grid, None)[0])
        tokens, grid = order(tokens, grid, None)
        return encoder.norm(tokens), grid, tuple(states) if want_states else None, tuple(maps) or None


def translate_scans() -> None:
    """Add the scan to transformers' ONNX exporter while that traces a model.

    Its table has no public interface, and a model can only act in its own forward.
    """
    exporter = sys.modules.get("transformers.exporters.exporter_onnx")
    if exporter is not None:
        from ...export.onnx_scan import propagate_2d_onnx

        exporter._ONNX_TRANSLATION_TABLE.setdefault(torch.ops.cgspn.propagate_2d.default, propagate_2d_onnx)


def _is_initialised(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


class CgspnModel(CgspnPreTrainedModel):
    """An encoder's features: last_hidden_state [B, prefix + h*w, C] normalised, pooler_output [B, pooled width]."""

    def __init__(self, config: CgspnConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Features of normalised images whose height and width are any multiples of the patch size.

        Args:
            pixel_values: [B, channels, H, W].
            pixel_mask: [B, H, W], zero where a pixel is padding to the right or below, as returned by the image
                processor.
            output_hidden_states: also return the tokens before the blocks and after each, before the last LayerNorm.
            output_attentions: also return [B, heads, N, N] of each attention block. Scans have no attention map;
                without attention blocks the result is None.
            interpolate_pos_encoding: no effect; position embeddings are always resized to the image.

        Raises ValueError for sizes that are not multiples of the patch size.
        """
        tokens, grid, states, maps = self.run(pixel_values, pixel_mask, output_hidden_states, output_attentions)
        pooled = self.encoder.forward_head(tokens, pre_logits=True, mask=grid.mask)
        return BaseModelOutputWithPooling(tokens, pooled, hidden_states=states, attentions=maps)


class CgspnForImageClassification(CgspnPreTrainedModel):
    """An encoder with a classifier of config.num_labels after its pooling: logits [B, num_labels]."""

    def __init__(self, config: CgspnConfig) -> None:
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
        interpolate_pos_encoding: bool | None = None,
    ) -> ImageClassifierOutput:
        """Logits, and the loss if labels [B] or [B, num_labels] are given. Otherwise like `CgspnModel`."""
        tokens, grid, states, maps = self.run(pixel_values, pixel_mask, output_hidden_states, output_attentions)
        logits = self.encoder.forward_head(tokens, mask=grid.mask)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states, attentions=maps)


class CgspnBackbone(BackboneMixin, CgspnPreTrainedModel):  # type: ignore[misc]
    """A backbone with feature maps [B, C, ceil(H / patch), ceil(W / patch)] of config.out_features.

    Images may have any size; they are padded with zeros to whole patches, below and to the right.
    """

    has_attentions = False

    def __init__(self, config: CgspnConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, output_attentions: bool | None = None
    ) -> BackboneOutput:
        """The maps of the requested stages. pixel_values: [B, channels, H, W], normalised."""
        patch, (height, width) = self.config.patch_size, pixel_values.shape[-2:]
        images = pad(pixel_values, (0, -width % patch, 0, -height % patch))
        _, grid, states, maps = self.run(images, None, True, output_attentions)
        assert states is not None
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        norm = self.encoder.norm if self.config.apply_layernorm else nn.Identity()
        chosen = [state for name, state in zip(self.stage_names, states, strict=True) if name in self.out_features]
        return BackboneOutput(
            feature_maps=tuple(to_map(norm(state), grid).permute(0, 3, 1, 2) for state in chosen),
            hidden_states=states if wanted else None,
            attentions=maps,
        )
