"""Evaluation: functions on tensors (zeroshot, retrieval, probe, segmentation, alignment), and models applied
to images (predict), datasets (measure) and image sets in memory (suite)."""

from .alignment import cosine, relative_mse
from .predict import Classification, Similarity, classify, similarity
from .probe import Probe, patch_histograms
from .retrieval import Retrieval, retrieve, retrieve_captions
from .segmentation import PixelScore, Segmentation, fit_probe, segment
from .table import Metric, SummaryTable
from .zeroshot import Accuracy, accuracy, class_embeddings, top1

__all__ = [
    "Accuracy",
    "Classification",
    "Metric",
    "PixelScore",
    "Probe",
    "Retrieval",
    "Segmentation",
    "Similarity",
    "SummaryTable",
    "accuracy",
    "class_embeddings",
    "classify",
    "cosine",
    "fit_probe",
    "patch_histograms",
    "relative_mse",
    "retrieve",
    "retrieve_captions",
    "segment",
    "similarity",
    "top1",
]
