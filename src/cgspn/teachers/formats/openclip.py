"""OpenCLIP's vision transformer, and OpenAI's, which has the same keys."""

from ...layers import AttentionConfig
from ...models.config import EncoderConfig
from .family import Family, Rule, Tower, both, built, grid_positions, head_count, prefix_tokens, transposed
from .preprocessing import CLIP_MEAN, CLIP_STD, normalisation


def config(tower: Tower) -> EncoderConfig:
    """Derive the config from shapes, JSON and the file name. Raises ValueError for unsupported options."""
    model = tower.source.configs.get("open_clip_config.json", {}).get("model_cfg", {})
    vision = model.get("vision_cfg", {})
    wrong = next((key for key in _OTHER if vision.get(key)), None)
    if wrong or vision.get("pool_type", "tok") not in ("tok", "avg"):
        wrong = wrong or "pool_type"
        raise ValueError(f"its config states {wrong} = {vision[wrong]!r}, which this library does not support")
    patches = tower.patches("conv1.weight")
    width = patches[0]
    named = any(word in tower.source.name.lower().replace("-", "") for word in ("openai", "quickgelu"))
    heads = width // vision["head_width"] if "head_width" in vision else None
    if model and heads is None:
        heads = width // 64  # OpenCLIP's default
    by_tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
    if not (model or named):
        told = "the tensors do not show which GELU this CLIP uses or how it pools; exact GELU and the class token"
        tower.warn_of("activation", f"{told} are assumed")
    average = vision.get("pool_type") == "avg"
    after = bool(vision.get("final_ln_after_pool"))
    return built(
        tower,
        "clip",
        patches,
        tower.shape("positional_embedding")[0] - 1,
        vision.get("image_size"),
        vision,
        mlp_hidden=tower.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        activation="quick_gelu" if model.get("quick_gelu", named) else "gelu_tanh" if by_tanh else "gelu",
        attention=AttentionConfig(head_count(tower, width, heads)),
        layer_scale=1e-5 if tower.has("transformer.resblocks.0.ls_1.gamma") else None,
        position_resize="bicubic_antialias",
        class_token=True,
        patch_bias=tower.has("conv1.bias"),
        pre_norm=tower.has("ln_pre.weight"),
        final_norm=not after,
        norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pooling="mean" if average else "cls",
        pool_norm=after,
        embed_dim=tower.shape("proj")[1] if tower.has("proj") else None,
        **normalisation(tower.source, CLIP_MEAN, CLIP_STD),
    )


_OTHER: tuple[str, ...] = ("attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner")
_OTHER += ("scale_attn", "scale_fc", "input_patchnorm", "block_type")
_BLOCK = "transformer.resblocks.{i}"
OPENCLIP = Family(
    "OpenCLIP's vision transformer",
    ("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"),
    (
        *both("patch_embed.projection", "conv1"),
        Rule("prefix", ("class_embedding", "positional_embedding"), prefix_tokens),
        Rule("positions.table", ("positional_embedding",), grid_positions),
        *both("pre_norm", "ln_pre"),
        *both("blocks.{i}.norm1", _BLOCK + ".ln_1"),
        *both("blocks.{i}.mixer.qkv", _BLOCK + ".attn.in_proj_{p}"),
        *both("blocks.{i}.mixer.out", _BLOCK + ".attn.out_proj"),
        Rule("blocks.{i}.scale1.gamma", (_BLOCK + ".ls_1.gamma",)),
        *both("blocks.{i}.norm2", _BLOCK + ".ln_2"),
        *both("blocks.{i}.mlp.fc1", _BLOCK + ".mlp.c_fc"),
        *both("blocks.{i}.mlp.fc2", _BLOCK + ".mlp.c_proj"),
        Rule("blocks.{i}.scale2.gamma", (_BLOCK + ".ls_2.gamma",)),
        *both("norm", "ln_post"),
        *both("pool_norm", "ln_post"),
        Rule("project.weight", ("proj",), transposed),
    ),
    config,
)
