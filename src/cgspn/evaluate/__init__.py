"""Measures: pure functions over tensors and callables, with no knowledge of any encoder."""

from .alignment import BlockAlignment, align, cosine, linear_cka, relative_error
from .influence import influence_map
from .retrieval import Retrieval, retrieve
from .segmentation import Probe, Segmentation, confusion, fit_probe, mean_iou, patch_histograms, segment
from .table import Metric, SummaryTable
from .zeroshot import class_embeddings, top1

__all__ = [
    "BlockAlignment",
    "Metric",
    "Probe",
    "Retrieval",
    "Segmentation",
    "SummaryTable",
    "align",
    "class_embeddings",
    "confusion",
    "cosine",
    "fit_probe",
    "influence_map",
    "linear_cka",
    "mean_iou",
    "patch_histograms",
    "relative_error",
    "retrieve",
    "segment",
    "top1",
]
