"""C-GSPN: vision encoders that stay fast at high resolution."""

from .evaluate import classify, similarity
from .models import Encoder, EncoderOutput, create_model, list_models
from .teachers import convert, load_encoder, load_model

__version__ = "0.1.0"
__all__ = [
    "Encoder",
    "EncoderOutput",
    "classify",
    "convert",
    "create_model",
    "list_models",
    "load_encoder",
    "load_model",
    "similarity",
]
