"""Settings of training runs: typed, printable, overridable from the command line."""

from dataclasses import dataclass, field
from typing import Literal

from .sizes import SizeRange, check_fields


@dataclass(frozen=True)
class OptimConfig:
    """One optimisation.

    Args:
        steps: optimiser steps.
        batch_size: images a step; where sizes are mixed, at the size of the stage, and at others as many as have about
            as many tokens.
        optimizer: "adamw", or "muon": matrices by Muon, its updates as large as AdamW's so that rates carry over, and
            the rest by AdamW. Muon gets further in the same steps; it costs a few matrix products a weight and step.
        learning_rate: peak, of fresh weights; reached by a linear warm-up, then a cosine to zero.
        inherited_rate: factor on the learning rate of weights that come from the teacher.
        embedding_rate: factor on that of the patch embedding; 0 leaves it as it is. The pixels of a patch are much
            alike, so that steps of one sign add up over all of them: in a student that inherits it, one step of AdamW
            at 2e-4 undoes what stage 1 has learned, where the same step of all other weights is harmless.
        weight_decay: of matrices; vectors and scalars have none.
        warmup: share of the steps.
        clip: largest norm of the gradient.
        augment: crop and flip at random; off, a run of an epoch or so sees just the images that it is judged on.
        crop_scale: smallest and largest share of an image's area that a random crop of `augment` has.
        jitter: strength of random changes of brightness, contrast and saturation beside it, 0 to 1; 0 for none.
        mixup: share of the images that are blended with their neighbour in the batch, in random proportions. Teacher
            and student look at the same blend, so that few images make many; not beside a contrastive loss, whose
            captions would fit neither image.
        cutmix: share of the images of which a random box shows another one of the batch, after `mixup` and like it.
        accumulate: parts that a batch is cut into, one after the other, to fit the memory.
        ema: decay of the moving average of the weights that the run ends with; 0 for the last weights.
        seed: of initialisation, order and augmentation.
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
        smallest, largest = self.crop_scale
        check_fields(
            self,
            *((name, getattr(self, name) > 0, "more than 0") for name in ("batch_size", "learning_rate", "clip")),
            ("optimizer", self.optimizer in ("adamw", "muon"), "'adamw' or 'muon'"),
            ("steps", self.steps >= 0, "0 or more"),
            *((name, 0 <= getattr(self, name) <= 1, "0 to 1") for name in ("warmup", "jitter", "mixup", "cutmix")),
            ("crop_scale", 0 < smallest <= largest <= 1, "two shares of the area, 0 < first <= second <= 1"),
            ("ema", 0 <= self.ema < 1, "0 to below 1"),
            ("accumulate", self._divides(), f"divisors of batch_size, {self.batch_size}"),
        )

    def _divides(self) -> bool:
        return self.accumulate > 0 and self.batch_size % self.accumulate == 0


@dataclass(frozen=True)
class LossConfig:
    """What stage 2 minimises: alpha * PP + beta * PB + tokens * final + output * pooled [+ contrastive].

    Args:
        alpha: weight of the taps after sub-layers (PP), mean over blocks.
        beta: weight of the taps after blocks (PB), mean over blocks.
        tokens: weight of the relative MSE of the final grid tokens, after the last norm: what users of dense features
            get. The paper has no such term; the taps see each block alike, and the last one before its norm.
        output: weight of the pooled vector's relative MSE.
        kl_pp: weight of the KL term in the taps after sub-layers.
        kl_pb: the same after blocks.
        adapters: learnable bridges before the taps.
        contrastive: weight of an image-text loss against the teacher's text tower; 0 for none.
    """

    alpha: float = 1.0
    beta: float = 1.0
    tokens: float = 0.0
    output: float = 1.0
    kl_pp: float = 1.0
    kl_pb: float = 1.0
    adapters: bool = True
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alpha or self.beta or self.tokens or self.output or self.contrastive):
            raise ValueError("alpha, beta, tokens, output and contrastive are all 0; expected at least one above")


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed; the result is the same within rounding.

    Args:
        precision: of the arithmetic; weights, optimiser state and losses are float32 either way.
        compile: compile the blocks of teacher and student, and the losses at their taps, once for each shape of batches
            and when it first comes: kernels of a fixed shape are faster, and a long run has time to make them.
        capture: replay forward and backward as one CUDA graph for each shape of batches, for steps whose kernels are
            shorter than their launches; on several GPUs what "fsdp" and "placed" exchange is in it, and gradients of
            "ddp" are averaged after it. CUDA alone; not with a contrastive loss or a teacher's cache.
        checkpointing: recompute the student's activations block by block in backward.
        parallel: on several processes (torchrun), "ddp" copies the student, "fsdp" shards it; "placed" is as "ddp",
            but stage 1 gives each process the blocks that it alone trains. The frozen teacher is whole everywhere.
        blocks_per_unit: of a sharded student, how many blocks are gathered and scattered at once: more make fewer and
            larger exchanges, which hide worse.
        reshard_after_forward: of a sharded student, let gathered weights go until backward, which gathers them again;
            off, they stay, and only gradients and the optimiser's state are smaller than in a copied student.
        teacher_cache: GiB of host memory, a process, for the teacher's features from one epoch to the next, rounded to
            bfloat16; 0 for none. For images that look the same each time (`OptimConfig.augment` off); see `cache.py`.
        save_every: steps between checkpoints that a run can go on from; 0 for none.
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
        """Raise ValueError for units of no block, or a captured step that would wait for the host."""
        check_fields(
            self,
            ("blocks_per_unit", self.blocks_per_unit >= 1, "1 or more"),
            ("teacher_cache", self.teacher_cache >= 0, "0 or more GiB"),
        )
        if self.capture and self.teacher_cache:
            raise ValueError("capture is on beside teacher_cache; expected one of them to be off")


@dataclass(frozen=True)
class HighResConfig:
    """After stage 2, to higher resolutions, one after the other.

    Each of these stages goes on from the one before: with its adapters and scales if the teacher stays the same, at a
    rate of a tenth. A stage that began anew lowered what it should raise: at the rate of stage 2, with fresh adapters,
    16 images a step and one size, a ViT student of 224 px went from 0.971 to 0.946 at 448 px.

    Args:
        sizes: in pixels; empty for no such stage. One large size alone is the direct jump.
        teacher: "original" is the attention teacher at that size; "previous" the frozen student of the size before,
            whose taps are upsampled where images are larger: for a teacher that loses its features at that size (the
            embedded one: zero-shot on 1000 images 83% at its 28 px, 68% at 56 px); "none" leaves the contrastive loss.
        smaller: share of the batches that have a smaller size, from the smallest of `DistillConfig.sizes` or the size
            of the stages before; 0 for the new size alone, at which others are forgotten.
        optim: of each size; its batch size is that of the new size.
    """

    sizes: tuple[int, ...] = ()
    teacher: Literal["previous", "original", "none"] = "original"
    smaller: float = 0.5
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=100, learning_rate=1e-4, warmup=0.05, embedding_rate=0)
    )

    def __post_init__(self) -> None:
        check_fields(self, ("smaller", 0 <= self.smaller < 1, "0 to below 1"))


@dataclass(frozen=True)
class DistillConfig:
    """Teacher to student in two stages.

    Args:
        compression: s of the student's propagation; its latent has floor(C / s) channels.
        value_expansion: channels that carry values beside the latent, in units of it (`layers.value_config`): 6 brought
            students closer to their teachers, at more time a sub-layer (results/quality). None for the latent alone.
        keep_attention: number of attention layers that stay, spread evenly, or their indices.
        window_attention: number of those that stay with windows in place of the whole grid, spread evenly over what is
            left, or their indices.
        window: side of a window, in positions of the grid.
        keep_positions: the student keeps the teacher's learned positions, interpolated to each grid; `learn_positions`
            has nothing to do then.
        image_size: in pixels, of stages 1 and 2; None for the student's native size.
        sizes: what the batches of stages 1 and 2 are drawn from, for teacher and student alike, `image_size` then only
            setting how many tokens a batch has; None for `image_size` alone.
        stage1: sub-layers alone, each on the teacher's own features.
        stage2: the whole student, end to end.
        learn_positions: the first sub-layer of a student without positions also learns what the teacher's positions
            add to its tokens (`taps.retarget_first_block`).
        loss: what stage 2 minimises, and the stages after it.
        highres: the curriculum after stage 2.
        compute: precision, compilation, processes.
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

    def __post_init__(self) -> None:
        """Raise ValueError for stages that minimise nothing, blend what captions are for, or cannot be captured."""
        for name in ("mixup", "cutmix") if self.loss.contrastive else ():
            if getattr(self.stage2, name) or getattr(self.highres.optim, name):
                raise ValueError(f"{name} is on beside loss.contrastive; expected one of them to be 0")
        if self.highres.sizes and self.highres.teacher == "none" and not self.loss.contrastive:
            raise ValueError("highres.teacher is 'none' and loss.contrastive is 0; expected a contrastive loss")
        if self.compute.capture and self.loss.contrastive:
            raise ValueError("compute.capture is on beside loss.contrastive; expected one of them to be off")


@dataclass(frozen=True)
class PretrainConfig:
    """An image-text pair of encoders from scratch, without a teacher.

    Args:
        model: name of the image encoder, attention or propagation alike.
        loss: "clip" or "sigmoid".
        embed_dim: width of the shared space.
        sizes: what batches are drawn from; None for the encoder's native size alone.
        optim: the optimisation.
    """

    model: str = "vit_mini_patch4_28"
    loss: Literal["clip", "sigmoid"] = "clip"
    embed_dim: int = 64
    sizes: SizeRange | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=1500, weight_decay=0.05))
