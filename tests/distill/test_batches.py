"""Feeds: normalisation, shares of processes, captions, limits, and how long training waits."""

import io
import tarfile
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cgspn.data import Batch, LoaderConfig, TrainTransform, open_samples
from cgspn.data.transforms import blend, blend_factors, jitter_colors, jitter_factors, paste, paste_boxes
from cgspn.distill import DistillConfig, LossConfig, OptimConfig, SampleFeed, World
from cgspn.distill.taps import observe, tapped_forward
from cgspn.distill.throughput import WARM, Throughput
from cgspn.models import create_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OPTIM = OptimConfig(steps=6, batch_size=8, seed=1)


def encoder(mean=MEAN, std=STD):
    return create_model("vit_mini_patch4_28", image_mean=mean, image_std=std).eval()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(20):
            image = io.BytesIO()
            Image.effect_noise((40, 32), 60).convert("RGB").save(image, "PNG")
            for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.txt", f"photo {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_samples(str(path), cache=tmp_path / "cache")


def stream(source, optim=OPTIM, world=None, loader=None, config=None):
    feed = SampleFeed(source, loader or LoaderConfig(workers=0), captioned=True)
    return feed, feed.stream(config or encoder().config, (28, 28), optim, world or World())


def test_images_are_normalised_as_the_encoder_wants_them(source):
    _, start = stream(source)
    _, plain = stream(source, config=encoder((0.0,) * 3, (1.0,) * 3).config)
    for batch, pixels in zip(start(0), plain(0)):
        assert batch.images.dtype == torch.float32
        assert 0 <= float(pixels.images.min()) < float(pixels.images.max()) <= 1
        expected = (pixels.images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(batch.images, expected)


def test_two_processes_see_the_halves_of_what_one_sees_and_any_step_can_be_the_first(source):
    optim = replace(OPTIM, jitter=0.4, mixup=0.7, cutmix=0.7)
    feed, start = stream(source, optim)
    alone = list(start(0))
    assert [batch.step for batch in alone] == list(range(6))
    halves = [list(stream(source, optim, World(rank, 2))[1](2)) for rank in range(2)]
    for batch, *parts in zip(alone[2:], *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.indices, torch.cat([part.indices for part in parts]))
        assert feed.captions(batch) == [f"photo {i}" for i in batch.indices.tolist()]
        assert batch.captions == sum((part.captions for part in parts), ())


def test_what_a_feed_refuses(source):
    with pytest.raises(ValueError, match=r"batch_size is 8; expected a multiple of the 3 processes"):
        stream(source, world=World(0, 3))
    with pytest.raises(ValueError, match=r"the encoder takes 1 channels"):
        stream(source, config=replace(encoder().config, channels=1))


def test_too_many_damaged_images_stop_the_stream_with_one_line(tmp_path):
    for i in range(20):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i:02d}.png")
    for i in range(4):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    source = open_samples(str(tmp_path))
    with pytest.raises(ValueError, match=r"of the \d+ images read so far cannot be used, more than 10%") as caught:
        for _ in SampleFeed(source, LoaderConfig(workers=2)).stream(encoder().config, (28, 28), OPTIM, World())(0):
            pass
    assert "\n" not in str(caught.value)
    patient = SampleFeed(source, LoaderConfig(workers=2, max_skipped=0.2))
    assert len(list(patient.stream(encoder().config, (28, 28), OPTIM, World())(0))) == 6
    report = patient.counter.report()
    assert (len(report), report.total) == (4, 20)
    assert {name[-6:] for name, _ in report.files} == {f"{i:02d}.png" for i in range(4)}


def test_nothing_but_damage_stops_the_stream_whatever_the_limit(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    feed = SampleFeed(open_samples(str(tmp_path)), LoaderConfig(workers=0, max_skipped=1))
    with pytest.raises(ValueError, match="consecutive images cannot be used"):
        next(iter(feed.stream(encoder().config, (28, 28), OPTIM, World())(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_sees_its_own_normalisation(dtype):
    teacher, student = encoder((0.5, 0.4, 0.3), (0.1, 0.3, 0.2)), encoder()
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    pixels[0, :, :4] = 0  # black and white, the ends of the range, must not be clipped
    pixels[0, :, -4:] = 1

    def normalised(config):
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
        return (pixels - mean) / std

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), torch.no_grad():
        seen = observe(teacher, normalised(student.config), student.config)
        expected = tapped_forward(teacher, normalised(teacher.config))
    for a, b in zip(
        [*seen.sublayers, *seen.blocks, seen.pooled], [*expected.sublayers, *expected.blocks, expected.pooled]
    ):
        assert a.dtype == b.dtype
        # in bf16 too: the images stay float32 until the first matrix product rounds them
        limit = 1e-5 if dtype is torch.float32 else 2e-2
        assert float((a.float() - b.float()).norm() / b.float().norm()) < limit


def test_images_that_are_bf16_already_are_renormalised_in_float32():
    teacher, student = encoder((0.5, 0.4, 0.3), (0.1, 0.3, 0.2)).bfloat16(), encoder()
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean, std, mean_t, std_t = (
        torch.tensor(v)[:, None, None] for v in (MEAN, STD, teacher.config.image_mean, teacher.config.image_std)
    )
    caught = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    observe(teacher, images, student.config)
    exact = (images.float() * std + mean - mean_t) / std_t
    assert caught[0].dtype == torch.bfloat16
    assert torch.equal(caught[0], exact.bfloat16())


def test_color_jitter():
    images = torch.rand(5, 3, 6, 7)
    assert torch.equal(jitter_colors(images, torch.ones(5, 3)), images)
    factors = torch.ones(5, 3)
    factors[:, 2] = 0
    grey = jitter_colors(images, factors)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    factors = torch.tensor([[0.5, 1, 1]]).expand(5, 3)
    torch.testing.assert_close(jitter_colors(images, factors), images / 2)
    factors = jitter_factors(1000, 0.3, torch.Generator().manual_seed(0))
    assert 0.7 <= float(factors.min()) < 0.71
    assert 1.29 < float(factors.max()) <= 1.3
    strong = jitter_colors(images, jitter_factors(5, 1.0, torch.Generator().manual_seed(0)))
    assert 0 <= float(strong.min()) <= float(strong.max()) <= 1
    # in the transform it is one draw more, after those of the box
    plain, jittered = (TrainTransform(4, jitter=j)(images, torch.Generator().manual_seed(3)) for j in (0.0, 0.5))
    assert not torch.equal(plain, jittered)
    assert float((plain - jittered).abs().mean()) < 0.5


def test_mixup():
    images = torch.rand(5, 3, 6, 7)
    assert torch.equal(blend(images, torch.ones(5)), images)
    swapped = blend(images, torch.zeros(5))
    assert torch.equal(swapped, images[[1, 0, 3, 2, 4]])
    torch.testing.assert_close(blend(images, torch.full((5,), 0.25))[2], 0.25 * images[2] + 0.75 * images[3])
    factors = blend_factors(1000, 0.3, torch.Generator().manual_seed(0))
    assert 0.25 < float((factors < 1).float().mean()) < 0.35
    assert float(factors.min()) >= 0
    assert torch.equal(blend_factors(10, 0.0, torch.Generator()), torch.ones(10))


def test_cutmix():
    images = torch.rand(5, 3, 6, 7)
    box = torch.tensor([1, 2, 4, 3]).expand(5, 4)
    cut = paste(images, box)
    where = torch.zeros(6, 7, dtype=torch.bool)
    where[1:5, 2:5] = True
    assert torch.equal(cut, torch.where(where, images[[2, 3, 0, 1, 4]], images))
    assert torch.equal(paste(images, box * 0), images)
    boxes = paste_boxes(1000, 0.3, 20, 30, torch.Generator().manual_seed(0))
    assert 0.25 < float(boxes.any(1).float().mean()) < 0.35
    assert int((boxes[:, 0] + boxes[:, 2]).max()) <= 20
    assert int((boxes[:, 1] + boxes[:, 3]).max()) <= 30
    area = boxes[:, 2] * boxes[:, 3] / 600
    assert float(area.max()) > 0.8


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_blends_are_refused_beside_captions(name):
    with pytest.raises(ValueError, match=rf"{name} is on together with loss\.contrastive"):
        DistillConfig(stage2=OptimConfig(**{name: 0.5}), loss=LossConfig(contrastive=1))
    with pytest.raises(ValueError, match=r"mixup is 2; accepted: 0 to 1"):
        OptimConfig(mixup=2)


def test_the_wait_for_data_is_measured():
    def slow_source(steps):
        for step in range(steps):
            time.sleep(0.01 if step else 0.3)
            yield Batch(step, torch.arange(4), torch.zeros(4, 3, 1, 1), torch.zeros(4))

    clock = Throughput()
    for _, _ in zip(range(WARM + 20), clock.timed(slow_source(100))):
        time.sleep(0.03)
    found = clock.summary()
    assert len(clock.steps) == WARM + 20
    assert 0.15 < found["data_wait_share"] < 0.4  # 10 of 40 ms, and the first batch is not in it
    assert 0.3 < found["first_batch_seconds"] < 0.6
    assert 50 < found["images_per_second"] < 101
    assert Throughput().summary() == {}
