"""The typed config of an encoder, saved as config.json."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..layers import Activation, AttentionConfig, Pooling, PositionResize, PropagationConfig
from .reading import build

MixerName = Literal["attention", "window_attention", "propagation"]
MODEL_TYPE = "cgspn"  # transformers recognises a folder by this
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]  # Pillow's filters
WIDEST, DEEPEST = 1 << 16, 1 << 12  # limits against configs whose construction would take forever

_RANGES = {  # of a field, or of each of its numbers
    **dict.fromkeys(("width", "channels", "patch_size", "embed_dim", "position_table"), (1, WIDEST, "")),
    **dict.fromkeys(("image_size", "trained_sizes"), (1, WIDEST, " pixels")),
    "window": (1, WIDEST, " positions, or (rows, columns)"),
    "mlp_hidden": (1, 16 * WIDEST, ""),
    "registers": (0, DEEPEST, ""),
    "num_classes": (0, 1 << 24, ""),
}


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an image encoder: patch embedding, blocks that differ only in their mixer, and pooling.

    Args:
        name: name of the model.
        image_size: native size in pixels, (height, width); any multiple of the patch size may be given to forward.
        crop_remainder: also accept sizes that are not multiples of the patch size, and ignore the pixels beyond the
            last whole patch.
        patch_size: side length of a patch in pixels.
        channels: number of image channels.
        width: C, the number of channels per token.
        mixers: one entry per block: "attention", "window_attention" or "propagation".
        mlp_hidden: hidden width of the MLPs.
        activation: activation function of the MLPs.
        attention, propagation: settings of each kind of mixer; `attention` is used for global and window attention.
        window: rows and columns of tokens in a window of window attention, or one number for both.
        layer_scale: initial LayerScale of the residual branches; None for no LayerScale.
        positions: add position embeddings, resized to the grid of each image. C-GSPN needs none.
        position_resize: how they are resized; checkpoints follow their original library.
        position_table: rows and columns of the table of positions; None for those of the native grid.
        class_token: add a class token before the grid. Its position embedding, if any, is added to it.
        registers: number of register tokens after the class token.
        patch_bias, pre_norm, final_norm: a bias in the patch embedding, a LayerNorm before the blocks (CLIP), and a
            LayerNorm after the blocks.
        norm_eps: eps of every LayerNorm.
        pooling: "map" (attention pooling), "mean" or "cls".
        summary_tokens: indices of the prefix tokens that "cls" concatenates; (0,) is the class token.
        pool_norm: apply a LayerNorm to the pooled vector (timm's fc_norm).
        embed_dim: output width of a projection of the pooled vector, as in CLIP; None for no projection.
        embed_bias: add a bias to that projection.
        num_classes: number of outputs of a classifier; 0 for no classifier.
        image_mean, image_std: normalisation of pixel values in [0, 1].
        image_crop: how an image of another shape is brought to the native size: centre crop, or resize without keeping
            the aspect ratio.
        image_crop_pct: fraction of the resized image's side that the centre crop keeps, in (0, 1]; timm's crop_pct.
        image_resample: interpolation filter for resizing.
        trained_sizes: image sizes at which a student was distilled, as sides of squares of the same area in pixels,
            ascending. Empty if unknown.
    """

    name: str = "encoder"
    image_size: tuple[int, int] = (378, 378)
    patch_size: int = 14
    channels: int = 3
    crop_remainder: bool = False
    width: int = 1152
    mixers: tuple[MixerName, ...] = ("attention",) * 27
    mlp_hidden: int = 4304
    activation: Activation = "gelu_tanh"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    propagation: PropagationConfig = field(default_factory=PropagationConfig)
    window: tuple[int, int] | int = 8
    layer_scale: float | None = None
    positions: bool = True
    position_resize: PositionResize = "bicubic"
    position_table: tuple[int, int] | None = None
    class_token: bool = False
    registers: int = 0
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    norm_eps: float = 1e-6
    pooling: Pooling = "map"
    summary_tokens: tuple[int, ...] = (0,)
    pool_norm: bool = False
    embed_dim: int | None = None
    embed_bias: bool = False
    num_classes: int = 0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_crop: bool = True
    image_crop_pct: float = 1.0
    image_resample: Resample = "bilinear"
    trained_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        if not isinstance(self.image_size, tuple) or len(self.image_size) != 2:
            raise ValueError(f"image_size is {self.image_size!r}; expected (height, width)")
        for name, (least, most, unit) in _RANGES.items():
            if not all(least <= value <= most for value in _each(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: {least} to {most}{unit}")
        for name, accepted in (("mixers", MixerName), ("pooling", Pooling), ("image_resample", Resample)):
            for value in _each(getattr(self, name)):
                if value not in get_args(accepted):
                    raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, get_args(accepted)))}")
        if self.depth > DEEPEST:
            raise ValueError(f"mixers has {self.depth} entries; accepted: at most {DEEPEST}")
        if len(self.window_size) != 2:
            raise ValueError(f"window is {self.window}; accepted: a number of positions, or (rows, columns)")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps is {self.norm_eps}; accepted: 0 to below 1")
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std is {self.image_std}; accepted: numbers above 0")
        for name in ("image_mean", "image_std"):
            if len(given := getattr(self, name)) < min(self.channels, 3):
                raise ValueError(f"{name} is {given}; accepted: a number for each of {self.channels} channels")
        patch = self.patch_size
        if not self.crop_remainder and any(n % patch for n in self.image_size):
            raise ValueError(f"image_size is {self.image_size}; accepted: multiples of the patch size {patch}")
        if (self.class_token or self.registers) and set(self.mixers) - {"attention"}:
            raise ValueError("class_token and registers must be off with propagation or window attention")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("pooling is 'cls' without a class token; accepted: 'map', 'mean'")
        if not self.summary_tokens or any(not 0 <= i < max(1, self.prefix) for i in self.summary_tokens):
            raise ValueError(f"summary_tokens is {self.summary_tokens}; accepted: indices below {max(1, self.prefix)}")
        if not 0 < self.image_crop_pct <= 1:
            raise ValueError(f"image_crop_pct is {self.image_crop_pct}; accepted: above 0, at most 1")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.mixers)

    @property
    def window_size(self) -> tuple[int, int]:
        """Rows and columns of a window in window attention."""
        return (self.window, self.window) if isinstance(self.window, int) else self.window

    @property
    def pooled_width(self) -> int:
        """Number of channels of the pooled vector."""
        return self.embed_dim or self.width * (len(self.summary_tokens) if self.pooling == "cls" else 1)

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the table of positions."""
        return self.position_table or (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)

    @property
    def prefix(self) -> int:
        """Number of tokens before the grid."""
        return int(self.class_token) + self.registers


@dataclass(frozen=True)
class TextConfig:
    """Settings of a small text tower over UTF-8 bytes, which needs no vocabulary and reads any language.

    Args:
        width: channels per token. depth: number of blocks. heads: number of attention heads. context: maximum length of
            a text in bytes; longer texts are truncated.
    """

    width: int = 64
    depth: int = 2
    heads: int = 2
    context: int = 48

    def __post_init__(self) -> None:
        """Raise ValueError for invalid settings."""
        for name, least, most in (("width", 1, WIDEST), ("depth", 0, DEEPEST), ("context", 1, 16 * WIDEST)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: {least} to {most}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads is {self.heads}; accepted: divisors of the width, {self.width}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain JSON values."""
    return dataclasses.asdict(config)


def preprocessing(config: EncoderConfig) -> dict[str, Any]:
    """The preprocessing of an encoder as a config of transformers' image processors."""
    return {
        "image_processor_type": "CgspnImageProcessor",
        "size": {"height": config.image_size[0], "width": config.image_size[1]},
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "patch_size": config.patch_size,
        "resample": config.image_resample,
        "aspect": "crop" if config.image_crop else "squash",
        "crop_pct": config.image_crop_pct,
    }


def encoder_config_from_dict(values: Any, where: str = "encoder") -> EncoderConfig:
    """The inverse of `to_dict`. where: file and key, for messages. Raises CheckpointError for invalid values."""
    return build(EncoderConfig, values, where)
