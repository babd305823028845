"""Building blocks of the encoder: mixers with one interface, MLP, block, patch embedding and pooling."""

from .attention import AttentionConfig, AttentionMixer
from .block import Block, LayerScale
from .embed import LearnedPositions, PatchEmbed
from .fp8 import Fp8Mlp, quantize_mlps
from .mixer import Grid, Mixer
from .mlp import Activation, Mlp
from .norm import LayerNorm, RMSNorm
from .pooling import ClassTokenPool, MapPool, MeanPool, Pooling
from .propagation import GSPN, GSPN_WALK, PropagationConfig, PropagationMixer, value_config
from .resize import PositionResize
from .window_attention import WindowAttentionMixer

__all__ = [
    "GSPN", "GSPN_WALK", "Activation", "AttentionConfig", "AttentionMixer", "Block", "ClassTokenPool", "Fp8Mlp",
    "Grid", "LayerNorm", "LayerScale", "LearnedPositions", "MapPool", "MeanPool", "Mixer", "Mlp", "PatchEmbed",
    "Pooling", "PositionResize", "PropagationConfig", "PropagationMixer", "RMSNorm", "WindowAttentionMixer",
    "quantize_mlps", "value_config",
]  # fmt: skip
