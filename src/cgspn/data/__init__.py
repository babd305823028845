"""Data: the embedded images, image folders, shards, evaluation datasets, transforms and batches."""

from .captions import TEMPLATES, fill
from .embedded import load_embedded
from .folder import load_folder
from .image_set import ImageSet
from .loader import Batch, ImageSource, Transform, batch_indices, batches, one_pass
from .samples import Sample, SampleFolder, SampleSource, open_folder
from .schedule import BatchShape, scheduled
from .shards import ShardSet, open_shards
from .skipped import SkipCounter, Skipped
from .source import load_images, open_samples
from .transforms import EvalTransform, TrainTransform, center_crop, normalize, random_resized_crop, resize, to_float
from .workers import BatchPlan, LoaderConfig, WorkerError, read_rows

__all__ = [
    "TEMPLATES",
    "Batch",
    "BatchPlan",
    "BatchShape",
    "EvalTransform",
    "ImageSet",
    "ImageSource",
    "LoaderConfig",
    "Sample",
    "SampleFolder",
    "SampleSource",
    "ShardSet",
    "SkipCounter",
    "Skipped",
    "TrainTransform",
    "Transform",
    "WorkerError",
    "batch_indices",
    "batches",
    "center_crop",
    "fill",
    "load_embedded",
    "load_folder",
    "load_images",
    "normalize",
    "one_pass",
    "open_folder",
    "open_samples",
    "open_shards",
    "random_resized_crop",
    "read_rows",
    "resize",
    "scheduled",
    "to_float",
]
