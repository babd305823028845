"""Whoever wraps, hooks, adapts, prunes, casts or shards a part of an encoder gets what that does."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize, prune

import cgspn
from cgspn.distill import DistillConfig, LossConfig, World
from cgspn.distill.plan import check_possible
from cgspn.distill.tasks import DistillTask, SublayerTask, inherited_names
from cgspn.layers import Block, PropagationMixer

MODELS = ["cgspn_mini_patch4_28", "vit_mini_patch4_28"]
PARTS = ["patch_embed.projection", "blocks.1", "blocks.1.norm1", "blocks.1.mixer", "blocks.1.norm2", "blocks.1.mlp"]
PARTS += ["blocks.1.mlp.fc1", "norm", "pool", "pool.q", "pool.mlp.fc2"]
OURS = [f"blocks.1.mixer.{part}" for part in ("down", "local", "norm", "param_proj", "merge_norm", "up")]
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def encoder_of(name):
    torch.manual_seed(0)
    encoder = cgspn.create_model(name).eval()
    for module in encoder.modules():
        if isinstance(module, PropagationMixer):  # as after training: the mixers count
            nn.init.normal_(module.up.weight, std=0.2)
    return encoder


def replace(model, name, wrap):
    parent, _, own = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, own, wrap(model.get_submodule(name)))


class Adapter(nn.Module):
    """What peft's LoRA does to a linear layer or a convolution, and its modules_to_save to any module."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)  # as peft does: weight, in_features and so on

    def forward(self, *args, **kwargs):
        out = self.base_layer(*args, **kwargs)
        return out * torch.linspace(0.5, 1.5, out.shape[-1]) if isinstance(out, torch.Tensor) else out


CASES = [(model, part) for model in MODELS for part in PARTS + (OURS if model == MODELS[0] else [])]


@pytest.mark.parametrize(("model", "part"), CASES)
@torch.no_grad()
def test_wrappers_and_hooks_of_a_part_act(model, part):
    encoder = encoder_of(model)
    before = encoder(IMAGES)
    replace(encoder, part, checkpoint_wrapper)
    torch.testing.assert_close(encoder(IMAGES).tokens, before.tokens)

    encoder = encoder_of(model)
    replace(encoder, part, functools.partial(torch.compile, backend="eager"))
    torch.testing.assert_close(encoder(IMAGES).tokens, before.tokens)

    encoder, seen = encoder_of(model), []
    encoder.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    encoder(IMAGES)
    assert seen == [1]

    encoder = encoder_of(model)
    replace(encoder, part, Adapter)
    after = encoder(IMAGES)
    changed = (after.tokens - before.tokens).abs().max() + (after.pooled - before.pooled).abs().max()
    assert changed > 1e-4

    encoder = encoder_of(model)  # a wrapper without the attributes of what it wraps, as FSDP1's and DDP's
    replace(encoder, part, functools.partial(nn.DataParallel, device_ids=[]))
    torch.testing.assert_close(encoder(IMAGES).tokens, before.tokens)

    encoder = encoder_of(model)  # as accelerate's hooks, which bring weights from elsewhere
    module, seen = encoder.get_submodule(part), []
    old = module.forward
    module.forward = lambda *args, **kwargs: (seen.append(1), old(*args, **kwargs))[1]
    torch.testing.assert_close(encoder(IMAGES).tokens, before.tokens)
    assert seen == [1]


@pytest.mark.parametrize(
    "part", [part for part in PARTS + OURS if part.split(".")[-1] not in ("1", "mixer", "mlp", "pool")]
)
@torch.no_grad()
def test_pruning_and_parametrizations_act(part):
    def halved(weight):
        return weight / 2

    class Halved(nn.Module):
        def forward(self, weight):
            return halved(weight)

    encoder = encoder_of(MODELS[0])
    encoder.get_submodule(part).weight.data = halved(encoder.get_submodule(part).weight)
    want = encoder(IMAGES)
    encoder = encoder_of(MODELS[0])
    parametrize.register_parametrization(encoder.get_submodule(part), "weight", Halved())
    torch.testing.assert_close(encoder(IMAGES).pooled, want.pooled)

    encoder = encoder_of(MODELS[0])
    module = encoder.get_submodule(part)
    prune.random_unstructured(module, "weight", 0.5)
    pruned = encoder(IMAGES).pooled
    prune.remove(module, "weight")
    torch.testing.assert_close(pruned, encoder(IMAGES).pooled)


def test_resizing_patches_does_not_drop_an_adapter():
    encoder = encoder_of(MODELS[0])
    replace(encoder, "patch_embed.projection", Adapter)
    with pytest.raises(ValueError, match="projection is a Adapter; expected a Conv2d"):
        encoder.set_input_size(patch_size=7)


@pytest.mark.parametrize("wrap", [lambda module: module, Adapter, torch.compile])
def test_images_need_the_dtype_of_the_patch_embedding_whatever_the_rest_has(wrap):
    encoder = encoder_of(MODELS[0]).double()
    encoder.patch_embed.bfloat16()
    replace(encoder, "patch_embed", wrap)
    assert encoder.input_weight.dtype == torch.bfloat16
    assert encoder.to("meta").input_weight.device.type == "meta"


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_blocks_are_found_by_position(model):
    encoder = encoder_of(model)
    before = encoder(IMAGES).tokens
    maps = encoder.forward_intermediates(IMAGES)
    apply_activation_checkpointing(encoder, check_fn=lambda m: isinstance(m, Block))
    assert len(encoder.each_block()) == encoder.config.depth
    torch.testing.assert_close(encoder(IMAGES).tokens, before)
    for a, b in zip(maps, encoder.forward_intermediates(IMAGES), strict=True):
        torch.testing.assert_close(a, b)
    ran = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    for block in encoder.each_block():  # taps go through the wrapper too
        encoder.run_tapped(block, *encoder.embed(IMAGES))
    assert len(ran) == encoder.config.depth


@torch.no_grad()
def test_a_wrapped_window_block_gets_rows():
    encoder = encoder_of("window_mini_patch4_28")
    before = encoder(IMAGES).tokens
    replace(encoder, "blocks.1", functools.partial(nn.DataParallel, device_ids=[]))
    torch.testing.assert_close(encoder(IMAGES).tokens, before)


@pytest.mark.parametrize("wrap", [functools.partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_a_teacher_of_wrapped_blocks_hands_on_its_weights(wrap):
    teacher, wrapped = encoder_of("vit_mini_patch4_28"), encoder_of("vit_mini_patch4_28")
    for i in range(teacher.config.depth):
        replace(wrapped, f"blocks.{i}", wrap)
    student = cgspn.convert(wrapped, compression=4, keep_attention=[1])
    assert inherited_names(student, wrapped) == inherited_names(student, teacher)
    replace(student, "blocks.1", wrap)
    task = SublayerTask(wrapped, student)
    assert task.learning == [0, *range(2, teacher.config.depth)]
    assert DistillTask(wrapped, student, LossConfig()).inherits(
        next(f"student.{name}" for name, _ in student.named_parameters() if name.startswith("blocks.1"))
    )


def test_a_wrapper_that_hides_a_block_is_named():
    teacher = encoder_of("vit_mini_patch4_28")
    student = cgspn.convert(teacher, compression=4)
    hide = functools.partial(nn.DataParallel, device_ids=[])
    replace(student, "blocks.1", hide)
    with pytest.raises(ValueError, match=r"student.blocks\[1\] is a DataParallel, which hides its block; expected"):
        check_possible(teacher, student, DistillConfig(), World())
    replace(teacher, "blocks.1", hide)
    with pytest.raises(
        ValueError, match=r"encoder has no blocks.1.mlp.fc1.bias, .* or a wrapper hides them; remove it"
    ):
        cgspn.convert(teacher, compression=4)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_linear_layers_in_int8(model):
    encoder = encoder_of(model)
    want = encoder(IMAGES).pooled
    quantized = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    got = quantized(IMAGES).pooled
    assert 0 < float((got - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("model", [*MODELS, "hybrid_mini_patch4_28", "window_mini_patch4_28", "gspn_mini_patch4_28"])
def test_an_empty_batch(model):
    encoder = encoder_of(model)
    out = encoder(IMAGES[:0])
    assert out.tokens.shape == (0, 7, 7, encoder.config.width)
    assert out.pooled.shape == (0, encoder.config.pooled_width)
    (out.tokens.sum() + out.pooled.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())
    assert [m.shape[0] for m in encoder.forward_intermediates(IMAGES[:0], [0, 1])] == [0, 0]


@torch.no_grad()
def test_an_image_that_is_not_finite_does_not_fail_its_neighbours():
    encoder = encoder_of(MODELS[0])
    images = IMAGES.clone()
    images[0, 0, 3, 3] = float("nan")
    compiled = torch.compile(encoder, backend="eager")
    for run in (encoder, compiled):
        out = run(images)
        assert out.pooled[0].isnan().all()
        torch.testing.assert_close(out.pooled[1], encoder(IMAGES[1:]).pooled[0])
