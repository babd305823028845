"""Pretrained encoders in, students out."""

from .convert import attention_student, convert
from .load import load_embedded_teacher, load_encoder, load_model

__all__ = ["attention_student", "convert", "load_embedded_teacher", "load_encoder", "load_model"]
