"""Conversion and both stages on real images, small."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

import cgspn
from cgspn.data import Batch, load_embedded
from cgspn.distill import (
    ComputeConfig,
    DistillConfig,
    DivergedError,
    HighResConfig,
    ImageSetFeed,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    distill,
    pretrain,
)
from cgspn.distill.batches import eval_transform
from cgspn.distill.losses import clip_loss
from cgspn.distill.optimizers import build_optimizer
from cgspn.distill.taps import tapped_forward
from cgspn.distill.tasks import DistillTask, SublayerTask
from cgspn.distill.trainer import learning_rate
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, TextConfig, build_dual, model_config
from cgspn.teachers import attention_student, convert

SMALL = {"width": 48, "mixers": ("attention",) * 3, "mlp_hidden": 96, "attention": AttentionConfig(heads=2)}


@pytest.fixture
def images():
    return load_embedded("train").subset(torch.arange(256))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = build_dual(model_config("vit_mini_patch4_28", **SMALL), TextConfig(width=16, depth=1, heads=2), 16)
    with torch.no_grad():  # a random teacher whose attention matters
        for block in model.image.blocks:
            block.mixer.out.weight.mul_(4)
            block.mixer.qkv.weight.mul_(3)
    return model.eval()


def batch(images, config, count=32):
    chosen = torch.arange(count)
    return Batch(0, chosen, eval_transform(config)(images.images[chosen]), images.labels[chosen])


def test_taps_are_the_forward_pass(teacher, images):
    b = batch(images, teacher.image.config)
    taps = tapped_forward(teacher.image, b.images)
    out = teacher.image(b.images)
    assert torch.equal(taps.pooled, out.pooled)
    assert torch.equal(taps.tokens, out.tokens.flatten(1, 2))
    for i, block in enumerate(teacher.image.blocks):
        assert torch.equal(taps.sublayers[i], block.sublayer(taps.block_inputs[i], taps.grid))
        after = taps.block_inputs[i] + taps.sublayers[i]
        assert torch.equal(taps.blocks[i], block.mlp_half(after))


def test_taps_compare_grid_tokens_only(images):
    config = model_config("vit_mini_patch4_28", **SMALL, class_token=True, registers=2, pooling="cls")
    teacher = Encoder(config)
    student = convert(teacher, compression=4)
    assert student.config.prefix == 0
    assert student.config.pooling == "map"
    b = batch(images, config, 4)
    taps = tapped_forward(teacher, b.images)
    assert taps.block_inputs[0].shape[1] == 52
    assert taps.blocks[0].shape[1] == 49
    losses = SublayerTask(teacher, student).losses(b)
    assert all(0.9 < losses[f"block {i}"] < 1.2 for i in range(3))  # a student that adds nothing has error 1
    DistillTask(teacher, student, LossConfig()).losses(b)["total"].backward()


def test_conversion_inherits_what_has_a_twin(teacher):
    encoder = teacher.image
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    reports = []
    student = convert(encoder, compression=4, keep_attention=[1], report=reports.append)
    assert student.config.mixers == ("propagation", "attention", "propagation")
    theirs, mine = encoder.state_dict(), student.state_dict()
    for key in mine:
        if ".mixer." in key and "blocks.1." not in key:
            assert key not in theirs
        elif key != "patch_embed.projection.bias":
            assert torch.equal(mine[key], theirs[key]), key
    mean_position = theirs["positions.table"].mean(0)
    torch.testing.assert_close(
        mine["patch_embed.projection.bias"], theirs["patch_embed.projection.bias"] + mean_position
    )
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    for parameter in student.parameters():
        parameter.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())  # nothing is shared
    (report,) = reports
    assert all(".mixer." in name for name in report.fresh)
    assert "blocks.0.mlp.fc1.weight" in report.inherited


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": 49}, "compression is 49"),
        ({"compression": 0}, "compression is 0"),
        ({"compression": 4, "keep_attention": 4}, "keep_attention is 4; accepted: 0 to 3"),
        ({"compression": 4, "keep_attention": [3]}, r"keep_attention holds \[3\]; accepted: layer indices 0 to 2"),
    ],
)
def test_conversion_refuses(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(teacher.image, **arguments)


def test_blocks_of_stage_one_are_independent(teacher, images):
    """Each block's gradient is that of its own loss alone, and the teacher gets none."""
    student = convert(teacher.image, compression=4)
    b = batch(images, teacher.image.config)
    task = SublayerTask(teacher.image, student)
    task.losses(b)["block 1"].backward()
    for i, block in enumerate(student.blocks):
        touched = [p for p in block.mixer.parameters() if p.grad is not None and p.grad.norm() > 0]
        assert bool(touched) == (i == 1)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_kept_attention_layer_has_nothing_to_learn_in_stage_one(teacher):
    assert SublayerTask(teacher.image, convert(teacher.image, compression=4, keep_attention=[1])).learning == [0, 2]
    assert SublayerTask(teacher.image, attention_student(teacher.image)).learning == [0, 1, 2]


def test_both_stages_learn(teacher, images):
    torch.manual_seed(0)
    optim = OptimConfig(steps=30, batch_size=32, learning_rate=3e-3)
    config = DistillConfig(stage1=optim, stage2=replace(optim, learning_rate=1e-3))
    before = [p.clone() for p in teacher.parameters()]
    student = convert(teacher.image, compression=3)
    histories = distill(teacher, student, images, config)
    model = teacher.with_image(student)
    for history in histories:
        assert history.curve("total")[-1] < 0.9 * history.curve("total")[0], history.title
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.requires_grad for p in teacher.parameters())
    assert not any("adapter" in key for key in model.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compression", [6, 18, 72])
def test_the_first_steps_do_not_explode(images, compression, optimizer):
    """At the paper's compressions, on a width where each leaves a latent, with the recipe's rates and warm-up."""
    torch.manual_seed(0)
    config = model_config("vit_mini_patch4_28", **(SMALL | {"width": 144}))
    teacher = build_dual(config, TextConfig(width=16, depth=1, heads=2), 16).eval()
    # a warm-up of as many steps as the recipe's is most of so short a run
    stage1 = OptimConfig(steps=12, batch_size=32, learning_rate=3e-3, optimizer=optimizer, warmup=0.5)
    stage2 = replace(stage1, learning_rate={"adamw": 1.5e-4, "muon": 2e-4}[optimizer])
    student = convert(teacher.image, compression=compression)
    histories = distill(teacher, student, images, DistillConfig(stage1=stage1, stage2=stage2))
    for history in histories:
        # batches of 32 differ by some tenths among themselves; an explosion is tens to hundreds
        assert max(history.curve("total")) < 1.3 * history.curve("total")[0], history.title
        assert history.curve("total")[-1] < history.curve("total")[0], history.title


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_seed_gives_the_same_student(teacher, images, optimizer):
    stage = OptimConfig(steps=2, batch_size=16, optimizer=optimizer)
    config = DistillConfig(stage1=stage, stage2=stage, compression=4)
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        model = convert(teacher.image, compression=4)
        distill(teacher, model, images, config)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(), {"PP", "PB", "pooled"}),
        (LossConfig(alpha=0), {"PB", "pooled"}),
        (LossConfig(beta=0, adapters=False), {"PP", "pooled"}),
        (LossConfig(alpha=0, beta=0, output=0, contrastive=1), {"contrastive"}),
    ],
)
def test_loss_switches(teacher, images, loss, expected):
    student = convert(teacher.image, compression=4)
    task = DistillTask(
        teacher.image, student, loss, dual=teacher, captions=lambda b: images.captions(indices=b.indices)
    )
    losses = task.losses(batch(images, teacher.image.config))
    taps = {f"{tap} block {i}" for tap in expected & {"PP", "PB"} for i in range(3)}
    assert set(losses) == expected | taps | {"total"}
    for tap in expected & {"PP", "PB"}:
        assert losses[tap] == torch.stack([losses[f"{tap} block {i}"] for i in range(3)]).mean()
    weights = {"PP": loss.alpha, "PB": loss.beta, "pooled": loss.output, "contrastive": 1}
    torch.testing.assert_close(losses["total"], sum(weights[name] * losses[name] for name in expected))
    losses["total"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_templates_with_one_class_name_are_captions_of_each_image_of_the_class(teacher, images):
    """In the loss of a teacher as in pretraining; without classes, equal captions are."""
    loss = LossConfig(alpha=0, beta=0, output=0, contrastive=1)
    few, student = batch(images, teacher.image.config), convert(teacher.image, compression=4)
    captions = images.captions(indices=few.indices)
    same = few.labels[:, None] == few.labels
    alike = torch.tensor([[a == b for b in captions] for a in captions])
    assert 32 < alike.sum() < same.sum()
    image = normalize(teacher.image_projection(student(few.images).pooled), dim=-1)
    text, scale = teacher.encode_text(captions), teacher.logit_scale
    task = DistillTask(teacher.image, student, loss, dual=teacher, captions=lambda b: captions)
    torch.testing.assert_close(task.losses(few)["contrastive"], clip_loss(image, text, same, scale))
    without = replace(few, labels=torch.full_like(few.labels, -1))
    torch.testing.assert_close(task.losses(without)["contrastive"], clip_loss(image, text, alike, scale))


def test_contrastive_without_a_text_tower_is_refused(teacher):
    with pytest.raises(ValueError, match="contrastive is on"):
        DistillTask(teacher.image, convert(teacher.image, compression=4), LossConfig(contrastive=1))
    with pytest.raises(ValueError, match="student has depth 4 and width 96"):
        DistillTask(teacher.image, cgspn.create_model("cgspn_mini_patch4_28"), LossConfig())


@pytest.mark.parametrize("loss", ["clip", "sigmoid"])
@pytest.mark.parametrize("kind", ["vit", "cgspn"])
def test_pretraining_without_a_teacher_learns(images, kind, loss, monkeypatch):
    small = model_config(
        f"{kind}_mini_patch4_28", **(SMALL | {"mixers": model_config(f"{kind}_mini_patch4_28").mixers[:2]})
    )
    monkeypatch.setattr("cgspn.distill.stages.model_config", lambda _: small)
    model, history = pretrain(
        images, PretrainConfig(loss=loss, optim=OptimConfig(steps=25, batch_size=32, learning_rate=3e-3))
    )
    curve = history.curve("total")
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])
    assert not model.training


def test_divergence_stops_before_it_touches_a_weight(teacher, images):
    student = convert(teacher.image, compression=4)
    with torch.no_grad():
        student.blocks[0].mixer.up.bias.fill_(float("nan"))
    before = student.blocks[1].mixer.up.weight.clone()
    with pytest.raises(DivergedError, match=r"block 0, total is not finite at step 0|total, block 0 is not finite"):
        distill(teacher, student, images, DistillConfig(stage1=OptimConfig(steps=3, batch_size=8)))
    assert torch.equal(before, student.blocks[1].mixer.up.weight)


@dataclass(frozen=True)
class Poisoned(ImageSetFeed):
    """A feed whose images of one step are damaged."""

    step: int = 3

    def stream(self, *arguments):
        healthy = super().stream(*arguments)

        def start_at(start):
            for b in healthy(start):
                yield replace(b, images=b.images * float("nan")) if b.step == self.step else b

        return start_at


def test_divergence_keeps_the_last_good_state_and_the_run_goes_on_from_it(teacher, images, tmp_path):
    stage = OptimConfig(steps=5, batch_size=8, ema=0.5)
    config = DistillConfig(stage1=replace(stage, steps=0), stage2=stage, compute=ComputeConfig(save_every=2))
    torch.manual_seed(0)
    student = convert(teacher.image, compression=4)
    whole, begun = copy.deepcopy(student), copy.deepcopy(student)
    distill(teacher, whole, images, config)
    with pytest.raises(DivergedError, match=r"stage 2: .* not finite.* at step 3"):
        distill(teacher, begun, Poisoned(images), config, folder=tmp_path)
    assert (tmp_path / "snapshots/0/00000003").is_dir()
    distill(teacher, student, images, config, folder=tmp_path)
    saved = load_file(tmp_path / "stages/0/model.safetensors")
    assert saved.keys() == student.state_dict().keys()  # no adapters
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), student.parameters(), strict=True))


def test_recomputed_activations_change_nothing_and_bf16_rounds(teacher, images):
    stage = OptimConfig(steps=3, batch_size=8)
    curves, weights = [], []
    for compute in (ComputeConfig(), ComputeConfig(checkpointing=True), ComputeConfig(precision="bfloat16")):
        torch.manual_seed(0)
        student = convert(teacher.image, compression=4)
        histories = distill(teacher, student, images, DistillConfig(stage1=stage, stage2=stage, compute=compute))
        curves.append(torch.tensor([history.curve("total") for history in histories]))
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        assert not student.checkpointing
        assert all(p.dtype == torch.float32 for p in student.parameters())
    assert torch.equal(curves[0], curves[1])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(curves[0], curves[2])
    torch.testing.assert_close(curves[0], curves[2], rtol=2e-2, atol=0)


def test_muon_takes_the_matrices_and_its_updates_are_as_large_as_those_of_adamw(teacher, images):
    student = convert(teacher.image, compression=4)
    task = DistillTask(teacher.image, student, LossConfig())
    optimizer = build_optimizer(task, OptimConfig(optimizer="muon", learning_rate=1e-3, weight_decay=0))
    muon, adamw = optimizer.parts
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert all(p.ndim != 2 or g["weight_decay"] == 0 for g in adamw.param_groups for p in g["params"])
    weight = student.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    task.losses(batch(images, teacher.image.config))["total"].backward()
    optimizer.step()
    moved = float((weight.detach() - before).square().mean().sqrt())
    assert 0.5e-4 < moved < 1e-3  # AdamW's first step: 1e-3, later 0.2e-3


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        *((OptimConfig, "optimizer", "sgd"), (OptimConfig, "weight_decay", -0.1), (OptimConfig, "seed", 1 << 64)),
        *((OptimConfig, name, float("nan")) for name in ("inherited_rate", "embedding_rate", "weight_decay")),
        *((OptimConfig, "steps", 1.5), (OptimConfig, "crop_scale", (0.5,)), (OptimConfig, "learning_rate", math.inf)),
        *((LossConfig, "kl_pb", float("nan")), (LossConfig, "alpha", -1.0), (DistillConfig, "image_size", 0)),
        *((ComputeConfig, "precision", "fp8"), (ComputeConfig, "parallel", "tp"), (ComputeConfig, "save_every", -1)),
        *((HighResConfig, "teacher", "older"), (HighResConfig, "sizes", (0,)), (PretrainConfig, "loss", "mse")),
    ],
)
def test_settings_are_checked_at_construction(config, field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*; accepted: "):
        config(**{field: value})


@pytest.mark.parametrize("augment", [True, False])
def test_without_augmentation_training_sees_the_images_it_is_judged_on(teacher, images, augment):
    seen = []
    step = OptimConfig(steps=1, batch_size=64, augment=augment)
    student = convert(teacher.image, compression=4)
    student.patch_embed.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    distill(teacher, student, images, DistillConfig(stage1=replace(step, steps=0), stage2=step))
    known = batch(images, teacher.image.config, 256).images.flatten(1)
    apart = torch.cdist(seen[-1].flatten(1), known, p=torch.inf).amin(1)
    assert (float(apart.max()) == 0) is not augment


def test_learning_rate_warms_up_and_ends_at_zero():
    config = OptimConfig(steps=100, warmup=0.1)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[-1] < 1e-3
    for field, value in (("steps", -1), ("batch_size", 0), ("warmup", 2), ("learning_rate", float("nan"))):
        with pytest.raises(ValueError, match=f"{field} is"):
            OptimConfig(**{field: value})
