"""`cgspn pretrain`: train an image-text model from scratch, without a teacher."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
import tyro

from ..console import console, progress_watcher
from ..data import load_embedded
from ..distill import PretrainConfig, pretrain
from ..environment import command, versions
from ..evaluate.suite import evaluate_zeroshot
from ..models.checkpoint import CONFIG, PREPROCESSING, WEIGHTS, write_atomically
from ..settings import Listed
from .checks import check_folder, check_free, device_of, mixed_sizes, range_of
from .command import Command, Device, Out
from .header import device_name

RECORD = "pretrain.json"


@dataclass(frozen=True)
class Pretrain(Command):
    """Train an image encoder, with attention or C-GSPN, and a text tower from scratch with a contrastive loss.

    Examples:
        cgspn pretrain runs/vit
        cgspn pretrain runs/cgspn --config.model cgspn_mini_patch4_28 --config.optim.steps 500
    """

    usual: ClassVar = (
        *("config.model", "config.optim.steps", "config.optim.batch_size", "config.optim.learning_rate"),
        *("sizes", "device"),
    )

    out: Out
    """Folder for config.json, model.safetensors and pretrain.json (command, versions, losses)."""
    config: tyro.conf.AvoidSubcommands[PretrainConfig] = field(default_factory=PretrainConfig)
    """All settings of the run."""
    sizes: tuple[int, int] | None = None
    """Train at mixed sizes: draw the size of each batch from this range, in pixels (config.sizes)."""
    aspects: Listed[float] = ()
    """Aspect ratios (width / height) to combine with the sizes."""
    device: Device = "auto"
    """Device to run on; "auto" uses a GPU if there is one."""
    half: bool = False
    """Store the weights as float16."""
    overwrite: bool = False
    """Replace an existing model in the folder."""

    @classmethod
    def start(cls, arguments: list[str]) -> Pretrain:
        """The default settings, with a range of sizes if an option sets a field of it."""
        config = PretrainConfig()
        return cls(tyro.MISSING, config=replace(config, sizes=range_of(config.sizes, arguments)))

    def __post_init__(self) -> None:
        """Apply sizes and aspects to the config."""
        if self.sizes or self.aspects:
            sizes = mixed_sizes(self.config.sizes, self.sizes, self.aspects)
            object.__setattr__(self, "config", replace(self.config, sizes=sizes))

    def run(self) -> None:
        """Train, evaluate on the validation split, and save. Raises ValueError, OSError or DivergedError."""
        device = device_of(self.device)
        check_folder(self.out, "out")
        check_free([self.out / name for name in (CONFIG, WEIGHTS, PREPROCESSING, RECORD)], "out", self.overwrite)
        with progress_watcher() as watcher:
            model, history = pretrain(load_embedded("train"), self.config, watcher, device)
        model.cpu()
        accuracy = evaluate_zeroshot(model, load_embedded("validation"))
        model.save_pretrained(self.out, dtype=torch.float16 if self.half else torch.float32)
        record = {
            "command": command(),
            "versions": versions(),
            "machine": device_name(torch.device(device)),
            "config": asdict(self.config),
            "validation_zeroshot_top1": accuracy,
            "losses": history.steps[:: max(1, len(history.steps) // 200)],
        }
        write_atomically(self.out / RECORD, json.dumps(record) + "\n")
        console.print(f"zero-shot top-1 on the validation split: {100 * accuracy:.1f}%; saved in {self.out}")
