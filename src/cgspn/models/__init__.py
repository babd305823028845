"""Encoders, the text tower, image-text models, and the registry of models."""

from .checkpoint import CheckpointError
from .config import EncoderConfig, TextConfig
from .cuda_graphs import CapturedEncoder
from .dual import DualEncoder, build_dual, image_encoder
from .encoder import Encoder, EncoderOutput
from .pyramid import FeaturePyramid
from .registry import create_model, list_models, model_config
from .text import TextTower, tokenize
from .variable_size import Packing, choose_shapes, encode_variable_size, pack

__all__ = ["CapturedEncoder", "CheckpointError", "DualEncoder", "Encoder", "EncoderConfig", "EncoderOutput"]
__all__ += ["FeaturePyramid", "Packing", "TextConfig", "TextTower", "build_dual", "choose_shapes", "create_model"]
__all__ += ["encode_variable_size", "image_encoder", "list_models", "model_config", "pack", "tokenize"]
