"""Loading of pretrained encoders, and their conversion to students."""

from .convert import attention_student, convert
from .load import load_embedded_teacher, load_encoder, load_model
from .text import PretrainedDual, PretrainedText, load_text

__all__ = ["PretrainedDual", "PretrainedText", "attention_student", "convert", "load_embedded_teacher"]
__all__ += ["load_encoder", "load_model", "load_text"]
