"""The preprocessing of a foreign encoder, from the files next to its weights."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ...models.config import Resample
from ..source import Source

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
_PILLOW: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
BYTE = 1 / 255
# defaults of transformers' image processors that are not in the file
_CLASSES: dict[str, dict[str, Any]] = {
    "CLIP": {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "do_center_crop": True},
    "Bit": {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "do_center_crop": True},
    "Siglip": {"image_mean": HALF, "image_std": HALF, "resample": 3},
    "ViT": {"image_mean": HALF, "image_std": HALF, "resample": 2},
    "ConvNext": {"image_mean": HALF, "image_std": HALF, "resample": 3},
}


def normalisation(
    source: Source, mean: tuple[float, ...], std: tuple[float, ...], *, squeeze: bool = False
) -> dict[str, Any]:
    """The fields image_mean, image_std, image_crop, image_crop_pct and image_resample of `EncoderConfig`.

    Only the first file of OpenCLIP, transformers or timm that has any of them is used. Missing values are the family's
    defaults: mean, std, and `squeeze`, which resizes to the native size instead of taking a centre crop. Raises
    ValueError for a filter that Pillow lacks.
    """
    configs = source.configs
    clip = configs.get("open_clip_config.json", {}).get("preprocess_cfg")
    timm = configs.get("config.json", {}).get("pretrained_cfg")
    processor = configs.get("processor_config.json", {}).get("image_processor")
    processor = processor or configs.get("preprocessor_config.json")
    fields = {"image_mean": mean, "image_std": std, "image_crop": not squeeze, "image_resample": "bicubic"}
    if clip:
        return fields | _plain(clip, "resize_mode", "shortest")
    if processor:
        return fields | _processor(processor, fields)
    return fields | (_plain(timm, "crop_mode", "center") if timm else {})


def _plain(stated: Mapping[str, Any], key: str, crop: str) -> dict[str, Any]:
    """Read OpenCLIP's and timm's files, in which `key` has the value `crop` for a centre crop."""
    found = _common(stated.get("mean"), stated.get("std"), stated.get("interpolation"))
    mode = stated.get(key)
    if mode in (crop, "squash"):
        found["image_crop"] = mode == crop
    elif mode is not None:
        _warn(f"its config says {key} {mode!r}, which pads images")
    if isinstance(stated.get("crop_pct"), (int, float)):
        found["image_crop_pct"] = float(stated["crop_pct"])
    return found


def _processor(stated: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read transformers' preprocessor_config.json. Missing values are the defaults of its class, or the family's."""
    kind = str(stated.get("image_processor_type", ""))
    stated = next((own for name, own in _CLASSES.items() if kind.startswith(name)), {}) | dict(stated)
    found = _common(stated.get("image_mean"), stated.get("image_std"), stated.get("resample"))
    mean, std = found.get("image_mean", fields["image_mean"]), found.get("image_std", fields["image_std"])
    if stated.get("do_normalize") is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # mean and std are for pixels times this factor; here they are for pixels from 0 to 1
    factor = float(stated.get("rescale_factor", BYTE)) if stated.get("do_rescale", True) else 1.0
    if abs(factor - BYTE) > 1e-9:
        mean, std = (tuple(value * BYTE / factor for value in values) for values in (mean, std))
    found |= {"image_mean": mean, "image_std": std}
    size, cut = stated.get("size"), stated.get("crop_size")
    cropped = bool(stated.get("do_center_crop", cut is not None))
    if isinstance(size, Mapping):
        found["image_crop"] = "shortest_edge" in size
    elif size is not None or "do_center_crop" in stated:
        found["image_crop"] = cropped
    edge, inner = _edge(size), _edge(cut)
    if cropped and edge and inner and inner < edge:
        found["image_crop_pct"] = inner / edge
    elif "crop_pct" in stated:  # ConvNeXT's
        found |= {"image_crop": True, "image_crop_pct": float(stated["crop_pct"])}
    sides = set(size) if isinstance(size, Mapping) else set()
    keeps = sides & {"longest_edge", "max_height"} or (
        "shortest_edge" in sides and stated.get("do_center_crop") is False
    )
    if keeps or stated.get("do_pad") or stated.get("do_resize") is False:
        _warn("the image processor's file keeps the shape of images or pads them")
    return found


def _edge(size: Any) -> int | None:
    """The shorter side from a processor's size."""
    if isinstance(size, Mapping):
        sides = [side for key in ("shortest_edge", "height", "width") if isinstance(side := size.get(key), int)]
        return min(sides) if sides else None
    return size if isinstance(size, int) else None


def _common(mean: Any, std: Any, resample: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, values in (("image_mean", mean), ("image_std", std)):
        one = values[0] if isinstance(values, Sequence) and len(values) == 1 else values
        values = [one] * 3 if isinstance(one, (int, float)) else values
        if isinstance(values, Sequence) and len(values):
            found[field] = tuple(float(value) for value in values)
    if isinstance(resample, int) and 0 <= resample < len(_PILLOW):
        found["image_resample"] = _PILLOW[resample]
    elif resample in get_args(Resample):
        found["image_resample"] = resample
    elif resample is not None and resample not in ("random", "random,bicubic", ""):
        raise ValueError(f"its preprocessing resizes with filter {resample!r}; accepted: {', '.join(_PILLOW)}")
    return found


def _warn(text: str) -> None:
    warnings.warn(f"{text}; here the centre is cropped", stacklevel=2)
