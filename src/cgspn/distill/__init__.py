"""Training: taps, adapters, losses, tasks, the loop, and the recipe made of them."""

from .config import DistillConfig, LossConfig, OptimConfig, PretrainConfig
from .stages import distil, eval_transform, pretrain, train_transform
from .taps import Taps, tapped_forward
from .trainer import DivergedError, History

__all__ = [
    "DistillConfig",
    "DivergedError",
    "History",
    "LossConfig",
    "OptimConfig",
    "PretrainConfig",
    "Taps",
    "distil",
    "eval_transform",
    "pretrain",
    "tapped_forward",
    "train_transform",
]
