"""The teacher's features kept in memory: the same training, and a teacher that is asked once."""

from dataclasses import replace

import pytest
import torch

from cgspn.data import load_embedded
from cgspn.distill import ComputeConfig, DistillConfig, HighResConfig, OptimConfig, distill
from cgspn.distill.cache import TeacherCache
from cgspn.distill.taps import tapped_forward
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, model_config
from cgspn.teachers import convert

SMALL = {"width": 48, "mixers": ("attention",) * 3, "mlp_hidden": 96, "attention": AttentionConfig(heads=2)}
STAGE = OptimConfig(steps=4, batch_size=32, augment=False)


def encoder(**changes):
    torch.manual_seed(0)
    return Encoder(model_config("vit_mini_patch4_28", **SMALL, **changes)).eval()


@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "registers": 2, "pooling": "cls"}])
@torch.no_grad()
def test_what_is_unpacked_is_what_was_packed(prefix):
    taps = tapped_forward(encoder(**prefix), torch.randn(3, 3, 28, 28))
    back = taps.with_features(taps.features())
    for mine, theirs in zip(back[:2], taps[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(back.tokens, taps.tokens)
    assert torch.equal(back.pooled, taps.pooled)


def test_a_cache_keeps_what_fits_and_computes_the_rest():
    teacher, images = encoder(), torch.randn(6, 3, 28, 28)
    one = sum(f[0].numel() * 2 for f in tapped_forward(teacher, images[:1]).features())
    cache, computed = TeacherCache(4.5 * one), []

    def ask(*indices):
        def compute():
            computed.append(indices)
            return tapped_forward(teacher, images[list(indices)])

        return cache.taps(torch.tensor(indices), compute)

    first, again = ask(0, 1, 2), ask(2, 0, 1)
    assert all(torch.equal(a[[2, 0, 1]], b) for a, b in zip(first.features(), again.features(), strict=True))
    ask(3, 4, 5)
    ask(3, 0)
    ask(4, 5)
    assert computed == [(0, 1, 2), (3, 4, 5), (4, 5)]
    assert len(cache.kept) == 4
    assert cache.used <= cache.limit


def test_training_from_the_cache_is_training_and_its_teacher_is_asked_once(monkeypatch):
    teacher, images = encoder(), load_embedded("train").subset(torch.arange(64))
    asked = []
    teacher.patch_embed.register_forward_hook(lambda *_: asked.append(1))
    highres = HighResConfig((56,), "previous", optim=STAGE)
    config = DistillConfig(compression=4, stage1=STAGE, stage2=STAGE, highres=highres)
    losses, weights, calls = [], [], []
    for gigabytes in (0, 1):
        asked.clear()
        torch.manual_seed(0)
        student = convert(teacher, compression=4)
        compute = ComputeConfig(teacher_cache=gigabytes)
        histories = distill(teacher, student, images, replace(config, compute=compute))
        losses.append(torch.tensor([h.curve("total") for h in histories]))
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
        calls.append(len(asked))
    assert calls[0] >= 10  # parity, calibration and four steps of two stages
    assert calls[1] == 4  # two for parity, and one epoch of two batches: stage 2 sees what stage 1 has left
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)  # features of 8 bits
    assert (weights[0] - weights[1]).norm() / weights[0].norm() < 5e-3


def test_a_cache_of_images_that_change_is_refused():
    teacher = encoder()
    config = DistillConfig(compute=ComputeConfig(teacher_cache=1))
    images = load_embedded("train").subset(torch.arange(64))
    with pytest.raises(ValueError, match="teacher_cache is on, but student, stage 1 crops or blends at random"):
        distill(teacher, convert(teacher, compression=4), images, config)
