"""Distillation: taps, adapters, losses, tasks, the training loop, stages and presets."""

from .batches import Feed, ImageSetFeed, SampleFeed, eval_transform
from .config import ComputeConfig, DistillConfig, HighResConfig, LossConfig, OptimConfig, PretrainConfig
from .parallel import World, gather_objects, join_world
from .sizes import SizeRange
from .snapshots import SnapshotError
from .stages import distill, pretrain
from .taps import ParityError, Taps, tapped_forward
from .trainer import DivergedError, History

__all__ = [
    "ComputeConfig",
    "DistillConfig",
    "DivergedError",
    "Feed",
    "HighResConfig",
    "History",
    "ImageSetFeed",
    "LossConfig",
    "OptimConfig",
    "ParityError",
    "PretrainConfig",
    "SampleFeed",
    "SizeRange",
    "SnapshotError",
    "Taps",
    "World",
    "distill",
    "eval_transform",
    "gather_objects",
    "join_world",
    "pretrain",
    "tapped_forward",
]
