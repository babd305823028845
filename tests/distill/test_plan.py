"""What the stages of a run are, for every switch of the recipe."""

import pytest
import torch

from cgspn.data import Batch
from cgspn.distill import DistillConfig, HighResConfig, LossConfig, OptimConfig, SizeRange, World
from cgspn.distill.batches import blended_share
from cgspn.distill.plan import plan
from cgspn.distill.runtime import Runtime
from cgspn.distill.taps import observe, tapped_forward
from cgspn.distill.tasks import DistillTask, SublayerTask
from cgspn.layers import AttentionConfig
from cgspn.models import TextConfig, build_dual, model_config
from cgspn.teachers import convert

SMALL = {"width": 48, "mixers": ("attention",) * 3, "mlp_hidden": 96, "attention": AttentionConfig(heads=2)}


class NoFeed:
    def captions(self, batch):
        return []


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    teacher = build_dual(model_config("vit_mini_patch4_28", **SMALL), TextConfig(width=16, depth=1, heads=2), 16).eval()
    return teacher, convert(teacher.image, compression=4)


def tasks(pair, **changes):
    teacher, student = pair
    config = DistillConfig(loss=LossConfig(contrastive=0.5), highres=HighResConfig(**changes))
    stages = plan(teacher, student, NoFeed(), config, "student", World())
    return [(stage.size[0], stage.task(student, Runtime())) for stage in stages]


def test_the_curriculum_climbs_from_size_to_size_each_taught_by_the_one_before(pair):
    teacher, student = pair
    (_, first), (_, second), *high = tasks(pair, sizes=(56, 84), teacher="previous")
    assert isinstance(first, SublayerTask)
    assert isinstance(second, DistillTask)
    assert second.teacher is teacher.image
    assert [(size, task.teacher_size[0]) for size, task in high] == [(56, 28), (84, 56)]
    for _, task in high:
        assert task.teacher is not student
        assert not any(p.requires_grad for p in task.teacher.parameters())
        assert all(torch.equal(a, b) for a, b in zip(task.teacher.parameters(), student.parameters(), strict=True))


def test_a_direct_jump_is_taught_by_the_first_size(pair):
    [(size, task)] = tasks(pair, sizes=(84,), teacher="previous")[2:]
    assert (size, task.teacher_size) == (84, (28, 28))


def test_without_upsampling_the_teacher_is_the_original_or_none(pair):
    [(_, original)] = tasks(pair, sizes=(56,))[2:]
    assert original.teacher is pair[0].image
    assert original.teacher_size is None
    [(_, alone)] = tasks(pair, sizes=(56,), teacher="none")[2:]
    assert not alone.compares
    assert alone.config.contrastive == 0.5
    assert not list(alone.adapters.parameters())


def test_a_student_may_not_train_its_own_teacher(pair):
    teacher = pair[0]
    for student in (teacher.image, convert(teacher.image, compression=4, share=True)):
        with pytest.raises(ValueError, match="student shares weights with teacher"):
            plan(teacher, student, None, DistillConfig(), "student", World())


def test_a_run_that_would_minimise_nothing_is_refused_before_it_begins():
    with pytest.raises(ValueError, match="alpha, beta, output and contrastive are all 0"):
        LossConfig(alpha=0, beta=0, output=0)
    with pytest.raises(ValueError, match=r"highres\.teacher is 'none' and loss.contrastive is 0"):
        DistillConfig(highres=HighResConfig(sizes=(56,), teacher="none"))


@torch.no_grad()
def test_taps_of_a_smaller_image_are_upsampled_bilinearly(pair):
    student = pair[1].eval()
    large = torch.nn.functional.interpolate(torch.randn(2, 3, 7, 7), (56, 56), mode="bilinear")
    small = torch.nn.functional.interpolate(large, (28, 28), mode="bilinear", antialias=True)
    seen, theirs = observe(student, large, student.config, (28, 28)), tapped_forward(student, small)
    for mine, other in zip([*seen.sublayers, *seen.blocks], [*theirs.sublayers, *theirs.blocks], strict=True):
        # new position 2 lies three quarters of the way from old position 0 to 1, in both directions
        old, new = other.unflatten(1, (7, 7)), mine.unflatten(1, (14, 14))
        wanted = 0.25 * old[:, 0] + 0.75 * old[:, 1]
        torch.testing.assert_close(new[:, 2, 0], wanted[:, 0])
        torch.testing.assert_close(new[:, 2, 2], 0.25 * wanted[:, 0] + 0.75 * wanted[:, 1])
    assert torch.equal(seen.pooled, theirs.pooled)


def test_higher_resolutions_keep_smaller_sizes_in_the_mix(pair):
    def shapes(smaller, sizes=None):
        config = DistillConfig(sizes=sizes, highres=HighResConfig(sizes=(56, 112), smaller=smaller))
        return [stage.shapes(4) for stage in plan(*pair, NoFeed(), config, "student", World())[2:]]

    assert shapes(0) == [((56, 56),), ((112, 112),)]
    assert shapes(0.5) == [
        ((28, 28), (40, 40), (56, 56), (56, 56)),
        ((28, 28), (36, 36), (48, 48), (64, 64), (84, 84), *[(112, 112)] * 5),
    ]
    [first, _] = shapes(0.2, SizeRange(16, 32, 3))
    assert sorted(set(first)) == [(16, 16), (20, 20), (28, 28), (40, 40), (56, 56)]
    assert first.count((56, 56)) == 16
    with pytest.raises(ValueError, match="smaller is 1; accepted: 0 to below 1"):
        HighResConfig(smaller=1)


def test_the_same_student_at_a_smaller_size_sees_small_images_as_they_are(pair):
    [(_, task)] = tasks(pair, sizes=(56,), teacher="previous")[2:]
    assert task.seen_at((16, 24)) == (16, 24)
    assert task.seen_at((56, 56)) == (28, 28)
    assert task.seen_at((40, 80)) == (20, 40)
    grid = task.observed(Batch(0, torch.arange(2), torch.randn(2, 3, 40, 80), torch.zeros(2)), torch.zeros(2, 200, 48))
    assert grid.blocks[0].shape == (2, 200, 48)


def test_what_counts_as_the_teachers_stays_so_in_all_stages(pair):
    (_, _), (_, second), (_, high), (_, last) = tasks(pair, sizes=(56, 84), teacher="previous")
    assert second.inherited == high.inherited == last.inherited
    assert "blocks.1.mlp.fc1.weight" in high.inherited
    assert not [name for name in high.inherited if "mixer" in name or "norm1" in name]


def test_a_stage_goes_on_with_the_adapters_and_scales_of_the_one_before(pair):
    (_, _), (_, second), (_, high) = tasks(pair, sizes=(56,))
    with torch.no_grad():
        for parameter in second.adapters.parameters():
            parameter.normal_()
    second.energies.values.fill_(3.0)
    high.carry_on(second.carried())
    assert all(torch.equal(a, b) for a, b in zip(second.adapters.parameters(), high.adapters.parameters(), strict=True))
    assert torch.equal(high.energies.values, second.energies.values)
    stages = plan(*pair, NoFeed(), DistillConfig(highres=HighResConfig(sizes=(56, 84))), "student", World())
    assert [stage.goes_on for stage in stages] == [False, False, True, True]


def test_parts_of_a_batch_divide_each_processes_share():
    optim = OptimConfig(batch_size=8, accumulate=4)
    assert blended_share(optim, World(1, 2)) == slice(4, 8)
    with pytest.raises(
        ValueError, match="accumulate is 4; accepted: divisors of a process's share of batch_size, 2 im"
    ):
        blended_share(optim, World(0, 4))
