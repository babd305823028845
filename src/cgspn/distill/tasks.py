"""What is learned: each task holds its models and turns a batch into a loss. The trainer knows nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data import Batch
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from .adapters import Adapters
from .config import LossConfig
from .losses import clip_loss, relative_error, sigmoid_loss, tap_loss
from .taps import Taps, tapped_forward

Losses = dict[str, Tensor]
Captions = Callable[[Batch], list[str]]


class Task(Protocol):
    """What `train` needs."""

    def losses(self, batch: Batch) -> Losses:
        """Scalars by name; "total" is minimised, the others are shown."""

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Fresh and inherited parameters; each group has its own learning rate."""


@torch.no_grad()
def teacher_taps(teacher: Encoder, batch: Batch) -> Taps:
    """The frozen teacher's features, in eval mode."""
    teacher.eval()
    return tapped_forward(teacher, batch.images)


def split_inherited(student: Encoder, teacher: Encoder) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The student's trainable parameters: those without and those with an equal twin in the teacher."""
    theirs = dict(teacher.named_parameters())
    fresh: list[nn.Parameter] = []
    inherited: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        twin = theirs.get(name)
        same = twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter)
        (inherited if same else fresh).append(parameter)
    return fresh, inherited


class SublayerTask:
    """Stage 1: block i of the student gets the teacher's own features and learns the teacher's sub-layer output.

    Blocks are independent: no gradient passes between them, and one teacher pass feeds all. Blocks whose mixer is
    kept from the teacher have nothing to learn. Source: "Key Designs" 3, stage 1.
    """

    def __init__(self, teacher: Encoder, student: Encoder) -> None:
        """Raises ValueError if the depths differ."""
        if teacher.config.depth != student.config.depth:
            raise ValueError(f"student has {student.config.depth} blocks; expected {teacher.config.depth}")
        self.teacher, self.student = teacher, student
        theirs = teacher.blocks.state_dict()
        self.learning = [
            i
            for i, block in enumerate(student.each_block())
            if any(
                f"{i}.mixer.{name}" not in theirs or not torch.equal(theirs[f"{i}.mixer.{name}"], value)
                for name, value in block.mixer.state_dict().items()
            )
        ]

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Mixers are fresh; the norm and scale around them are inherited."""
        blocks = [self.student.each_block()[i] for i in self.learning]
        fresh = [p for block in blocks for p in block.mixer.parameters()]
        inherited = [p for block in blocks for part in (block.norm1, block.scale1) for p in part.parameters()]
        return fresh, inherited

    def losses(self, batch: Batch) -> Losses:
        """The relative error of each sub-layer, "block i", and their sum."""
        taps = teacher_taps(self.teacher, batch)
        grid = taps.grid._replace(prefix=self.student.config.prefix)
        cut = taps.grid.prefix - grid.prefix
        losses: Losses = {}
        blocks = self.student.each_block()
        for i in self.learning:
            branch = blocks[i].sublayer(taps.entries[i][:, cut:], grid)[:, grid.prefix :]
            losses[f"block {i}"] = relative_error(branch, taps.sublayers[i])
        total = torch.stack(list(losses.values())).sum() if losses else taps.pooled.new_zeros(())
        return {"total": total, **losses}


class DistillTask:
    """Stage 2: the whole student against the teacher at two taps a block, through adapters.

    Source: "Key Designs" 3, stage 2; design, section 4.
    """

    def __init__(
        self,
        teacher: Encoder,
        student: Encoder,
        config: LossConfig,
        *,
        dual: DualEncoder | None = None,
        captions: Captions | None = None,
    ) -> None:
        """dual and captions: the teacher's image-text model and the captions of a batch, for the contrastive loss.

        Raises ValueError if that loss is on without them, or if depths or widths differ.
        """
        if (teacher.config.depth, teacher.config.width) != (student.config.depth, student.config.width):
            raise ValueError(
                f"student has depth {student.config.depth} and width {student.config.width}; "
                f"expected the teacher's {teacher.config.depth} and {teacher.config.width}"
            )
        if config.contrastive and (dual is None or captions is None):
            raise ValueError("contrastive is on; expected a teacher with a text tower, and captions")
        self.teacher, self.student, self.config = teacher, student, config
        self.dual, self.captions = dual, captions
        device = next(student.parameters()).device
        self.adapters = Adapters(student.config.depth, student.config.width, config.adapters).to(device)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Adapters are fresh, and what stage 1 has changed counts as fresh too."""
        fresh, inherited = split_inherited(self.student, self.teacher)
        return fresh + list(self.adapters.parameters()), inherited

    def losses(self, batch: Batch) -> Losses:
        """Mean PP and PB losses over blocks, the pooled vector's, the contrastive one, and their weighted sum."""
        config = self.config
        theirs, mine = teacher_taps(self.teacher, batch), tapped_forward(self.student, batch.images)
        parts: Losses = {}
        weights = {"PP": config.alpha, "PB": config.beta, "pooled": config.output, "contrastive": config.contrastive}
        if config.alpha:
            parts["PP"] = _mean_tap(self.adapters.sublayers, mine.sublayers, theirs.sublayers, config.kl_pp)
        if config.beta:
            parts["PB"] = _mean_tap(self.adapters.blocks, mine.blocks, theirs.blocks, config.kl_pb)
        if config.output:
            parts["pooled"] = relative_error(mine.pooled, theirs.pooled)
        if config.contrastive:
            parts["contrastive"] = self._contrastive(mine.pooled, batch)
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        return {"total": total, **parts}

    def _contrastive(self, pooled: Tensor, batch: Batch) -> Tensor:
        assert self.dual is not None
        assert self.captions is not None
        captions = self.captions(batch)
        with torch.no_grad():
            text = self.dual.encode_text(captions)
        image = nn.functional.normalize(
            nn.functional.linear(pooled, self.dual.image_projection.weight.detach()), dim=-1
        )
        return clip_loss(image, text, _same(captions, image.device), self.dual.logit_scale.detach())


class ContrastiveTask:
    """Training without a teacher: images and captions that belong together are drawn together."""

    def __init__(self, model: DualEncoder, captions: Captions, loss: str) -> None:
        """captions: the captions of a batch; loss: "clip" or "sigmoid"."""
        self.model, self.captions, self.loss = model, captions, loss

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Everything is fresh."""
        return list(self.model.parameters()), []

    def losses(self, batch: Batch) -> Losses:
        """The contrastive loss. Images whose captions name the same class belong together."""
        captions = self.captions(batch)
        image, text = self.model.encode_image(batch.images), self.model.encode_text(captions)
        same = batch.labels[:, None] == batch.labels[None]
        if self.loss == "sigmoid":
            total = sigmoid_loss(image, text, same, self.model.logit_scale, self.model.logit_bias)
        else:
            total = clip_loss(image, text, same, self.model.logit_scale)
        return {"total": total}


def _same(captions: list[str], device: torch.device) -> Tensor:
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    index = torch.tensor([ids[caption] for caption in captions], device=device)
    return index[:, None] == index[None]


def _mean_tap(adapters: nn.ModuleList, student: list[Tensor], teacher: list[Tensor], kl_weight: float) -> Tensor:
    pairs = zip(adapters, student, teacher, strict=True)
    return torch.stack([tap_loss(adapter(s), t, kl_weight) for adapter, s, t in pairs]).mean()
