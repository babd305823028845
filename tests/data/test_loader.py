"""The stream of batches: complete epochs, exact resumption."""

from dataclasses import replace

import pytest
import torch

from cgspn.data import ImageSet
from cgspn.data.loader import stream_indices
from cgspn.distill import ImageSetFeed, OptimConfig, World
from cgspn.models import model_config

OPTIM = OptimConfig(steps=9, batch_size=8, seed=3)


def batches(images, optim=OPTIM, start=0):
    encoder = replace(model_config("vit_mini_patch4_28"), image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return list(ImageSetFeed(images).stream(encoder, (8, 8), optim, World())(start))


def image_set(n=50):
    # The value of an image is its index, so images and labels can be told to belong together.
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 6, 6).contiguous()
    return ImageSet(images, torch.arange(n) % 7, tuple("abcdefg"))


@pytest.mark.parametrize(("size", "batch_size"), [(50, 8), (50, 50), (7, 20), (1, 3), (64, 16)])
def test_every_epoch_holds_every_image_once(size, batch_size):
    steps = -(-5 * size // batch_size)
    stream = torch.cat([stream_indices(size, s * batch_size, batch_size, seed=1) for s in range(steps)])
    stream = stream[: 5 * size].view(5, size)
    assert (stream.sort(1).values == torch.arange(size)).all()
    if size > 10:
        assert len({tuple(epoch.tolist()) for epoch in stream}) == 5


def test_seeds_and_epochs_give_different_orders():
    assert stream_indices(100, 0, 100, seed=0).tolist() != stream_indices(100, 0, 100, seed=1).tolist()
    # Nearby seeds must not give shifted copies of one another's epochs.
    orders = {tuple(stream_indices(100, 100 * n, 100, seed=seed).tolist()) for seed in range(-3, 4) for n in range(7)}
    assert len(orders) == 49


def test_resuming_goes_on_bit_for_bit():
    optim = replace(OPTIM, steps=20, jitter=0.3)
    images = ImageSet(torch.randint(0, 256, (50, 1, 12, 12), dtype=torch.uint8), torch.arange(50) % 7, tuple("abcdefg"))
    whole = batches(images, optim)
    torch.rand(5)  # the global generator plays no part
    rest = batches(images, optim, 11)
    assert [b.step for b in rest] == list(range(11, 20))
    for a, b in zip(whole[11:], rest, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_augmentation_differs_from_step_to_step():
    ramp = torch.arange(144, dtype=torch.uint8).view(1, 1, 12, 12)
    seen = batches(ImageSet(ramp, torch.zeros(1, dtype=torch.int64), ("a",)), replace(OPTIM, batch_size=1))
    assert len({tuple(b.images.flatten().tolist()) for b in seen}) == 9


def test_images_and_labels_belong_to_the_indices():
    for batch in batches(image_set()):
        torch.testing.assert_close(batch.images[:, 0, 0, 0] * 255, batch.indices.float())
        assert torch.equal(batch.labels, batch.indices % 7)


def test_an_empty_source_is_named():
    with pytest.raises(ValueError, match="size is 0"):
        stream_indices(0, 0, 1)
