"""Data: the embedded images, image folders, shards, evaluation datasets, transforms and batches."""

from .captions import TEMPLATES, fill
from .embedded import load_embedded
from .image_set import ImageSet
from .loader import Batch, BatchShape, scheduled
from .samples import Sample, SampleSource
from .shards import open_shards
from .skipped import SkipCounter, Skipped
from .source import open_samples
from .transforms import EvalTransform, TrainTransform, normalize, resize, to_float
from .workers import BatchPlan, LoaderConfig, WorkerError, read_rows

__all__ = ["TEMPLATES", "Batch", "BatchPlan", "BatchShape", "EvalTransform", "ImageSet", "LoaderConfig", "Sample"]
__all__ += ["SampleSource", "SkipCounter", "Skipped", "TrainTransform", "WorkerError", "fill", "load_embedded"]
__all__ += ["normalize", "open_samples", "open_shards", "read_rows", "resize", "scheduled", "to_float"]
