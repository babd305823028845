"""Encoders, text tower, the two side by side, and models by name."""

from .captured import CapturedEncoder
from .checkpoint import CheckpointError
from .config import EncoderConfig, TextConfig
from .dual import DualEncoder, build_dual, load_dual
from .encoder import Encoder, EncoderOutput
from .mixed import Packing, choose_shapes, encode_mixed, pack
from .pyramid import FeaturePyramid
from .registry import create_model, list_models, model_config
from .text import TextTower, tokenize

__all__ = [
    "CapturedEncoder",
    "CheckpointError",
    "DualEncoder",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "FeaturePyramid",
    "Packing",
    "TextConfig",
    "TextTower",
    "build_dual",
    "choose_shapes",
    "create_model",
    "encode_mixed",
    "list_models",
    "load_dual",
    "model_config",
    "pack",
    "tokenize",
]
