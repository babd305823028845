"""Images: the embedded set, image folders, transforms and batches."""

from .captions import TEMPLATES, fill
from .embedded import load_embedded
from .folder import load_folder
from .image_set import ImageSet
from .loader import Batch, ImageSource, batch_indices, batches, one_pass
from .skipped import Skipped
from .source import load_images
from .transforms import EvalTransform, TrainTransform, center_crop, normalize, random_resized_crop, resize, to_float

__all__ = [
    "TEMPLATES",
    "Batch",
    "EvalTransform",
    "ImageSet",
    "ImageSource",
    "Skipped",
    "TrainTransform",
    "batch_indices",
    "batches",
    "center_crop",
    "fill",
    "load_embedded",
    "load_folder",
    "load_images",
    "normalize",
    "one_pass",
    "random_resized_crop",
    "resize",
    "to_float",
]
