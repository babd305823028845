"""An encoder's config as a config of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..config import MODEL_TYPE, EncoderConfig, encoder_config_from_dict, to_dict
from ..registry import model_config

DEFAULT = "cgspn_small_patch14_378"


def _field(name: str, doc: str, section: str = "") -> property:
    """A property that reads and sets a value of the encoder's config under transformers' name."""

    def of(config: CgspnConfig) -> dict[str, Any]:
        return config.encoder[section] if section else config.encoder

    def put(self: CgspnConfig, value: Any) -> None:
        of(self)[name] = value

    return property(lambda self: of(self)[name], put, doc=doc)


class CgspnConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """The `EncoderConfig` of a model, under `encoder`, with transformers' own settings.

    Sizes can be read and set under the names that transformers uses for ViTs: hidden_size, num_hidden_layers,
    patch_size, ... Values are checked when a model is built.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        encoder: str | EncoderConfig | Mapping[str, Any] = DEFAULT,
        apply_layernorm: bool = True,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Wrap an encoder's config.

        Args:
            encoder: a name of `cgspn.list_models()`, an EncoderConfig, or one as a dict.
            apply_layernorm: for a backbone: apply the encoder's last LayerNorm to its feature maps.
            out_features, out_indices: for a backbone: its stages, "stem" (0, before the blocks), "stage1", "stage2",
                ...
            kwargs: settings of transformers, such as num_labels or id2label.

        Raises ValueError for a name, a setting or a stage that does not exist.
        """
        kwargs.pop("model", None)
        if isinstance(encoder, str):
            encoder = model_config(encoder)
        elif not isinstance(encoder, EncoderConfig):
            encoder = encoder_config_from_dict(encoder)
        if encoder.num_classes and not kwargs.keys() & {"num_labels", "id2label"}:
            kwargs["num_labels"] = encoder.num_classes
        self.model = "encoder"  # this library recognises its folders by it
        self.encoder = to_dict(encoder)
        self.apply_layernorm = apply_layernorm
        super().__init__(**kwargs)
        self.set_output_features_output_indices(
            out_features=None if out_features is None else list(out_features),
            out_indices=None if out_indices is None else list(out_indices),
        )

    @property
    def encoder_config(self) -> EncoderConfig:
        """`encoder` as an EncoderConfig. Raises ValueError if it was changed to an invalid value."""
        return encoder_config_from_dict(self.encoder)

    @property
    def stage_names(self) -> list[str]:
        """The stages of a backbone: before the blocks, and after each."""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]

    hidden_size = _field("width", "Channels of the tokens.")
    intermediate_size = _field("mlp_hidden", "Inner width of the MLPs.")
    patch_size = _field("patch_size", "In pixels.")
    num_channels = _field("channels", "Of the images.")
    num_attention_heads = _field("heads", "Of the attention blocks, if there are any.", "attention")

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks. Setting it drops the last blocks, or adds blocks if all have the same mixer."""
        return len(self.encoder["mixers"])

    @num_hidden_layers.setter
    def num_hidden_layers(self, count: int) -> None:
        mixers = list(self.encoder["mixers"])
        if count > len(mixers) and len(set(mixers)) > 1:
            raise ValueError(
                f"num_hidden_layers is {count}; {len(mixers)} blocks of different kinds accept at most their number"
            )
        self.encoder["mixers"] = mixers[:count] + mixers[:1] * (count - len(mixers))

    @property
    def image_size(self) -> list[int]:
        """Native height and width in pixels (models accept any multiples of the patch size). One number sets both."""
        return list(self.encoder["image_size"])

    @image_size.setter
    def image_size(self, size: int | Sequence[int]) -> None:
        self.encoder["image_size"] = [size, size] if isinstance(size, int) else list(size)
