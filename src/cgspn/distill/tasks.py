"""What is learned: each task holds its models and turns a batch into a loss. The trainer knows nothing else."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..data import Batch
from ..layers import Block
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from .adapters import Adapters
from .config import LossConfig
from .flops import forward_flops, sublayer_flops, training_flops
from .losses import clip_loss, relative_mse, sigmoid_loss
from .parallel import full_tensor, gather_rows
from .runtime import Runtime
from .sizes import tokens_of, with_area
from .taps import Taps, observe, retarget_first_block, tapped_forward
from .target_scales import TargetScales

Losses = dict[str, Tensor]
Size = tuple[int, int]  # (height, width) in pixels
Captions = Callable[[Batch], list[str]]


class Task(nn.Module):
    """The interface that `train` needs. The parameters of a task are trained; a teacher is held but not registered.

    Attributes:
        patch: of the encoder that learns, in pixels.
        reduction: how the losses of several processes become those of the run.
        has_unused_params: whether some of its parameters may get no gradient.
        capturable: whether its losses need nothing from the host, so that a CUDA graph can hold them.
        sharded: whether its parameters are spread over the processes (FSDP2) instead of copied.
    """

    patch: int
    reduction: Literal["mean", "sum"] = "mean"
    has_unused_params: bool = False
    sharded: bool = False
    capturable: bool = False

    def __init__(self, runtime: Runtime | None = None) -> None:
        super().__init__()
        self.runtime = runtime or Runtime()

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return next(self.parameters(), None) is not None

    def calibrate(self, parts: list[Batch]) -> None:
        """Measure on the first batch of a run, in the parts it is accumulated from, what stays constant after."""

    def losses(self, batch: Batch) -> Losses:
        """Scalars by name; "total" is minimised, the others are shown."""
        raise NotImplementedError

    def tokens(self, size: Size) -> int:
        """Grid tokens of an image of `size` (height, width) pixels."""
        return tokens_of(size, self.patch)

    def flops(self, size: Size) -> int | None:
        """FLOP per image of `size` (height, width) pixels, teacher and student together; None if they are not
        counted.
        """
        return None

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Fresh and inherited parameters; each group has its own learning rate."""
        return list(self.parameters()), []

    def forward(self, batch: Batch) -> Losses:
        """The losses: what wrappers for several processes call."""
        return self.losses(batch)

    def collect(self) -> None:
        """After the last step, share what a single process has learned with all processes."""

    def _look_at(self, **models: object) -> None:
        """Keep models without registering them: neither trained nor saved."""
        vars(self).update(models)


class TeacherTask(Task):
    """Base of both stages: a frozen teacher, whose taps are compared with the student's."""

    teacher: Encoder
    student: Encoder
    energies: TargetScales
    compares: bool = True

    def __init__(self, teacher: Encoder, student: Encoder, learn_positions: bool, runtime: Runtime | None) -> None:
        super().__init__(runtime)
        self._look_at(teacher=teacher)
        self.patch = student.config.patch_size
        self.learn_positions = learn_positions and teacher.positions is not None and student.positions is None

    def targets(self, taps: Taps) -> list[Tensor]:
        """The features of the teacher by whose energies the losses are divided."""
        raise NotImplementedError

    def seen_at(self, size: Size) -> Size:
        """The size (height, width) in pixels at which the teacher sees images of `size`."""
        return size

    @torch.no_grad()
    def calibrate(self, parts: list[Batch]) -> None:
        """The energies of the teacher's features."""
        if self.compares:
            self.energies.measure(self.targets(self.observed(part)) for part in parts)

    @torch.no_grad()
    def observed(self, batch: Batch, entry: Tensor | None = None) -> Taps:
        """The teacher's taps, from the cache or observed, the first of them from where the student starts: `entry`,
        [B, h*w, C], or its own embedding."""
        size, cache = (batch.images.shape[-2], batch.images.shape[-1]), self.runtime.cache
        run = self.runtime.tapped
        look = partial(observe, self.teacher, batch.images, self.student.config, self.seen_at(size), run)
        taps = look() if cache is None else cache.taps(batch.indices, look, size)
        if not self.learn_positions:
            return taps
        return retarget_first_block(taps, self.student.embed(batch.images)[0] if entry is None else entry)


def inherited_names(student: Encoder, teacher: Encoder) -> frozenset[str]:
    """The student's parameters that equal the teacher's of the same name and shape."""
    theirs = dict(teacher.named_parameters())
    return frozenset(
        name
        for name, parameter in student.named_parameters()
        if (same := theirs.get(name)) is not None and same.shape == parameter.shape and torch.equal(same, parameter)
    )


def learning_blocks(teacher: Encoder, student: Encoder) -> list[int]:
    """The student's blocks whose mixer is not the teacher's own."""
    theirs = teacher.blocks.state_dict()
    return [
        i
        for i, block in enumerate(student.each_block())
        if any(
            f"{i}.mixer.{name}" not in theirs or not torch.equal(theirs[f"{i}.mixer.{name}"], value)
            for name, value in block.mixer.state_dict().items()
        )
    ]


class SublayerTask(TeacherTask):
    """Stage 1: block i of the student gets the teacher's own features and learns the teacher's sub-layer output.

    Blocks are independent: no gradient passes between them, and one teacher pass feeds all. Blocks whose mixer is
    kept from the teacher have nothing to learn. Paper: stage 1 (docs/paper.md).
    """

    def __init__(
        self, teacher: Encoder, student: Encoder, learn_positions: bool = True, runtime: Runtime | None = None
    ) -> None:
        """learn_positions: see `DistillConfig`. Raises ValueError if the depths differ."""
        super().__init__(teacher, student, learn_positions, runtime)
        if teacher.config.depth != student.config.depth:
            raise ValueError(f"student has {student.config.depth} blocks; expected {teacher.config.depth}")
        self.learning = learning_blocks(teacher, student)
        self._look_at(student=student)
        self.capturable = self.runtime.cache is None
        self.parts = nn.ModuleDict({str(i): sublayer_parts(student.each_block()[i]) for i in self.learning})
        self.energies = TargetScales(len(self.learning)).to(next(student.parameters()).device)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Mixers are fresh; the norm and scale around them are inherited."""
        fresh = [p for name, p in self.named_parameters() if ".mixer." in name]
        return fresh, [p for name, p in self.named_parameters() if ".mixer." not in name]

    def flops(self, size: Size) -> int:
        """As in `Task`."""
        return forward_flops(self.teacher.config, size) + sublayer_flops(self.student.config, size, self.learning)

    def targets(self, taps: Taps) -> list[Tensor]:
        """The sub-layers that are learned."""
        return [taps.sublayers[i] for i in self.learning]

    def losses(self, batch: Batch) -> Losses:
        """The relative MSE of each sub-layer, "block i", and their sum."""
        taps = self.observed(batch)
        energies = self.energies.of(self.targets(taps))
        losses: Losses = {
            f"block {i}": self.sublayer_error(i, taps.block_inputs[i], taps.sublayers[i], taps, energy)
            for i, energy in zip(self.learning, energies, strict=True)
        }
        total = torch.stack(list(losses.values())).sum() if losses else taps.pooled.new_zeros(())
        return {"total": total, **losses}

    def sublayer_error(self, i: int, block_inputs: Tensor, wanted: Tensor, taps: Taps, energy: Tensor) -> Tensor:
        """Block i on the teacher's block_inputs [B, N, C], against the teacher's branch [B, h*w, C]."""
        grid = taps.grid._replace(prefix=self.student.config.prefix)
        tokens = block_inputs[:, taps.grid.prefix - grid.prefix :]
        branch = self.runtime.sublayer(self.student.each_block()[i], tokens, grid)
        return relative_mse(branch[:, grid.prefix :], wanted, energy)


def sublayer_parts(block: Block) -> nn.ModuleDict:
    """The parts of a block that stage 1 trains."""
    return nn.ModuleDict({"mixer": block.mixer, "norm1": block.norm1, "scale1": block.scale1})


class DistillTask(TeacherTask):
    """Stage 2: the whole student against the teacher at two taps a block, through adapters.

    Paper: stage 2, alpha * PP + beta * PB (docs/paper.md).
    """

    dual: DualEncoder | None

    def __init__(
        self,
        teacher: Encoder,
        student: Encoder,
        config: LossConfig,
        *,
        dual: DualEncoder | None = None,
        captions: Captions | None = None,
        teacher_size: Size | None = None,
        learn_positions: bool = True,
        inherited: frozenset[str] | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        """dual and captions: the teacher's image-text model and the captions of a batch, for the contrastive loss.

        teacher_size: (height, width) in pixels of the largest images that the teacher sees; larger ones are resized to
        that area for it, and its taps are then upsampled to the student's grid. learn_positions: see `DistillConfig`.
        inherited: names of the student's weights that count as the teacher's; None for those that are equal to its now.

        Raises ValueError if the contrastive loss is on without what it needs, or if depths or widths differ.
        """
        super().__init__(teacher, student, learn_positions, runtime)
        if (teacher.config.depth, teacher.config.width) != (student.config.depth, student.config.width):
            raise ValueError(
                f"student has depth {student.config.depth} and width {student.config.width}; "
                f"expected the teacher's {teacher.config.depth} and {teacher.config.width}"
            )
        if config.contrastive and (dual is None or captions is None):
            raise ValueError("contrastive is on; expected a teacher with a text tower, and captions")
        self.config, self.captions, self.teacher_size = config, captions, teacher_size
        self._look_at(dual=dual)
        self.sharded = self.runtime.sharded
        self.student = student
        self.compares = bool(config.alpha or config.beta or config.output)
        self.capturable = not config.contrastive and self.runtime.cache is None
        self.has_unused_params = not (config.output or config.contrastive)
        self.inherited = inherited_names(student, teacher) if inherited is None else inherited
        device = next(student.parameters()).device
        depth, width = student.config.depth, student.config.width
        self.adapted = [config.adapters and weight != 0 for weight in (config.alpha, config.beta)]
        self.adapters = Adapters(depth, width, sublayers=self.adapted[0], blocks=self.adapted[1]).to(device)
        self.energies = TargetScales(2 * depth + 1).to(device)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Adapters are fresh, and what stage 1 has changed counts as fresh too."""
        named = list(self.student.named_parameters())
        fresh = [p for name, p in named if name not in self.inherited]
        return fresh + list(self.adapters.parameters()), [p for name, p in named if name in self.inherited]

    def flops(self, size: Size) -> int:
        """As in `Task`; without the text tower of a contrastive loss."""
        theirs = forward_flops(self.teacher.config, self.seen_at(size)) if self.compares else 0
        at_sublayers, at_blocks = self.adapted
        student = self.student.config
        return theirs + training_flops(student, size, sublayer_adapters=at_sublayers, block_adapters=at_blocks)

    def seen_at(self, size: Size) -> Size:
        """As in `TeacherTask`: no larger than `teacher_size`."""
        largest = self.teacher_size
        if largest is None or size[0] * size[1] <= largest[0] * largest[1]:
            return size
        return with_area(size, largest, self.teacher.config.patch_size)

    def _around(self) -> dict[str, Tensor]:
        """What it holds beside the student: adapters and scales."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("student.")}

    def carried(self) -> dict[str, Tensor]:
        """Adapters and scales by name, whole, for a later stage with the same teacher; all processes must ask."""
        return {name: full_tensor(value).detach().clone() for name, value in self._around().items()}

    def carry_on(self, state: Mapping[str, Tensor]) -> None:
        """Start from what `carried` gave. Raises ValueError for adapters of another encoder or other losses."""
        mine = {name: value.shape for name, value in self._around().items()}
        if state and mine != {name: value.shape for name, value in state.items()}:
            raise ValueError(f"carried holds {len(state)} tensors of other names or shapes; expected {len(mine)}")
        self.load_state_dict(state, strict=False)

    def targets(self, taps: Taps) -> list[Tensor]:
        """Every tap and the pooled vector."""
        return [*taps.sublayers, *taps.blocks, taps.pooled]

    def losses(self, batch: Batch) -> Losses:
        """Mean PP and PB losses over blocks, the pooled vector's, the contrastive one, and their weighted sum "total".

        Beside them the loss of each tap, "PP block i" and "PB block i".
        """
        config = self.config
        mine = tapped_forward(self.student, batch.images, self.runtime.tapped)
        parts, each = Losses(), Losses()
        weights = {"PP": config.alpha, "PB": config.beta, "pooled": config.output, "contrastive": config.contrastive}
        if self.compares:
            theirs = self.observed(batch, mine.block_inputs[0])
            energies = self.energies.of(self.targets(theirs))
            at_sublayers, at_blocks, (at_pooled,) = energies.split([len(mine.blocks), len(mine.blocks), 1])
            for name, kl_weight, *of_blocks in (
                ("PP", config.kl_pp, self.adapters.sublayers, mine.sublayers, theirs.sublayers, at_sublayers),
                ("PB", config.kl_pb, self.adapters.blocks, mine.blocks, theirs.blocks, at_blocks),
            ):
                if weights[name]:
                    taps = zip(*of_blocks, strict=True)
                    values = [self.runtime.tap_loss(a, s, t, e, kl_weight) for a, s, t, e in taps]
                    parts[name] = torch.stack(values).mean()
                    each |= {f"{name} block {i}": value for i, value in enumerate(values)}
            if config.output:
                parts["pooled"] = relative_mse(mine.pooled, theirs.pooled, at_pooled)
        if config.contrastive:
            parts["contrastive"] = self._contrastive(mine.pooled, batch)
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        return {"total": total, **parts, **each}

    def _contrastive(self, pooled: Tensor, batch: Batch) -> Tensor:
        assert self.dual is not None
        assert self.captions is not None
        captions = self.captions(batch)
        with torch.no_grad():
            text = self.dual.encode_text(captions)
        image = normalize(linear(pooled, self.dual.image_projection.weight.detach()), dim=-1)
        scale, bias = self.dual.logit_scale.detach(), self.dual.logit_bias.detach()
        return _contrastive_loss(self.dual.loss, image, text, caption_ids(captions, image.device), scale, bias)


class ContrastiveTask(Task):
    """Training without a teacher: images and captions that belong together are drawn together."""

    def __init__(self, model: DualEncoder, captions: Captions, loss: str) -> None:
        """captions: the captions of a batch; loss: "clip" or "sigmoid"."""
        super().__init__()
        self.model, self.captions, self.loss = model, captions, loss
        self.patch = model.image.config.patch_size

    def losses(self, batch: Batch) -> Losses:
        """The contrastive loss over the images of all processes. Those of one class belong together."""
        model = self.model
        image, text = model.encode_image(batch.images), model.encode_text(self.captions(batch))
        ids = batch.labels.to(image.device)
        return {"total": _contrastive_loss(self.loss, image, text, ids, model.logit_scale, model.logit_bias)}


def caption_ids(captions: list[str], device: torch.device) -> Tensor:
    """int64 [B], equal for equal captions on every process."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], device=device)


def _contrastive_loss(kind: str, image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss over the rows of all processes; those of equal ids belong together. kind: "clip" or "sigmoid"."""
    image, text, ids = gather_rows(image), gather_rows(text), gather_rows(ids)
    same = ids[:, None] == ids[None]
    return sigmoid_loss(image, text, same, scale, bias) if kind == "sigmoid" else clip_loss(image, text, same, scale)
