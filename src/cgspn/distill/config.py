"""Settings of training runs: typed, printable, overridable from the command line."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..settings import Listed
from .sizes import SizeRange, check_fields


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimiser and of augmentation for one stage.

    Args:
        steps: number of optimiser steps.
        batch_size: images per step. With mixed sizes, batches at other sizes have about the same number of tokens.
        optimizer: "adamw", or "muon" for Muon on matrices and AdamW on all other weights. Muon's updates are scaled to
            the size of AdamW's, so learning rates carry over. Muon learns more per step, but needs a few matrix
            products per weight and step.
        learning_rate: peak learning rate of new weights, with linear warm-up and cosine decay to zero.
        inherited_rate: learning rate multiplier for weights copied from the teacher.
        embedding_rate: additional learning rate multiplier for the patch embedding; 0 freezes it. The pixels of a patch
            are similar, so updates of the same sign add up. In a student that inherits it, one AdamW step at 2e-4
            destroys what stage 1 has learned, while the same step on all other weights is harmless.
        weight_decay: weight decay of matrices; vectors and scalars have none.
        warmup: fraction of the steps used for warm-up.
        clip: maximum gradient norm.
        augment: random crops and flips. Without it, the student sees whole images, as in evaluation.
        crop_scale: smallest and largest area of a random crop, as fractions of the image area.
        jitter: strength of random brightness, contrast and saturation changes, 0 to 1; used only with `augment`.
        mixup: fraction of the images that are blended with another image of the batch, in random proportions. Teacher
            and student see the same blend. Not allowed with a contrastive loss, because the captions would not match.
        cutmix: fraction of the images that get a random box from another image of the batch, after `mixup`. Not allowed
            with a contrastive loss.
        accumulate: number of gradient-accumulation steps per batch. A contrastive loss compares only the images of one
            of them; `ComputeConfig.checkpointing` saves memory without that.
        ema: decay of the moving average of the weights, which becomes the result; 0 uses the last weights.
        seed: random seed of initialisation, image order and augmentation.
    """

    steps: int = 100
    batch_size: int = 128
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    inherited_rate: float = 1.0
    embedding_rate: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    augment: bool = True
    crop_scale: tuple[float, float] = (0.6, 1.0)
    jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        crops, not_negative = self.crop_scale, ("steps", "inherited_rate", "embedding_rate", "weight_decay")
        check_fields(
            self,
            *((name, getattr(self, name) > 0, "more than 0") for name in ("batch_size", "learning_rate", "clip")),
            *((name, 0 <= getattr(self, name) < math.inf, "0 or more") for name in not_negative),
            ("learning_rate", self.learning_rate < math.inf, "finite"),
            ("seed", -(1 << 63) <= self.seed < 1 << 63, "64-bit integers"),
            *((name, 0 <= getattr(self, name) <= 1, "0 to 1") for name in ("warmup", "jitter", "mixup", "cutmix")),
            ("crop_scale", len(crops) == 2 and 0 < crops[0] <= crops[1] <= 1, "0 < first <= second <= 1"),
            ("ema", 0 <= self.ema < 1, "0 to below 1"),
            ("accumulate", self._divides(), f"divisors of batch_size, {self.batch_size}"),
        )

    def _divides(self) -> bool:
        return self.accumulate > 0 and self.batch_size % self.accumulate == 0


@dataclass(frozen=True)
class LossConfig:
    """The loss of stage 2: alpha * PP + beta * PB + output * pooled [+ contrastive].

    Args:
        alpha: weight of the PP taps (sub-layer outputs), averaged over blocks.
        beta: weight of the PB taps (block outputs), averaged over blocks.
        output: weight of the relative MSE of the pooled vector.
        kl_pp: weight of the KL term at the PP taps.
        kl_pb: weight of the KL term at the PB taps.
        adapters: train a small MLP on the student's side of each tap.
        contrastive: weight of a contrastive loss with the teacher's text tower; 0 disables it.
    """

    alpha: float = 1.0
    beta: float = 1.0
    output: float = 1.0
    kl_pp: float = 1.0
    kl_pb: float = 1.0
    adapters: bool = True
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, *((f.name, 0 <= getattr(self, f.name) < math.inf, "0 or more") for f in fields(self)))
        if not (self.alpha or self.beta or self.output or self.contrastive):
            raise ValueError("alpha, beta, output and contrastive are all 0; expected at least one above")


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed. The results are the same up to rounding.

    Args:
        precision: dtype of the computation; weights, optimiser state and losses are always float32.
        compile: use torch.compile for the blocks of teacher and student and for the losses at the taps. Each batch
            shape is compiled when it first occurs.
        capture: replay forward and backward as one CUDA graph per batch shape, which speeds up steps that are limited
            by kernel launches. The graph includes the communication of "fsdp" and "placed"; "ddp" averages gradients
            after it. Requires CUDA; cannot be combined with a contrastive loss or `teacher_cache`.
        checkpointing: activation checkpointing of the student's blocks.
        parallel: how several processes (torchrun) share the work. "ddp" replicates the student and "fsdp" shards it.
            "placed" is "ddp", except that in stage 1 each process trains different blocks. Every process holds the
            whole teacher.
        blocks_per_unit: number of blocks that "fsdp" gathers and scatters at once. Larger units need fewer transfers,
            but overlap less with computation.
        reshard_after_forward: with "fsdp", free the gathered weights after the forward pass and gather them again in
            the backward pass. Otherwise only gradients and optimiser state are smaller than with "ddp".
        teacher_cache: GiB of host memory per process for caching the teacher's features (in bfloat16) across epochs; 0
            disables it. Requires `augment` to be off.
        save_every: number of steps between snapshots, from which an interrupted run resumes; 0 writes none.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    capture: bool = False
    checkpointing: bool = False
    parallel: Literal["ddp", "fsdp", "placed"] = "ddp"
    blocks_per_unit: int = 3
    reshard_after_forward: bool = False
    teacher_cache: float = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, or for `capture` together with `teacher_cache`."""
        check_fields(
            self,
            ("blocks_per_unit", self.blocks_per_unit >= 1, "1 or more"),
            ("teacher_cache", self.teacher_cache >= 0, "0 or more GiB"),
            ("save_every", self.save_every >= 0, "0 or more steps"),
        )
        if self.capture and self.teacher_cache:
            raise ValueError("capture and teacher_cache are both on; expected at most one of them")


@dataclass(frozen=True)
class HighResConfig:
    """Stages at higher resolutions after stage 2 (the curriculum).

    Each stage continues from the previous one at a tenth of the learning rate, and reuses its adapters and loss scales
    if the teacher is the same. Starting with new adapters made the student worse: at the learning rate of stage 2, with
    16 images per step and one size, the cosine similarity of a ViT student fell from 0.971 to 0.946 at 448 px.

    Args:
        sizes: image sizes in pixels, one stage each; empty for none. A single large size is the paper's direct jump.
        teacher: "original" is the attention teacher at the new size. "previous" is the frozen student of the previous
            size, with upsampled taps; use it if the original teacher is poor at the new size (zero-shot accuracy of the
            embedded teacher on 1000 images: 83% at 28 px, 68% at 56 px). "none" uses only the contrastive loss.
        smaller: fraction of the batches with a smaller size, so that the student keeps its quality there. The smallest
            is that of `DistillConfig.sizes`, or the size of the earlier stages.
        optim: settings of each stage; the batch size is at the new size.
    """

    sizes: Listed[int] = ()
    teacher: Literal["previous", "original", "none"] = "original"
    smaller: float = 0.5
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=100, learning_rate=1e-4, warmup=0.05, embedding_rate=0)
    )

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("smaller", 0 <= self.smaller < 1, "0 to below 1"),
            ("sizes", all(size > 0 for size in self.sizes), "pixels above 0"),
        )


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation run.

    Args:
        compression: s in the paper; the latent of each C-GSPN layer has floor(C / s) channels.
        value_expansion: number of scanned channels over all directions, as a multiple of the latent width. With 6,
            students are closer to their teacher, but layers are slower (results/quality). None scans the latent itself.
        keep_attention: number of attention layers to keep, spread evenly, or their indices.
        window_attention: number of layers that become window attention, spread evenly over the remaining layers, or
            their indices.
        window: side length of a window in tokens.
        keep_positions: keep the teacher's position embeddings, interpolated to each grid. `learn_positions` then has no
            effect.
        image_size: image size of stages 1 and 2 in pixels; None for the student's native size.
        sizes: range of image sizes for the batches of stages 1 and 2. `image_size` then only sets the number of tokens
            per batch. None uses `image_size` for all batches.
        stage1: settings of stage 1, which trains each sub-layer separately on the teacher's features.
        stage2: settings of stage 2, which trains the whole student end to end.
        learn_positions: the first sub-layer of a student without position embeddings also learns what the teacher's
            position embeddings add to its tokens.
        loss: the loss of stage 2 and of the later stages.
        highres: stages at higher resolutions after stage 2.
        compute: precision, compilation and parallelism.
    """

    compression: float = 18
    value_expansion: float | None = None
    keep_attention: int | tuple[int, ...] = 0
    window_attention: int | tuple[int, ...] = 0
    window: int = 8
    keep_positions: bool = False
    image_size: int | None = None
    sizes: SizeRange | None = None
    stage1: OptimConfig = field(default_factory=lambda: OptimConfig(steps=60, learning_rate=3e-3))
    stage2: OptimConfig = field(default_factory=lambda: OptimConfig(steps=120, learning_rate=1e-3, embedding_rate=0))
    learn_positions: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    highres: HighResConfig = field(default_factory=HighResConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def conversion(self) -> dict[str, Any]:
        """The settings that `convert` takes, which a converted student already has."""
        names = ("compression", "value_expansion", "keep_attention", "window_attention", "window", "keep_positions")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        """Raise ValueError for settings out of range or that cannot be combined."""
        check_fields(self, ("image_size", self.image_size is None or self.image_size > 0, "pixels above 0, or None"))
        for name in ("mixup", "cutmix") if self.loss.contrastive else ():
            if getattr(self.stage2, name) or getattr(self.highres.optim, name):
                raise ValueError(f"{name} is on together with loss.contrastive; expected one of them to be 0")
        if self.highres.sizes and self.highres.teacher == "none" and not self.loss.contrastive:
            raise ValueError("highres.teacher is 'none' and loss.contrastive is 0; expected a contrastive loss")
        if self.compute.capture and self.loss.contrastive:
            raise ValueError("compute.capture is on together with loss.contrastive; expected one of them to be off")


@dataclass(frozen=True)
class PretrainConfig:
    """Settings for training an image-text model from scratch.

    Args:
        model: name of the image encoder, with attention or C-GSPN.
        loss: "clip" for the softmax loss, "sigmoid" for SigLIP's.
        embed_dim: width of the shared image-text embedding.
        sizes: range of image sizes; None for the encoder's native size.
        optim: settings of the optimiser.
    """

    model: str = "vit_mini_patch4_28"
    loss: Literal["clip", "sigmoid"] = "clip"
    embed_dim: int = 64
    sizes: SizeRange | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=1500, weight_decay=0.05))

    def __post_init__(self) -> None:
        check_fields(self, ("embed_dim", self.embed_dim > 0, "more than 0"))
