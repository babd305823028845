"""Measures: pure functions over tensors and callables, with no knowledge of any encoder."""

from .alignment import BlockAlignment, align, cosine, linear_cka, relative_error
from .influence import influence_map
from .retrieval import Retrieval, retrieve
from .probe import Probe, patch_histograms
from .segmentation import PixelScore, Segmentation, fit_probe, segment
from .table import Metric, SummaryTable
from .zeroshot import class_embeddings, top1

__all__ = [
    "BlockAlignment",
    "Metric",
    "PixelScore",
    "Probe",
    "Retrieval",
    "Segmentation",
    "SummaryTable",
    "align",
    "class_embeddings",
    "cosine",
    "fit_probe",
    "influence_map",
    "linear_cka",
    "patch_histograms",
    "relative_error",
    "retrieve",
    "segment",
    "top1",
]
