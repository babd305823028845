"""The stream of batches: complete epochs, exact resumption."""

import pytest
import torch

from cgspn.data import ImageSet, TrainTransform, batch_indices, batches, one_pass


def image_set(n=50):
    # The value of an image is its index, so images and labels can be told to belong together.
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 6, 6).contiguous()
    return ImageSet(images, torch.arange(n) % 7, tuple("abcdefg"))


@pytest.mark.parametrize(("size", "batch_size"), [(50, 8), (50, 50), (7, 20), (1, 3), (64, 16)])
def test_every_epoch_holds_every_image_once(size, batch_size):
    steps = -(-5 * size // batch_size)
    stream = torch.cat([batch_indices(size, batch_size, s, seed=1) for s in range(steps)])[: 5 * size].view(5, size)
    assert (stream.sort(1).values == torch.arange(size)).all()
    if size > 10:
        assert len({tuple(epoch.tolist()) for epoch in stream}) == 5


def test_unshuffled_is_the_order_of_the_source():
    stream = torch.cat([batch_indices(10, 4, s, shuffle=False) for s in range(5)])
    assert stream.tolist() == [*range(10), *range(10)]


def test_seeds_and_epochs_give_different_orders():
    assert batch_indices(100, 100, 0, seed=0).tolist() != batch_indices(100, 100, 0, seed=1).tolist()
    # Nearby seeds must not give shifted copies of one another's epochs.
    orders = {tuple(batch_indices(100, 100, step, seed=seed).tolist()) for seed in range(-3, 4) for step in range(7)}
    assert len(orders) == 49


def test_resuming_goes_on_bit_for_bit():
    source, transform = image_set(), TrainTransform(8)
    whole = list(batches(source, 8, steps=20, seed=3, transform=transform))
    torch.rand(5)  # the global generator plays no part
    rest = list(batches(source, 8, start=11, steps=20, seed=3, transform=transform))
    assert [b.step for b in rest] == list(range(11, 20))
    for a, b in zip(whole[11:], rest, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_augmentation_differs_from_step_to_step():
    draws = [
        float(b.images) for b in batches(image_set(1), 1, steps=8, transform=lambda x, g: torch.rand(1, generator=g))
    ]
    assert len(set(draws)) == 8


def test_images_and_labels_belong_to_the_indices():
    for batch in batches(image_set(), 8, steps=9):
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
        assert torch.equal(batch.labels, batch.indices % 7)


def test_one_pass_ends_with_the_rest():
    got = list(one_pass(image_set(10), 4))
    assert [len(b.indices) for b in got] == [4, 4, 2]
    assert torch.cat([b.indices for b in got]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("size", "batch_size", "step", "name"), [(0, 1, 0, "size"), (1, 0, 0, "batch_size"), (1, 1, -1, "step")]
)
def test_wrong_arguments_are_named(size, batch_size, step, name):
    with pytest.raises(ValueError, match=rf"^{name} is"):
        batch_indices(size, batch_size, step)
