"""Tasks: each holds its models and computes the losses of a batch for the trainer."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..data import Batch
from ..layers import Block
from ..models.dual import DualEncoder
from ..models.encoder import Encoder
from ..models.weights import unwrapped, without_wrappers
from .adapters import Adapters
from .config import LossConfig
from .flops import forward_flops, sublayer_flops, training_flops
from .losses import clip_loss, relative_mse, sigmoid_loss
from .parallel import full_tensor, gather_rows
from .runtime import Runtime
from .sizes import with_area
from .taps import Taps, observe, retarget_first_block, tapped_forward
from .target_scales import TargetScales

Losses = dict[str, Tensor]
Size = tuple[int, int]  # (height, width) in pixels
Captions = Callable[[Batch], list[str]]

INHERITED = "inherited"  # JSON of names as bytes, among the tensors that a stage leaves


class Task(nn.Module):
    """The interface for `train`. All parameters of a task are trained; a teacher is not registered as a submodule.

    Attributes:
        patch: patch size of the student in pixels.
        reduction: how losses of several processes are combined; "sum" if each process trains other parameters.
        sharded: whether the parameters are sharded over the processes (FSDP2).
        capturable: whether a CUDA graph can capture the losses, because they do not need the CPU.
    """

    patch: int
    reduction: Literal["mean", "sum"] = "mean"
    sharded: bool = False
    capturable: bool = False

    def calibrate(self, parts: list[Batch]) -> None:
        """Measure constants, such as target scales, on the parts of the first batch of a run."""

    def losses(self, batch: Batch) -> Losses:
        """Named scalars; "total" is minimised, the others are logged."""
        raise NotImplementedError

    def flops(self, size: Size) -> int | None:
        """FLOPs of teacher and student per image of `size` (height, width) pixels; None if they are not counted."""
        return None

    def inherits(self, name: str) -> bool:
        """Whether a parameter comes from the teacher; `OptimConfig.inherited_rate` then applies to it."""
        return False

    def forward(self, batch: Batch) -> Losses:
        """The losses; FSDP2 gathers weights around this call."""
        return self.losses(batch)

    def collect(self) -> None:
        """After the last step, share weights that only one process has trained with all processes."""

    def carried(self) -> dict[str, Tensor]:
        """What a later stage or run continues with. All processes must call this."""
        return {}

    def carry_on(self, state: Mapping[str, Tensor]) -> None:
        """Continue with what an earlier stage or run left (`carried`)."""

    def _look_at(self, **models: object) -> None:
        """Store modules without registering them as submodules, so that they are not trained or saved."""
        vars(self).update(models)


class TeacherTask(Task):
    """Base class of both stages, with a frozen teacher whose taps are compared with the student's."""

    teacher: Encoder
    student: Encoder
    energies: TargetScales
    compares: bool = True

    def __init__(
        self,
        teacher: Encoder,
        student: Encoder,
        *,
        learn_positions: bool = True,
        inherited: frozenset[str] | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        """learn_positions: see `DistillConfig`. inherited: names of the student's weights that count as inherited; None
        for those that equal the teacher's now. Raises ValueError if depths or widths differ."""
        super().__init__()
        if (teacher.config.depth, teacher.config.width) != (student.config.depth, student.config.width):
            raise ValueError(
                f"student has depth {student.config.depth} and width {student.config.width}; "
                f"expected the teacher's {teacher.config.depth} and {teacher.config.width}"
            )
        self.inherited = inherited_names(student, teacher) if inherited is None else inherited
        self.runtime = runtime or Runtime()
        self._look_at(teacher=teacher)
        self.patch = student.config.patch_size
        self.learn_positions = learn_positions and teacher.positions is not None and student.positions is None

    def carried(self) -> dict[str, Tensor]:
        """Which weights are inherited."""
        return {INHERITED: torch.tensor(list(json.dumps(sorted(self.inherited)).encode()), dtype=torch.uint8)}

    def targets(self, taps: Taps) -> list[Tensor]:
        """The teacher's features by whose mean squares the losses are divided."""
        raise NotImplementedError

    def seen_at(self, size: Size) -> Size:
        """The size (height, width) in pixels to which images of `size` are resized for the teacher."""
        return size

    @torch.no_grad()
    def calibrate(self, parts: list[Batch]) -> None:
        """Measure the target scales."""
        if self.compares:
            self.energies.measure(self.targets(self.observed(part)) for part in parts)

    @torch.no_grad()
    def observed(self, batch: Batch, entry: Tensor | None = None) -> Taps:
        """The teacher's taps, computed or from the cache. With learned positions, the first target is adapted to the
        student's first tokens, `entry` [B, h*w, C]."""
        size, cache = (batch.images.shape[-2], batch.images.shape[-1]), self.runtime.cache
        run = self.runtime.tapped
        look = partial(observe, self.teacher, batch.images, self.student.config, self.seen_at(size), run)
        taps = look() if cache is None else cache.taps(batch.indices, look, size)
        if not self.learn_positions:
            return taps
        return retarget_first_block(taps, self.student.embed(batch.images)[0] if entry is None else entry)


def inherited_names(student: Encoder, teacher: Encoder) -> frozenset[str]:
    """The names, without wrappers, of the student's parameters that equal the teacher's of the same name and shape."""
    theirs, mine = (without_wrappers(dict(each.named_parameters()), "this model") for each in (teacher, student))
    return frozenset(
        name
        for name, parameter in mine.items()
        if (same := theirs.get(name)) is not None and same.shape == parameter.shape and torch.equal(same, parameter)
    )


def inherited_before(carried: Mapping[str, Tensor]) -> frozenset[str]:
    """The names that an earlier run recorded in `carried` as inherited; training has changed their values since."""
    recorded = carried.get(INHERITED)
    return frozenset() if recorded is None else frozenset(json.loads(bytes(recorded.tolist())))


def learning_blocks(student: Encoder, inherited: frozenset[str]) -> list[int]:
    """The indices of the student's blocks whose mixer is not among the names of inherited weights."""
    names = {unwrapped(name) for name, _ in student.named_parameters()}
    fresh = [name for name in names - inherited if ".mixer." in name]
    return sorted({int(name.split(".")[1]) for name in fresh})


class SublayerTask(TeacherTask):
    """Stage 1: block i of the student gets the teacher's input of that block and learns the teacher's sub-layer output.

    Blocks are independent: there are no gradients between them, and one pass of the teacher gives all inputs. Blocks
    with an inherited mixer are not trained. Paper: stage 1 (docs/paper.md).
    """

    def __init__(self, teacher: Encoder, student: Encoder, **options: Any) -> None:
        """options: those of `TeacherTask`, with the same errors."""
        super().__init__(teacher, student, **options)
        self.learning = learning_blocks(student, self.inherited)
        self._look_at(student=student)
        self.capturable = self.runtime.cache is None
        self.parts = nn.ModuleDict({str(i): sublayer_parts(student.each_block()[i]) for i in self.own_blocks()})
        self.energies = TargetScales(len(self.learning)).to(next(student.parameters()).device)

    def own_blocks(self) -> list[int]:
        """The blocks that this process trains."""
        return self.learning

    def features_of_own(self, *features: dict[int, Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each own block with its features, from dicts by block."""
        for i in self.own_blocks():
            yield i, [each[i] for each in features]

    def inherits(self, name: str) -> bool:
        """Norms and LayerScales are inherited; mixers are fresh."""
        return ".mixer." not in name

    def flops(self, size: Size) -> int:
        """See `Task`."""
        return forward_flops(self.teacher.config, size) + sublayer_flops(self.student.config, size, self.learning)

    def targets(self, taps: Taps) -> list[Tensor]:
        """The teacher's sub-layer outputs of the trained blocks."""
        return [taps.sublayers[i] for i in self.learning]

    def losses(self, batch: Batch) -> Losses:
        """The relative MSE of each sub-layer, "block i", and their sum; zero for blocks of other processes."""
        taps = self.observed(batch)
        energies = self.energies.of(self.targets(taps))
        energy, zero = dict(zip(self.learning, energies, strict=True)), energies.new_zeros(())
        losses: Losses = {f"block {i}": zero for i in self.learning}
        theirs, grid = taps.grid, taps.grid._replace(prefix=self.student.config.prefix)
        features = [{i: each[i] for i in self.learning} for each in (taps.block_inputs, taps.sublayers)]
        del taps  # features that are sent to another process are freed
        for i, (tokens, wanted) in self.features_of_own(*features):
            tokens = tokens[:, theirs.prefix - grid.prefix :]
            branch = self.runtime.sublayer(self.student.each_block()[i], tokens, grid)
            losses[f"block {i}"] = relative_mse(branch[:, grid.prefix :], wanted, energy[i])
        return {"total": torch.stack([zero, *losses.values()]).sum(), **losses}


def sublayer_parts(block: Block) -> nn.ModuleDict:
    """The parts of a block that stage 1 trains."""
    return nn.ModuleDict({"mixer": block.mixer, "norm1": block.norm1, "scale1": block.scale1})


class DistillTask(TeacherTask):
    """Stage 2: the whole student is compared with the teacher at two taps per block, through adapters.

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
        **options: Any,
    ) -> None:
        """dual and captions: the teacher's image-text model and the captions of a batch, for the contrastive loss.

        teacher_size: (height, width) in pixels of the largest teacher input. Larger images are resized to that area,
        and the taps are upsampled to the student's grid. options: those of `TeacherTask`, with the same errors.

        Also raises ValueError if the contrastive loss lacks a text tower or captions.
        """
        super().__init__(teacher, student, **options)
        if config.contrastive and (dual is None or captions is None):
            raise ValueError("contrastive is on; expected a teacher with a text tower, and captions")
        self.config, self.captions, self.teacher_size = config, captions, teacher_size
        self._look_at(dual=dual)
        self.sharded = self.runtime.sharded
        self.student = student
        self.compares = bool(config.alpha or config.beta or config.output)
        self.capturable = not config.contrastive and self.runtime.cache is None
        self.earlier: Mapping[str, Tensor] = {}
        device = next(student.parameters()).device
        depth, width = student.config.depth, student.config.width
        self.adapted = [config.adapters and weight != 0 for weight in (config.alpha, config.beta)]
        self.adapters = Adapters(depth, width, sublayers=self.adapted[0], blocks=self.adapted[1]).to(device)
        self.energies = TargetScales(2 * depth + 1).to(device)

    def inherits(self, name: str) -> bool:
        """Adapters are fresh, and so are weights that stage 1 has trained."""
        return unwrapped(name).removeprefix("student.") in self.inherited

    def flops(self, size: Size) -> int:
        """See `Task`. The text tower of a contrastive loss is not counted."""
        theirs = forward_flops(self.teacher.config, self.seen_at(size)) if self.compares else 0
        at_sublayers, at_blocks = self.adapted
        student = self.student.config
        return theirs + training_flops(student, size, sublayer_adapters=at_sublayers, block_adapters=at_blocks)

    def seen_at(self, size: Size) -> Size:
        """See `TeacherTask`; at most `teacher_size`."""
        largest = self.teacher_size
        if largest is None or size[0] * size[1] <= largest[0] * largest[1]:
            return size
        return with_area(size, largest, self.teacher.config.patch_size)

    def _around(self) -> dict[str, Tensor]:
        """The modules that belong to the loss and not to the student: adapters and target scales."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("student.")}

    def carried(self) -> dict[str, Tensor]:
        """Full tensors of adapters and target scales, and which weights are inherited. A stage that compares nothing
        has only the adapters and scales of earlier ones."""
        around = self._around() if self.compares else self.earlier
        return {name: full_tensor(value).detach().clone() for name, value in around.items()} | super().carried()

    def carry_on(self, state: Mapping[str, Tensor]) -> None:
        """Load adapters and target scales. Raises ValueError if they do not match this encoder and loss."""
        self.earlier = {name: value for name, value in state.items() if name != INHERITED}
        if not self.compares:
            return
        mine = {name: value.shape for name, value in self._around().items()}
        if self.earlier and mine != {name: value.shape for name, value in self.earlier.items()}:
            raise ValueError(
                f"carried holds {len(self.earlier)} adapters and scales of another loss or encoder, not {len(mine)}; "
                "give the loss settings of the earlier run (adapters, alpha, beta), or train stage 2 again"
            )
        self.load_state_dict(self.earlier, strict=False)

    def targets(self, taps: Taps) -> list[Tensor]:
        """The teacher's features at all taps, and its pooled vector."""
        return [*taps.sublayers, *taps.blocks, taps.pooled]

    def losses(self, batch: Batch) -> Losses:
        """PP and PB losses averaged over blocks, the pooled and contrastive losses, and their weighted sum "total".

        Also the loss of each tap, "PP block i" and "PB block i".
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
        return _contrastive_loss(self.dual.loss, image, text, pair_ids(batch, captions, image.device), scale, bias)


class ContrastiveTask(Task):
    """Contrastive training of an image-text model without a teacher."""

    def __init__(self, model: DualEncoder, captions: Captions, loss: str) -> None:
        """captions: the captions of a batch; loss: "clip" or "sigmoid"."""
        super().__init__()
        self.model, self.captions, self.loss = model, captions, loss
        self.patch = model.image.config.patch_size

    def losses(self, batch: Batch) -> Losses:
        """The contrastive loss over the images of all processes."""
        model, captions = self.model, self.captions(batch)
        image, text = model.encode_image(batch.images), model.encode_text(captions)
        ids = pair_ids(batch, captions, image.device)
        return {"total": _contrastive_loss(self.loss, image, text, ids, model.logit_scale, model.logit_bias)}


def pair_ids(batch: Batch, captions: list[str], device: torch.device) -> Tensor:
    """Ids of a batch's pairs, int64 [B], equal where an image and another's caption also belong together.

    These are images of one class, whose captions may be different templates with its name, and images without a class
    that have equal captions. Ids are the same on every process.
    """
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    ids = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], device=device)
    labels = batch.labels.to(device)
    return torch.where(labels < 0, ids, labels)


def _contrastive_loss(kind: str, image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss over the rows of all processes. Rows with equal ids are positives. kind: "clip" or "sigmoid"."""
    image, text, ids = gather_rows(image), gather_rows(text), gather_rows(ids)
    same = ids[:, None] == ids[None]
    return sigmoid_loss(image, text, same, scale, bias) if kind == "sigmoid" else clip_loss(image, text, same, scale)
