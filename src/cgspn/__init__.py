"""C-GSPN: vision encoders that stay fast at high resolution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Import the library at its first use, so that `cgspn --help` does not wait for PyTorch."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in ("evaluate", "models", "teachers"):
        module = import_module(f".{home}", __name__)
        if name in __all__ and hasattr(module, name):
            return globals().setdefault(name, getattr(module, name))
    if name in globals():  # a subpackage that this has imported
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
