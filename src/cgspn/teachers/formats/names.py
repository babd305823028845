"""Properties of a model that only its timm architecture name shows, from config.json or the file name."""

import re
from pathlib import Path
from typing import Any

# Encoders whose tensors may look like those of a plain ViT, but which compute something else.
UNSUPPORTED = (
    (r"eva02|_rope_|lingbot|sapiens2|(^|_)pe_(core|lang|spatial)|^mlcd|^qwen3_vit", "rotary positions"),
    (r"_srelpos_|_relpos_|vit_relpos|vit_srelpos|^beit(v2)?_|^samvit", "relative position biases"),
    (r"^beit3", "norms inside of its branches"),
    (r"_rpn_|eva02_enormous|^swinv2", "norms after its branches"),
    (r"_xp_|_pwee_|_dpwee_|_18x2_", "attention and MLP side by side"),
    (r"_dwee_|_dlittle_", "differential attention"),
    (r"^aimv2|^test_vit4", "RMSNorm in place of LayerNorm"),
    (r"^test_vit3", "a pooling over registers too"),
    (r"_distilled_", "a distillation token, whose output is averaged with the class token's"),
    (r"_r\d+_s\d+|_tiny_r_s16|_resnet\d+|_mci_", "a convolutional network in place of its patch embedding"),
    (r"^naflexvit|^eva_giant", "layers of its own"),
)
# Arguments of timm's models that change the computation, with their neutral values.
_OFF = (False, None)
_PLAIN: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "pool_include_prefix", "use_rot_pos_emb", "use_post_norm"), _OFF
)
_PLAIN |= {"embed_norm_layer": (None,), "block_fn": (None,), "attn_layer": (None, "", "attn")}
_PLAIN |= {"norm_layer": (None, "layernorm", "LayerNorm"), "use_abs_pos_emb": (True, None)}
_HEADS = {"vit_base_patch16_gap_224": 16, "test_vit": 2, "test_vit2": 2, "vit_7b_patch16_dinov3": 32}
_HEADS |= dict.fromkeys(("vit_huge_plus_patch16_dinov3", "vit_huge_plus_patch16_dinov3_qkvb"), 20)
_TIMM = re.compile(r"((vit|deit3?|eva)_\w*_?patch\d+_\w+|flexivit_\w+|test_vit\d?)$")
_SIXTEEN = (1152, 1280, 1408, 1664)  # widths for which heads are not 64 wide
_USUAL = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24} | dict.fromkeys(_SIXTEEN, 16)


def unsupported_reason(name: str) -> str | None:
    """The reason why `Encoder` does not support an encoder of this name, or None."""
    return next((f"it has {what}" for pattern, what in UNSUPPORTED if re.search(pattern, name)), None)


def is_plain(architecture: str) -> bool:
    """Whether a name in timm's config is one of its plain vision transformers, which `Encoder` supports."""
    return bool(re.match(r"(vit|deit3?|eva)_|flexivit_|test_vit", architecture))


def unsupported_argument(arguments: dict[str, Any]) -> str | None:
    """The first argument of a timm model, as "name = value", that `Encoder` does not support, or None."""
    wrong = (key for key, plain in _PLAIN.items() if key in arguments and arguments[key] not in plain)
    key = next(wrong, None)
    return None if key is None else f"{key} = {arguments[key]!r}"


def name_in_file(source: str) -> str:
    """The architecture in the name of a file or hub id, without timm's tag; "" if there is none."""
    name = Path(source).name
    for suffix in (".safetensors", ".pth", ".bin", ".pt"):
        name = name.removesuffix(suffix)
    name = name.split("@")[0].split(".")[0]
    return name if _TIMM.match(name) or unsupported_reason(name) else ""


def size_of(name: str) -> int | None:
    """The native size in pixels at the end of a timm name; None without one."""
    found = re.search(r"_(\d{2,4})$", name)
    return int(found[1]) if found else None


def heads_of(name: str, width: int, *, sixteen: bool = False) -> int | None:
    """Number of heads of a timm architecture or of published models of this width. sixteen: 16 for a width of 1536."""
    base = name.split(".")[0]
    if base in _HEADS:
        return _HEADS[base]
    if sixteen and width == 1536:
        return 16
    if width in _USUAL:
        return _USUAL[width]
    return width // 64 if _TIMM.match(base) and width % 64 == 0 else None
