"""`cgspn eval`: zero-shot accuracy and retrieval of image-text models on labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro

from ..console import console
from ..data import load_images
from ..distill import eval_transform
from ..evaluate.suite import ZEROSHOT, evaluate_classes
from ..evaluate.table import SummaryTable
from ..models.dual import DualEncoder
from ..teachers import load_model


@dataclass(frozen=True)
class Eval:
    """Zero-shot top-1 and image-text retrieval; class names are the names of the sub-folders.

    Examples:
        cgspn eval embedded demo/c-gspn
        cgspn eval runs/student --data photos/
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Checkpoint folders of image-text models, or "embedded", a row each."""
    data: str = "embedded"
    """A folder with a sub-folder of images for each class, or "embedded" (its test split)."""
    device: str = "cpu"
    """"cpu" or "cuda"."""

    def run(self) -> None:
        """Raises ValueError or OSError."""
        if not self.models:
            raise ValueError("models is empty; expected one or more checkpoint folders")
        table = SummaryTable(f"Evaluation on {self.data}", list(ZEROSHOT))
        for source in self.models:
            model = load_model(source)
            if not isinstance(model, DualEncoder):
                raise ValueError(f"models names {source}, an encoder without a text tower; expected image-text models")
            config = model.image.config
            images = load_images(self.data, config.image_size, config.channels, "test")
            with console.status(f"evaluating {source}"), torch.inference_mode():
                table.add(source, evaluate_classes(model.to(self.device), images, eval_transform(config)))
        console.print(table.to_rich())
