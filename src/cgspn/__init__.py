"""C-GSPN: vision encoders that stay fast at high resolution."""

from .models import Encoder, EncoderOutput, create_model, list_models
from .teachers import convert, load_encoder

__version__ = "0.1.0"
__all__ = ["Encoder", "EncoderOutput", "convert", "create_model", "list_models", "load_encoder"]
